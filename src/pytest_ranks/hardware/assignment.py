"""Which devices the ranks of a test see: the variables that say so to each vendor's runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.hardware.found import Device
from pytest_ranks.hardware.visible import count_mig_instances

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_ranks.hardware.found import Accelerator

# Neuron collectives span 1, 2, 8, 16 or whole groups of 32 cores
# (huggingface/optimum-neuron#424, #619).
NEURON_WORLDS = (1, 2, 8, 16)
NEURON_GROUP = 32


def is_neuron_world(count: int) -> bool:
    """Return whether a Neuron world may have so many cores."""
    return count in NEURON_WORLDS or (count > 0 and count % NEURON_GROUP == 0)


def neuron_worlds_beside(count: int) -> tuple[int, int]:
    """Return the next smaller and the next larger size of a Neuron world."""
    groups = range(NEURON_GROUP, count + 2 * NEURON_GROUP, NEURON_GROUP)
    sizes = [*NEURON_WORLDS, *groups]
    below = max((size for size in sizes if size < count), default=NEURON_WORLDS[0])
    return below, min(size for size in sizes if size > count)


def leasable(accelerator: Accelerator, environ: Mapping[str, str]) -> tuple[Device, ...]:
    """Return the devices that a lease may choose from, inside what the caller's variables leave.

    A CUDA process sees one MIG instance of those that are named, so each of them is a device of
    its own to choose from.
    """
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if accelerator.kind == "cuda" and count_mig_instances(text):
        names = [name.strip() for name in str(text).split(",")]
        return tuple(
            Device(index=index, name="MIG instance", uuid=name)
            for index, name in enumerate(names)
            if name.startswith("MIG-")
        )
    return accelerator.devices


def visibility(
    kind: str,
    devices: Sequence[Device],
    leased: Sequence[Device],
    *,
    rank: int,
    environ: Mapping[str, str],
) -> dict[str, str]:
    """Return the variables that show a rank its leased devices and hide all others.

    Every rank sees the devices of all ranks of its test, in the order of the ranks, because
    training code picks its own by LOCAL_RANK; on Neuron each sees its own core, since a core
    belongs to the one process that reserved it (AWS Neuron documentation, "Neuron Runtime
    configuration").

    Args:
        kind: the vendor's stack, as in `Accelerator.kind`.
        devices: what `leasable` returned.
        leased: those of them that the ranks have, one each.
        rank: the rank that the variables are for.
        environ: the caller's environment.
    """
    places = [devices.index(device) for device in leased]
    if kind == "neuron":
        return {"NEURON_RT_VISIBLE_CORES": str(leased[rank].index)}
    if kind == "xpu":
        return {"ZE_AFFINITY_MASK": _xpu_mask(leased, environ)}
    if kind == "rocm":
        return _hip_variables(places, environ)
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        # the caller's own words: an index means what CUDA_DEVICE_ORDER makes of it
        entries = [entry.strip() for entry in given.split(",")]
        return {"CUDA_VISIBLE_DEVICES": ",".join(entries[place] for place in places)}
    names = [device.uuid or str(device.index) for device in leased]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def _hip_variables(places: Sequence[int], environ: Mapping[str, str]) -> dict[str, str]:
    """Return HIP's variable; its indices count the devices that ROCR_VISIBLE_DEVICES left.

    HIP reads CUDA_VISIBLE_DEVICES too (ROCm documentation, "GPU isolation techniques").
    """
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in environ:
            entries = [entry.strip() for entry in environ[name].split(",")]
            return {name: ",".join(entries[place] for place in places)}
    return {"HIP_VISIBLE_DEVICES": ",".join(map(str, places))}


def _xpu_mask(leased: Sequence[Device], environ: Mapping[str, str]) -> str:
    """Return the affinity mask, with the tiles that the caller chose of each device."""
    given = [entry.strip() for entry in environ.get("ZE_AFFINITY_MASK", "").split(",")]
    entries: list[str] = []
    for device in leased:
        own = [entry for entry in given if entry.partition(".")[0] == str(device.index)]
        entries += own or [str(device.index)]
    return ",".join(entries)
