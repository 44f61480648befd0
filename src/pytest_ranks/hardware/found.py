"""What the probes hand out: states, devices, accelerators, and the machine as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Kind = Literal["cuda", "rocm", "xpu", "neuron", "cpu"]

LABELS: dict[str, str] = {
    "cuda": "CUDA",
    "rocm": "ROCm",
    "xpu": "Intel XPU",
    "neuron": "Neuron",
    "cpu": "CPU",
}


def counted(number: int, noun: str) -> str:
    """Return `1 device`, `2 devices`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class State(StrEnum):
    """How much of an accelerator is there: the device, its software, both or none."""

    USABLE = "usable"
    WITHOUT_SOFTWARE = "present without software"
    WITHOUT_DEVICE = "software without device"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that a process started now could use (for Neuron: one logical core).

    Attributes:
        index: the physical index that the driver gives it.
        name: the product's name, or "" where the driver does not tell.
        uuid: the identity that visibility variables may name, or "".
        memory: bytes in all, or None where the driver does not tell.
        capability: (major, minor) of the architecture, or None where there is no such thing.
    """

    index: int
    name: str = ""
    uuid: str = ""
    memory: int | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """What one probe found.

    Attributes:
        kind: the vendor's stack.
        state: usable, or what is missing.
        devices: the visible devices; empty unless the state is usable.
        present: how many there are before visibility variables hide some.
        how: how the probe knows, for a reader ("NVML: 2 devices, driver 570.86.15").
    """

    kind: Kind
    state: State
    how: str
    devices: tuple[Device, ...] = ()
    present: int = 0

    @property
    def count(self) -> int:
        """Return how many devices a process started now could use."""
        return len(self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What this machine has, one entry for each kind of accelerator."""

    cuda: Accelerator
    rocm: Accelerator
    xpu: Accelerator
    neuron: Accelerator
    cpu: Accelerator

    @property
    def gpus(self) -> tuple[Accelerator, ...]:
        """Return the kinds that the `gpu` mark means when it names no vendor."""
        return (self.cuda, self.rocm, self.xpu)
