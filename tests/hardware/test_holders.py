"""Who holds memory of a device, told by the drivers' tools on machines laid out in folders."""

from __future__ import annotations

import pytest

from pytest_ranks.hardware.found import Device
from pytest_ranks.hardware.holders import Holder, find_holders, settle
from pytest_ranks.hardware.machine import Machine

MIB = 1024**2
DEVICES = (Device(index=0, uuid="GPU-aa"), Device(index=1, uuid="GPU-bb"))


def look(machine) -> Machine:
    return Machine(machine.root, environ={"PATH": "/usr/bin:/bin"})


def test_nvidia_smi_names_processes_of_the_leased_devices_only(machine) -> None:
    machine.prints(
        "/usr/bin/nvidia-smi",
        "GPU-aa, 4711, 1024\nGPU-zz, 4712, 9\nGPU-bb, 4713, [N/A]\nno line of the tool",
    )
    machine.file("/proc/4711/cmdline", "python\0train.py\0--steps\0")
    found = find_holders("cuda", DEVICES, look(machine))
    assert found == (
        Holder(device=0, pid=4711, bytes=1024 * MIB, command="python train.py --steps"),
        Holder(device=1, pid=4713, bytes=None),
    )
    assert str(found[0]) == ("process 4711 (python train.py --steps) holds 1024 MiB of device 0")
    assert str(found[1]) == "process 4713 holds memory of device 1"


def test_a_machine_without_the_tool_tells_nothing(machine) -> None:
    for kind in ("cuda", "rocm", "xpu", "neuron"):
        assert find_holders(kind, DEVICES, look(machine)) == ()


def test_a_tool_that_fails_tells_nothing(machine) -> None:
    machine.program("/usr/bin/nvidia-smi", "echo broken; exit 9")
    assert find_holders("cuda", DEVICES, look(machine)) == ()


def test_the_kernel_accounts_for_amd_processes(machine) -> None:
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    for node, number in enumerate((0, 51545, 30111)):  # the first is the processor
        machine.file(f"{nodes}/{node}/gpu_id", number)
    machine.file("/sys/class/kfd/kfd/proc/99/vram_30111", 5 * MIB)
    machine.file("/sys/class/kfd/kfd/proc/99/vram_51545", 0)
    assert find_holders("rocm", DEVICES, look(machine)) == (
        Holder(device=1, pid=99, bytes=5 * MIB),
    )


def test_neuron_ls_names_processes_but_no_memory(machine) -> None:
    machine.prints(
        "/usr/bin/neuron-ls",
        '[{"nc_count": 2, "neuroncore_ids": [0, 1], "neuron_processes": '
        '[{"pid": 7, "command": "python a.py"}, {"pid": 8, "command": "neuron-ls --json-output"}]},'
        ' {"nc_count": 2, "neuroncore_ids": [2, 3], "neuron_processes": [{"pid": 9}]}]',
    )
    assert find_holders("neuron", DEVICES, look(machine)) == (
        Holder(device=0, pid=7, bytes=None, command="python a.py"),
    )


def test_memory_that_comes_back_is_waited_for(machine) -> None:
    # the tool's second answer is empty
    machine.file("/state", "GPU-aa, 4711, 10")
    state = machine.root / "state"
    machine.program("/usr/bin/nvidia-smi", f"cat '{state}'; : > '{state}'")
    assert settle("cuda", DEVICES, look(machine), before=(), timeout=60) is None
    assert state.read_text() == ""


def test_who_keeps_memory_is_named(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", "GPU-aa, 4711, 10\nGPU-aa, 4712, 20")
    before = (Holder(device=0, pid=4711, bytes=10 * MIB),)
    assert settle("cuda", DEVICES, look(machine), before=before, timeout=0) == (
        "CUDA memory was not given back within 0 s: process 4712 holds 20 MiB of device 0"
    )


@pytest.mark.parametrize("answer", ["", "null", "{", '{"a": 1}'])
def test_an_unreadable_answer_tells_nothing(machine, answer) -> None:
    machine.prints("/usr/bin/neuron-ls", answer)
    assert find_holders("neuron", DEVICES, look(machine)) == ()
