"""The environment variables that hide devices, read the way each vendor's runtime reads them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.hardware.found import Device


def select_gpus(devices: Sequence[Device], text: str | None) -> tuple[Device, ...]:
    """Return the devices that a CUDA or ROCm visibility variable leaves, in its order.

    The runtime reads up to the first entry that names no device and ignores the rest; a device
    named twice leaves none (CUDA C++ Programming Guide, "CUDA Environment Variables"; the same rule
    is in torch.cuda.device_count).

    Args:
        devices: all devices, in the driver's order.
        text: the variable's value ("0,2", "GPU-8932f937"), or None where it is not set.
    """
    if text is None:
        return tuple(devices)
    chosen: list[Device] = []
    for entry in text.split(","):
        device = _named(devices, entry.strip())
        if device is None:
            break
        if device in chosen:
            return ()
        chosen.append(device)
    return tuple(chosen)


def _named(devices: Sequence[Device], entry: str) -> Device | None:
    """Return the one device that an index, an identity or the beginning of an identity names."""
    if re.fullmatch(r"\d+", entry):
        index = int(entry)
        return devices[index] if index < len(devices) else None
    matches = [device for device in devices if entry and device.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def count_mig_instances(text: str | None) -> int:
    """Return how many MIG instances CUDA_VISIBLE_DEVICES gives a process: one at most.

    A CUDA process uses a single MIG instance (NVIDIA MIG User Guide, "CUDA Device Enumeration").
    """
    return int(text is not None and text.strip().startswith("MIG-"))


def select_xpus(devices: Sequence[Device], text: str | None) -> tuple[Device, ...]:
    """Return the devices that ZE_AFFINITY_MASK leaves; tiles ("0.1") count as their device.

    Level Zero specification, "Environment Variables".
    """
    if not text:
        return tuple(devices)
    indices = {int(number) for number in re.findall(r"(?:^|,)\s*(\d+)", text)}
    return tuple(device for position, device in enumerate(devices) if position in indices)


def visible_cores(text: str) -> set[int]:
    """Return the core numbers of NEURON_RT_VISIBLE_CORES ("0", "0-3", "0,2-5").

    Raises:
        ValueError: the text is no list of numbers and ranges.
    """
    cores: set[int] = set()
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", entry)
        if match is None:
            raise ValueError(f"NEURON_RT_VISIBLE_CORES={text!r} is no list such as '0,2-5'")
        first, last = int(match[1]), int(match[2] or match[1])
        cores.update(range(first, last + 1))
    return cores
