from __future__ import annotations

import json

import pytest

from pytest_ranks.hardware.found import Device, State


def add_render_node(machine, minor: int, vendor: str = "0x8086") -> None:
    machine.file(f"/sys/class/drm/renderD{minor}/device/vendor", vendor)
    machine.file(f"/dev/dri/renderD{minor}")


def add_driver(machine) -> None:
    machine.file("/usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1")


def test_render_nodes_with_the_driver_are_usable(machine) -> None:
    add_driver(machine)
    add_render_node(machine, 128)
    add_render_node(machine, 129, vendor="0x10de")
    xpu = machine.look().xpu
    assert (xpu.state, xpu.count) == (State.USABLE, 1)
    assert xpu.how == "sysfs: 1 Intel device; xpu-smi: absent"


def test_a_display_adapter_without_the_driver_is_not_usable(machine) -> None:
    add_render_node(machine, 128)
    machine.file("/usr/lib/x86_64-linux-gnu/libze_loader.so.1")
    xpu = machine.look().xpu
    assert (xpu.state, xpu.count, xpu.present) == (State.WITHOUT_SOFTWARE, 0, 1)


def test_the_driver_without_a_device(machine) -> None:
    add_driver(machine)
    assert machine.look().xpu.state is State.WITHOUT_DEVICE


def test_xpu_smi_names_the_devices(machine) -> None:
    entries = [{"device_id": n, "device_name": "Intel Max 1550", "uuid": f"u{n}"} for n in (0, 1)]
    machine.prints("/usr/bin/xpu-smi", json.dumps({"device_list": entries}))
    xpu = machine.look().xpu
    assert xpu.how == "xpu-smi: 2 devices"
    assert xpu.devices[1] == Device(index=1, name="Intel Max 1550", uuid="u1")


@pytest.mark.parametrize(
    ("mask", "indices"), [("1", [1]), ("0,1", [0, 1]), ("0.0,0.1", [0]), ("", [0, 1]), ("7", [])]
)
def test_the_affinity_mask_hides_devices(machine, mask: str, indices: list[int]) -> None:
    add_driver(machine)
    add_render_node(machine, 128)
    add_render_node(machine, 129)
    xpu = machine.look(ZE_AFFINITY_MASK=mask).xpu
    assert [device.index for device in xpu.devices] == indices


@pytest.mark.parametrize("output", ["", "[]", '{"device_list": [1]}', "table"])
def test_an_answer_that_cannot_be_read_is_no_device(machine, output: str) -> None:
    machine.prints("/usr/bin/xpu-smi", output)
    xpu = machine.look().xpu
    assert xpu.state is State.ABSENT
    assert "xpu-smi: unreadable answer" in xpu.how
