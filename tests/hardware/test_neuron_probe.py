from __future__ import annotations

import json

import pytest

from pytest_ranks.hardware.found import State

SYSFS = "/sys/devices/virtual/neuron_device"
PRODUCT = "/sys/devices/virtual/dmi/id/product_name"
NEURON_LS = "/opt/aws/neuron/bin/neuron-ls"


@pytest.fixture
def trn1(machine):
    """A trn1.32xlarge: 16 devices of 2 cores, software installed."""
    machine.modules.add("torch_neuronx")
    machine.file(PRODUCT, "trn1.32xlarge")
    devices = [{"neuron_device": n, "nc_count": 2, "memory_size": 34359738368} for n in range(16)]
    machine.prints(NEURON_LS, json.dumps(devices))
    return machine


def test_neuron_ls_counts_cores(trn1) -> None:
    neuron = trn1.look().neuron
    assert (neuron.state, neuron.count) == (State.USABLE, 32)
    assert neuron.how == "neuron-ls: 16 devices, 32 logical cores"


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "0-3"}, [0, 1, 2, 3]),
        ({"NEURON_RT_VISIBLE_CORES": "0,2-5"}, [0, 2, 3, 4, 5]),
        ({"NEURON_RT_VISIBLE_CORES": "31,32"}, [31]),
        ({"NEURON_RT_VISIBLE_CORES": "one"}, []),
        ({"NEURON_RT_NUM_CORES": "2"}, [0, 1]),
        ({"NEURON_RT_VISIBLE_CORES": "4-5", "NEURON_RT_NUM_CORES": "1"}, [4, 5]),
        ({"NEURON_RT_NUM_CORES": "0"}, list(range(32))),
    ],
)
def test_visibility_variables_hide_cores(trn1, environ, cores: list[int]) -> None:
    assert [core.index for core in trn1.look(**environ).neuron.devices] == cores


def test_a_visibility_variable_that_cannot_be_read_is_named(trn1) -> None:
    neuron = trn1.look(NEURON_RT_VISIBLE_CORES="one").neuron
    assert neuron.how.endswith("; NEURON_RT_VISIBLE_CORES='one' is no list such as '0,2-5'")


@pytest.mark.parametrize(("setting", "cores"), [({}, 64), ({"NEURON_LOGICAL_NC_CONFIG": "1"}, 128)])
def test_trainium2_groups_its_cores(machine, setting, cores: int) -> None:
    machine.modules.add("torch_neuronx")
    machine.file(PRODUCT, "trn2.48xlarge")
    machine.prints(NEURON_LS, json.dumps([{"nc_count": 8}] * 16))
    assert machine.look(**setting).neuron.count == cores


def test_an_answer_that_names_its_grouping_is_not_grouped_again(machine) -> None:
    machine.modules.add("torch_neuronx")
    machine.file(PRODUCT, "trn2.48xlarge")
    devices = [{"nc_count": 4, "logical_neuroncore_config": 2}] * 16
    machine.prints(NEURON_LS, json.dumps({"version": "2.33", "mlas": devices}))
    assert machine.look().neuron.count == 64


@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo '+--------+'", "echo '[]'", "echo '[{}]'", "echo '{}'", "echo '[1]'"],
)
def test_sysfs_answers_where_neuron_ls_does_not(trn1, script: str) -> None:
    trn1.program(NEURON_LS, script)
    trn1.file(f"{SYSFS}/neuron0/core_count", 2)
    trn1.file(f"{SYSFS}/neuron10/core_count", 2)
    neuron = trn1.look().neuron
    assert neuron.count == 4
    assert neuron.how == "sysfs: 2 devices, 4 logical cores"


def test_device_nodes_promise_one_core_each(machine) -> None:
    machine.modules.add("torch_neuronx")
    for name in ("neuron0", "neuron1", "neuron_monitor"):
        machine.file(f"/dev/{name}")
    neuron = machine.look().neuron
    assert neuron.count == 2
    assert neuron.how == "/dev: 2 devices, 2 logical cores"


def test_cores_without_software(trn1) -> None:
    trn1.modules.clear()
    neuron = trn1.look().neuron
    assert (neuron.state, neuron.count, neuron.present) == (State.WITHOUT_SOFTWARE, 0, 32)
    assert neuron.how.endswith("; torch_neuronx: not installed")


def test_software_without_cores(machine) -> None:
    machine.modules.add("torch_neuronx")
    assert machine.look().neuron.state is State.WITHOUT_DEVICE


def test_a_card_without_its_driver_is_mentioned(machine) -> None:
    machine.pci("0x1d0f", "0x088000")
    neuron = machine.look().neuron
    assert neuron.state is State.ABSENT
    assert neuron.how.endswith("PCI: 1 Amazon devices without driver")
