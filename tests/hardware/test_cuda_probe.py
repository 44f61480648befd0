from __future__ import annotations

import os
import select

import pytest

from pytest_ranks.hardware import machine as machine_module
from pytest_ranks.hardware.found import Device, State

L4 = "{0}, GPU-{0}aaa-bbb, 23034, 570.86.15, NVIDIA L4, 8.9"
TWO_L4 = f"{L4.format(0)}\n{L4.format(1)}"


def has_ended(number: int) -> bool:
    """Return whether a process is gone, or goes within the time that a kill may take."""
    try:
        descriptor = os.pidfd_open(number)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10)[0])
    finally:
        os.close(descriptor)


def test_nvidia_smi_lists_the_devices(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", "0, GPU-0aaa, 23034, 570.86.15, NVIDIA L4, 8.9")
    cuda = machine.look().cuda
    assert cuda.state is State.USABLE
    assert cuda.devices == (
        Device(
            index=0, name="NVIDIA L4", uuid="GPU-0aaa", memory=23034 * 1024**2, capability=(8, 9)
        ),
    )
    assert cuda.how == "nvidia-smi: 1 device, driver 570.86.15"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        (" 1 , 0 ", [1, 0]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("0,0", []),
        ("GPU-1", [1]),
        ("GPU-1aaa-bbb,GPU-0", [1, 0]),
        ("GPU-", []),
        ("GPU-9", []),
    ],
)
def test_the_visibility_variable_hides_devices(machine, visible: str, indices: list[int]) -> None:
    machine.prints("/usr/bin/nvidia-smi", TWO_L4)
    cuda = machine.look(CUDA_VISIBLE_DEVICES=visible).cuda
    assert [device.index for device in cuda.devices] == indices
    assert cuda.present == 2
    assert cuda.how.endswith(f"; CUDA_VISIBLE_DEVICES={visible!r}")


def test_a_process_sees_one_mig_instance(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", TWO_L4)
    cuda = machine.look(CUDA_VISIBLE_DEVICES="MIG-0,MIG-1").cuda
    assert [device.uuid for device in cuda.devices] == ["MIG-0"]


def test_an_old_driver_is_asked_without_the_capability(machine) -> None:
    machine.program(
        "/usr/bin/nvidia-smi",
        'case "$*" in *compute_cap*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        'echo "0, GPU-0, 16160, 470.57, Tesla V100-SXM2, 32GB, 00000000:00:1E.0"',
    )
    (device,) = machine.look().cuda.devices
    assert (device.name, device.capability) == ("Tesla V100-SXM2, 32GB", None)


def test_what_the_driver_does_not_tell_is_unknown(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", "0, GPU-0, [N/A], 580.1, NVIDIA GB10, [N/A]")
    (device,) = machine.look().cuda.devices
    assert (device.memory, device.capability) == (None, None)


def test_a_driver_without_a_device(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", "No devices were found")
    cuda = machine.look().cuda
    assert cuda.state is State.WITHOUT_DEVICE
    assert cuda.how.endswith("nvidia-smi: unreadable answer 'No devices were found'")


def test_a_device_without_a_driver(machine) -> None:
    machine.pci("0x10de", "0x030200")
    cuda = machine.look().cuda
    assert (cuda.state, cuda.count, cuda.present) == (State.WITHOUT_SOFTWARE, 0, 1)
    assert cuda.how == "PCI: 1 NVIDIA device; NVML: not asked; nvidia-smi: absent"


def test_an_audio_function_of_a_gpu_is_no_gpu(machine) -> None:
    machine.pci("0x10de", "0x040300")
    assert machine.look().cuda.state is State.ABSENT


def test_a_tool_that_fails_says_so(machine) -> None:
    machine.program(
        "/usr/bin/nvidia-smi", 'echo "Failed to initialize NVML: Driver/library"; exit 18'
    )
    cuda = machine.look().cuda
    assert cuda.state is State.WITHOUT_DEVICE
    assert cuda.how.endswith(
        "nvidia-smi: exit status 18, 'Failed to initialize NVML: Driver/library'"
    )


def test_a_tool_that_hangs_is_given_up_with_its_children(machine, monkeypatch) -> None:
    monkeypatch.setattr(machine_module, "PROGRAM_SECONDS", 0.2)
    # The shell waits for a child that holds the pipe: killing the shell alone would not be enough.
    number = machine.root / "child"
    machine.program("/usr/bin/nvidia-smi", f"sleep 600 & echo $! >'{number}'; wait")
    assert machine.look().cuda.how.endswith("nvidia-smi: no answer in 0.2 s")
    assert has_ended(int(number.read_text()))


def test_a_tool_that_is_not_executable_is_absent(machine) -> None:
    machine.file("/usr/bin/nvidia-smi", "#!/bin/sh")
    assert machine.look().cuda.state is State.ABSENT
