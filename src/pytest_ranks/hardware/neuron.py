"""AWS Trainium cores, through neuron-ls, then sysfs, then /dev; the runtime is never started."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pytest_ranks.hardware.found import Accelerator, Device, State, counted
from pytest_ranks.hardware.visible import visible_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.hardware.machine import Machine

AMAZON_VENDOR = "0x1d0f"
ACCELERATOR_CLASS = "0x0880"
SYSFS = "/sys/devices/virtual/neuron_device"
SOFTWARE = "torch_neuronx"
# From Trainium2 on two physical cores make one logical core, unless NEURON_LOGICAL_NC_CONFIG says
# otherwise (AWS Neuron documentation, "Logical NeuronCore configuration").
DEFAULT_LOGICAL = 2
GROUPED_INSTANCES = re.compile(r"(?i)trn(2|3|[4-9])")


def probe_neuron(machine: Machine, *, installed: Callable[[str], bool]) -> Accelerator:
    """Return the logical NeuronCores that a process started now could use.

    Args:
        machine: where to look.
        installed: tells whether a top-level module can be imported, without importing it.
    """
    cores, how = _first_answer(machine)
    has_software = installed(SOFTWARE)
    if not cores:
        state = State.WITHOUT_DEVICE if has_software else State.ABSENT
        return Accelerator(kind="neuron", state=state, how=how)
    if not has_software:
        how = f"{how}; {SOFTWARE}: not installed"
        return Accelerator(kind="neuron", state=State.WITHOUT_SOFTWARE, how=how, present=cores)
    devices, hidden = _visible(machine, cores)
    return Accelerator(
        kind="neuron", state=State.USABLE, how=how + hidden, devices=devices, present=cores
    )


def _first_answer(machine: Machine) -> tuple[int, str]:
    """Return the logical cores from the first source that knows, and what each source said."""
    said = []
    for ask in (_ask_neuron_ls, _read_sysfs, _count_nodes):
        cores, how = ask(machine)
        if cores:
            return cores, how
        said.append(how)
    return 0, "; ".join(said)


def _visible(machine: Machine, cores: int) -> tuple[tuple[Device, ...], str]:
    """Apply NEURON_RT_VISIBLE_CORES, or else NEURON_RT_NUM_CORES (Neuron Runtime configuration)."""
    chosen = range(cores)
    listed = machine.environ.get("NEURON_RT_VISIBLE_CORES")
    number = machine.environ.get("NEURON_RT_NUM_CORES")
    if listed:
        hidden = f"; NEURON_RT_VISIBLE_CORES={listed!r}"
        try:
            wanted = visible_cores(listed)
        except ValueError as error:
            return (), f"; {error}"
        return tuple(Device(index=core) for core in chosen if core in wanted), hidden
    # Zero means all (Neuron Runtime configuration).
    if number and number.isdecimal() and int(number) > 0:
        hidden = f"; NEURON_RT_NUM_CORES={number!r}"
        return tuple(Device(index=core) for core in chosen[: int(number)]), hidden
    return tuple(Device(index=core) for core in chosen), ""


def _logical(machine: Machine, physical: int) -> int:
    """Return how many logical cores a device's physical cores make."""
    setting = machine.environ.get("NEURON_LOGICAL_NC_CONFIG", "")
    if setting.isdecimal() and int(setting) > 0:
        return physical // int(setting)
    instance = machine.read("/sys/devices/virtual/dmi/id/product_name") or ""
    return physical // DEFAULT_LOGICAL if GROUPED_INSTANCES.match(instance) else physical


def _words(source: str, devices: int, cores: int) -> str:
    """Say in words what a source told."""
    return f"{source}: {counted(devices, 'device')}, {counted(cores, 'logical core')}"


def _ask_neuron_ls(machine: Machine) -> tuple[int, str]:
    """Ask the vendor's tool for JSON."""
    program = machine.find_program("neuron-ls", "/opt/aws/neuron/bin")
    if program is None:
        return 0, "neuron-ls: absent"
    import json

    try:
        devices = _entries(json.loads(machine.run(program, "--json-output")))
        cores = sum(_entry_cores(machine, entry) for entry in devices)
    except OSError as error:
        return 0, str(error)
    except (ValueError, KeyError, TypeError):
        return 0, "neuron-ls: unreadable answer"
    return cores, _words("neuron-ls", len(devices), cores)


def _entries(answer: Any) -> list[dict[str, Any]]:
    """Return the devices: the answer is a list of them, or an object with one list inside."""
    if isinstance(answer, dict):
        lists = [value for value in answer.values() if isinstance(value, list)]
        answer = lists[0] if len(lists) == 1 else None
    if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
        raise ValueError("no list of devices")
    return answer


def _entry_cores(machine: Machine, entry: dict[str, Any]) -> int:
    """Return a device's logical cores; an entry that names its grouping counts those already."""
    count = int(entry["nc_count"])
    return count if "logical_neuroncore_config" in entry else _logical(machine, count)


def _read_sysfs(machine: Machine) -> tuple[int, str]:
    """Read the driver's tree (AWS Neuron documentation, "Neuron Sysfs User Guide")."""
    numbers = machine.numbered(SYSFS, "neuron")
    if not numbers:
        return 0, f"{SYSFS}: absent"
    counts = [machine.read_int(f"{SYSFS}/neuron{number}/core_count") for number in numbers]
    cores = sum(_logical(machine, count) for count in counts if count)
    return cores, _words("sysfs", len(numbers), cores)


def _count_nodes(machine: Machine) -> tuple[int, str]:
    """Count device nodes; cores are unknown here, so one for each node is all that is promised."""
    numbers = machine.numbered("/dev", "neuron")
    if not numbers:
        on_bus = machine.pci_devices(AMAZON_VENDOR, ACCELERATOR_CLASS)
        return 0, "/dev/neuron*: absent" + (
            f"; PCI: {on_bus} Amazon devices without driver" if on_bus else ""
        )
    return len(numbers), _words("/dev", len(numbers), len(numbers))
