from __future__ import annotations

import json

import pytest

from pytest_ranks.hardware.found import Device, State

NODES = "/sys/class/kfd/kfd/topology/nodes"
GIB = 1024**3


def add_gpu(machine, node: int, *, render: int, has_render_node: bool = True) -> None:
    properties = {
        "simd_count": 304,
        "gfx_target_version": 90402,
        "drm_render_minor": render,
        "unique_id": 0xABC0 + node,
    }
    machine.file(f"{NODES}/{node}/properties", "\n".join(f"{k} {v}" for k, v in properties.items()))
    machine.file(f"{NODES}/{node}/name", "gfx942")
    machine.file(
        f"{NODES}/{node}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {192 * GIB}"
    )
    machine.file(f"{NODES}/{node}/mem_banks/1/properties", "heap_type 4\nsize_in_bytes 65536")
    if has_render_node:
        machine.file(f"/dev/dri/renderD{render}")


@pytest.fixture
def two_gpus(machine):
    machine.file("/dev/kfd")
    machine.file(f"{NODES}/0/properties", "simd_count 0\ncpu_cores_count 96")
    add_gpu(machine, 1, render=128)
    add_gpu(machine, 2, render=129)
    return machine


def test_the_kernel_lists_the_devices(two_gpus) -> None:
    rocm = two_gpus.look().rocm
    assert rocm.state is State.USABLE
    assert rocm.how == "kfd: 2 devices"
    assert rocm.devices[0] == Device(
        index=0, name="gfx942", uuid="GPU-abc1", memory=192 * GIB, capability=(9, 4)
    )


@pytest.mark.parametrize(
    ("environ", "uuids"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["GPU-abc2"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["GPU-abc2"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["GPU-abc1"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-abc2"}, ["GPU-abc2"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["GPU-abc2"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, []),
    ],
)
def test_visibility_variables_hide_devices(two_gpus, environ, uuids) -> None:
    assert [device.uuid for device in two_gpus.look(**environ).rocm.devices] == uuids


def test_a_node_without_its_render_device_belongs_to_another_container(machine) -> None:
    machine.file("/dev/kfd")
    add_gpu(machine, 1, render=128)
    add_gpu(machine, 2, render=129, has_render_node=False)
    assert machine.look().rocm.count == 1


def test_rocm_smi_where_the_kernel_tells_nothing(machine) -> None:
    card = {"Card Series": "AMD Instinct MI300X", "VRAM Total Memory (B)": str(192 * GIB)}
    machine.prints("/opt/rocm/bin/rocm-smi", json.dumps({"card0": card, "system": {}}))
    rocm = machine.look().rocm
    assert rocm.how == "rocm-smi: 1 device"
    assert rocm.devices == (Device(index=0, name="AMD Instinct MI300X", memory=192 * GIB),)


@pytest.mark.parametrize("output", ["", "[]", "not JSON"])
def test_an_answer_that_cannot_be_read_is_no_device(machine, output: str) -> None:
    machine.prints("/usr/bin/rocm-smi", output)
    assert machine.look().rocm.how == "/dev/kfd: absent; rocm-smi: unreadable answer"


def test_a_device_without_a_driver(machine) -> None:
    machine.pci("0x1002", "0x120000")
    rocm = machine.look().rocm
    assert rocm.state is State.WITHOUT_SOFTWARE
    assert rocm.how == "PCI: 1 AMD device; /dev/kfd: absent; rocm-smi: absent"


def test_a_driver_without_a_device(machine) -> None:
    machine.file("/dev/kfd")
    assert machine.look().rocm.state is State.WITHOUT_DEVICE


def test_nothing(machine) -> None:
    assert machine.look().rocm.state is State.ABSENT
