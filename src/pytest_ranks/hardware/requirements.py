"""What a test needs against what the machine has; every skip reason is made here."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.hardware.assignment import is_neuron_world, neuron_worlds_beside
from pytest_ranks.hardware.found import LABELS, Accelerator, Device, Hardware, State, counted
from pytest_ranks.hardware.packages import has_module, installed_version
from pytest_ranks.launch.fidelity.ladder import DEFAULT, HOSTED

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1024**3
UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": GIB, "TiB": 1024**4}
VENDORS = ("cuda", "rocm", "xpu")
COMPANIES = {"nvidia": "cuda", "amd": "rocm", "intel": "xpu"}
# The devices that a process group's backend moves data between; gloo needs none.
BACKEND_DEVICES = {"nccl": ("cuda", "rocm"), "xccl": ("xpu",), "neuron": ("neuron",)}
# What `--ranks-require` may name.
REQUIRABLE = ("gpu", "multi_gpu", "trainium", "ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNeed:
    """A need of accelerators of one kind: the marks `gpu`, `multi_gpu` and `trainium`.

    Attributes:
        kind: the mark's name.
        count: how many devices (trainium: logical cores).
        among: the kinds of accelerator that will do; all devices come from one of them.
        memory: bytes that each device has at least, or None.
        capability: the least (major, minor) of each device, or None.
    """

    kind: str
    count: int
    among: tuple[str, ...] = VENDORS
    memory: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """Return the row of the summary that this need belongs to."""
        return self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageNeed:
    """A need of an installed module or distribution, with a version: the mark `requires`.

    Attributes:
        name: the module or distribution.
        specifier: a PEP 440 version specifier, "" for any version.
    """

    name: str
    specifier: str = ""
    kind: str = "requires"

    @property
    def label(self) -> str:
        """Return the row of the summary that this need belongs to."""
        return self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksNeed:
    """A need of rank processes: the mark `ranks`, at one world size.

    Attributes:
        world_size: how many ranks.
        backend: the process group's backend.
        fidelity: how real the ranks are.
    """

    world_size: int
    backend: str = "gloo"
    fidelity: str = DEFAULT
    kind: str = "ranks"

    @property
    def label(self) -> str:
        """Return the row of the summary that this need belongs to."""
        shown = "" if self.fidelity in (DEFAULT, "device") else f" {self.fidelity}"
        return f"ranks ws={self.world_size}{shown}"


Need = DeviceNeed | PackageNeed | RanksNeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Required:
    """One entry of `--ranks-require`: tests of this kind have to run, with so many devices."""

    kind: str
    count: int

    def __str__(self) -> str:
        """Return the entry as the user writes it."""
        return f"{self.kind}:{self.count}"


def unmet(need: Need, *, hardware: Callable[[], Hardware] | None = None) -> str | None:
    """Return why a need is not met on this machine, or None where it is.

    Args:
        need: what a test asks for.
        hardware: returns what the machine has, called only if the need is one of hardware; None
            probes this machine.
    """
    if isinstance(need, PackageNeed):
        return _unmet_package(need)
    if isinstance(need, RanksNeed):
        return _unmet_ranks(need, hardware)
    return _unmet_devices(need, _found(hardware))


def devices_found(need: Need, *, hardware: Callable[[], Hardware] | None = None) -> int:
    """Return how many devices this machine has for a need.

    For ranks: those that are processes, of which threads and the like are none; for packages: 1.
    """
    if isinstance(need, RanksNeed):
        return 0 if need.fidelity in HOSTED else need.world_size
    if isinstance(need, PackageNeed):
        return 1
    return _best(need, _found(hardware)).count


def parse_required(text: str) -> tuple[Required, ...]:
    """Read the value of `--ranks-require`.

    Args:
        text: a comma list of `kind:count`; a kind alone means the least count that it stands for.

    Raises:
        ValueError: an entry cannot be read; the text says which and what to write.
    """
    found = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*(?::\s*(\d+)\s*)?", entry)
        kind = match[1] if match else entry.strip()
        if kind not in REQUIRABLE:
            raise ValueError(f"{kind!r} is no kind of need.{did_you_mean(kind, REQUIRABLE)}")
        least = 2 if kind == "multi_gpu" else 1
        count = int(match[2]) if match and match[2] else least
        if count < 1:
            raise ValueError(f"{entry.strip()!r} asks for no device")
        found.append(Required(kind=kind, count=count))
    return tuple(found)


def parse_memory(value: object) -> int:
    """Return bytes from a number of bytes or a text such as "40GiB".

    Raises:
        BadInputError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|B)", value) if isinstance(value, str) else None
    )
    if match is None or float(match[1]) <= 0:
        raise BadInputError(f"memory={value!r} is no size; write bytes or a text such as '40GiB'.")
    return int(float(match[1]) * UNITS[match[2]])


