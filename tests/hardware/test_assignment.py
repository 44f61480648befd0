"""What ranks see of the leased devices, inside what the caller's own variables leave."""

from __future__ import annotations

import pytest

from pytest_ranks.hardware.assignment import (
    is_neuron_world,
    leasable,
    neuron_worlds_beside,
    visibility,
)

SMI = """
0, GPU-aa, 81559, 570.86.15, NVIDIA H100, 9.0
1, GPU-bb, 81559, 570.86.15, NVIDIA H100, 9.0
2, GPU-cc, 81559, 570.86.15, NVIDIA H100, 9.0
3, GPU-dd, 81559, 570.86.15, NVIDIA H100, 9.0
""".strip()


@pytest.fixture
def seen(machine):
    """What the ranks see when these of the leasable CUDA devices are leased."""
    machine.prints("/usr/bin/nvidia-smi", SMI)

    def see(places, **environ: str) -> dict[str, str]:
        devices = leasable(machine.look(**environ).cuda, environ)
        leased = [devices[place] for place in places]
        return visibility("cuda", devices, leased, rank=0, environ=environ)

    return see


def test_devices_are_named_by_identity_where_the_caller_named_none(seen) -> None:
    assert seen([1, 3]) == {"CUDA_VISIBLE_DEVICES": "GPU-bb,GPU-dd"}


@pytest.mark.parametrize(
    ("given", "places", "expected"),
    [
        ("2,0,1", [0, 2], "2,1"),
        ("GPU-cc,GPU-aa", [1], "GPU-aa"),
        ("GPU-c, 0", [0, 1], "GPU-c,0"),
    ],
)
def test_the_callers_own_words_are_kept(seen, given, places, expected) -> None:
    assert seen(places, CUDA_VISIBLE_DEVICES=given) == {"CUDA_VISIBLE_DEVICES": expected}


def test_each_mig_instance_is_a_device_of_its_own(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", SMI)
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-1111, MIG-GPU-aa/3/0"}
    cuda = machine.look(**environ).cuda
    assert cuda.count == 1  # that one process can use
    devices = leasable(cuda, environ)
    assert [device.uuid for device in devices] == ["MIG-1111", "MIG-GPU-aa/3/0"]
    found = visibility("cuda", devices, devices[1:], rank=0, environ=environ)
    assert found == {"CUDA_VISIBLE_DEVICES": "MIG-GPU-aa/3/0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"HIP_VISIBLE_DEVICES": "0,2"}),
        ({"ROCR_VISIBLE_DEVICES": "1,2,3"}, {"HIP_VISIBLE_DEVICES": "0,2"}),
        ({"HIP_VISIBLE_DEVICES": "3,1,0"}, {"HIP_VISIBLE_DEVICES": "3,0"}),
        ({"CUDA_VISIBLE_DEVICES": "3,1,0"}, {"CUDA_VISIBLE_DEVICES": "3,0"}),
    ],
)
def test_hip_counts_what_rocr_left(machine, environ, expected) -> None:
    cards = ", ".join(f'"card{n}": {{"Card Series": "MI300X"}}' for n in range(4))
    machine.prints("/opt/rocm/bin/rocm-smi", "{" + cards + "}")
    devices = leasable(machine.look(**environ).rocm, environ)
    leased = [devices[0], devices[2]]
    assert visibility("rocm", devices, leased, rank=1, environ=environ) == expected


@pytest.mark.parametrize(
    ("mask", "expected"), [("", "0,1"), ("1,0", "0,1"), ("0.0,0.1,1.1", "0.0,0.1,1.1")]
)
def test_an_intel_mask_keeps_the_callers_tiles(machine, mask, expected) -> None:
    machine.prints(
        "/usr/bin/xpu-smi", '{"device_list": [{"device_name": "a"}, {"device_name": "b"}]}'
    )
    machine.file("/usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1")
    environ = {"ZE_AFFINITY_MASK": mask} if mask else {}
    devices = leasable(machine.look(**environ).xpu, environ)
    assert len(devices) == 2
    found = visibility("xpu", devices, devices, rank=0, environ=environ)
    assert found == {"ZE_AFFINITY_MASK": expected}


def test_each_neuron_rank_sees_its_own_core(machine) -> None:
    machine.modules.add("torch_neuronx")
    machine.file("/sys/devices/virtual/neuron_device/neuron0/core_count", 8)
    environ = {"NEURON_RT_VISIBLE_CORES": "2-5"}
    devices = leasable(machine.look(**environ).neuron, environ)
    leased = devices[1:3]
    cores = [visibility("neuron", devices, leased, rank=n, environ=environ) for n in range(2)]
    assert cores == [{"NEURON_RT_VISIBLE_CORES": "3"}, {"NEURON_RT_VISIBLE_CORES": "4"}]


def test_worlds_that_neuron_makes() -> None:
    assert [n for n in range(70) if is_neuron_world(n)] == [1, 2, 8, 16, 32, 64]
    assert neuron_worlds_beside(4) == (2, 8)
    assert neuron_worlds_beside(33) == (32, 64)