def parse_capability(value: object) -> tuple[int, int]:
    """Return (major, minor) from such a pair or a text such as "9.0".

    Raises:
        BadInputError: it is neither.
    """
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\.(\d+)", value)):
        return int(match[1]), int(match[2])
    if isinstance(value, tuple | list) and len(value) == 2:
        major, minor = value
        if type(major) is int and type(minor) is int and min(major, minor) >= 0:
            return major, minor
    raise BadInputError(f"capability={value!r} is no version; write (9, 0) or '9.0'.")


def parse_vendor(value: object) -> tuple[str, ...]:
    """Return the kinds of accelerator that a `vendor=` stands for; None stands for all.

    Raises:
        BadInputError: there is no such vendor.
    """
    if value is None:
        return VENDORS
    if isinstance(value, str) and value in VENDORS:
        return (value,)
    near = COMPANIES.get(str(value).lower())
    hint = f" Did you mean {near!r}?" if near else did_you_mean(str(value), VENDORS)
    raise BadInputError(f"vendor={value!r} is unknown; choose from {', '.join(VENDORS)}.{hint}")


def parse_package(value: object) -> PackageNeed:
    """Return the need of a package from a text such as "flash_attn>=2.8".

    Raises:
        BadInputError: the text is no name with an optional PEP 440 version specifier.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    expected = "write a module or distribution with a version, such as 'flash_attn>=2.8'."
    try:
        parsed = Requirement(value) if isinstance(value, str) else None
    except InvalidRequirement:
        parsed = None
    if parsed is None or parsed.url or parsed.marker or parsed.extras:
        raise BadInputError(f"{value!r} is no requirement; {expected}")
    return PackageNeed(name=parsed.name, specifier=str(parsed.specifier))


def _found(hardware: Callable[[], Hardware] | None) -> Hardware:
    """Return what the machine has."""
    if hardware is not None:
        return hardware()
    from pytest_ranks.hardware.probes import probe

    return probe()


def _best(need: DeviceNeed, hardware: Hardware) -> Accelerator:
    """Return the kind with the most suitable devices: they must all come from one vendor."""
    kinds: list[Accelerator] = [getattr(hardware, kind) for kind in need.among]
    return max(kinds, key=lambda kind: (len(_suitable(need, kind)), kind.count, kind.present))


def _suitable(need: DeviceNeed, kind: Accelerator) -> list[Device]:
    """Return the devices that have the memory and capability; what is unknown does not suffice."""
    return [
        device
        for device in kind.devices
        if (need.memory is None or (device.memory or 0) >= need.memory)
        and (need.capability is None or (device.capability or (0, 0)) >= need.capability)
    ]


def _unmet_devices(need: DeviceNeed, hardware: Hardware) -> str | None:
    """Compare a need of devices with what there is."""
    best = _best(need, hardware)
    suitable = len(_suitable(need, best))
    if suitable >= need.count:
        return None
    wanted = f"needs {_noun(need)}{_conditions(need)}"
    if need.memory is None and need.capability is None:
        return f"{wanted}, found {suitable} ({_how(need, best, hardware)})"
    listed = _list_devices(best.devices) or _how(need, best, hardware)
    found = f"{suitable} of {best.count}" if best.count else "0"
    return f"{wanted}, found {found} ({listed})"


def _noun(need: DeviceNeed) -> str:
    """Return the devices in words: `2 GPUs`, `2 CUDA devices`, `4 Trainium cores`."""
    if need.among == ("neuron",):
        return counted(need.count, "Trainium core")
    if need.among == VENDORS:
        return counted(need.count, "GPU")
    return counted(need.count, f"{' or '.join(LABELS[kind] for kind in need.among)} device")


def _conditions(need: DeviceNeed) -> str:
    """Return what each device has to have, in words."""
    conditions = []
    if need.memory is not None:
        conditions.append(f"memory >= {_size(need.memory)}")
    if need.capability is not None:
        conditions.append(f"capability >= {_version(need.capability)}")
    return f" with {' and '.join(conditions)}" if conditions else ""


def _how(need: DeviceNeed, best: Accelerator, hardware: Hardware) -> str:
    """Return how the probes know; where nothing at all is there, which kinds were looked for."""
    if best.state is State.USABLE:
        return best.how
    kinds: list[Accelerator] = [getattr(hardware, kind) for kind in need.among]
    if len(kinds) == 1:
        return best.how if best.state is State.ABSENT else f"{best.state}; {best.how}"
    telling = [kind for kind in kinds if kind.state is not State.ABSENT]
    if not telling:
        return f"{', '.join(LABELS[kind.kind] for kind in kinds)}: absent"
    return "; ".join(f"{LABELS[kind.kind]} {kind.state}; {kind.how}" for kind in telling)


def _list_devices(devices: tuple[Device, ...]) -> str:
    """Return the devices in words, equal ones counted."""
    texts = Counter(
        " ".join(
            part
            for part in (
                device.name or "unnamed",
                _size(device.memory) if device.memory is not None else "memory unknown",
                _version(device.capability) if device.capability else "capability unknown",
            )
        )
        for device in devices
    )
    return ", ".join(f"{number} x {text}" for text, number in texts.items())


def _size(number: int) -> str:
    """Return bytes in GiB, or in MiB below one."""
    return f"{number / GIB:.4g}GiB" if number >= GIB else f"{number / UNITS['MiB']:.4g}MiB"


def _version(capability: tuple[int, int]) -> str:
    """Return (9, 0) as `9.0`."""
    return f"{capability[0]}.{capability[1]}"


def _unmet_ranks(need: RanksNeed, hardware: Callable[[], Hardware] | None) -> str | None:
    """Ranks need torch, and one device each where the backend is not gloo."""
    if not has_module("torch"):
        return "needs torch, found none (pip install 'pytest-ranks[torch]')"
    for backend, among in BACKEND_DEVICES.items():
        if backend in need.backend:
            devices = DeviceNeed(kind="ranks", count=need.world_size, among=among)
            reason = _unmet_devices(devices, _found(hardware))
            if reason is None and backend == "neuron" and not is_neuron_world(need.world_size):
                below, above = neuron_worlds_beside(need.world_size)
                reason = (
                    f"needs a world of {counted(need.world_size, 'Trainium core')}, Neuron makes "
                    f"worlds of 1, 2, 8, 16 and multiples of 32; the nearest are {below} and {above}"
                )
            return reason and f"backend {need.backend!r}: {reason}"
    return None


def _unmet_package(need: PackageNeed) -> str | None:
    """Compare a need of a package with what is installed; nothing is imported."""
    wanted = f"needs {need.name}{need.specifier}"
    version = installed_version(need.name)
    if version is None:
        if not has_module(need.name):
            return f"{wanted}, found none"
        return f"{wanted}, found a module without a version" if need.specifier else None
    from packaging.specifiers import SpecifierSet

    # A nightly build of the wanted version is what people who install one want to test.
    fits = SpecifierSet(need.specifier).contains(version, prereleases=True)
    return None if fits else f"{wanted}, found {version}"
