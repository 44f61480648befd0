from __future__ import annotations

import os

from pytest_ranks.hardware.found import State
from pytest_ranks.hardware.probes import probe


def test_processors_are_counted_in_order(machine) -> None:
    for name in ("cpu0", "cpu1", "cpu2", "cpu10", "cpufreq"):
        machine.file(f"/sys/devices/system/cpu/{name}/topology")
    cpu = machine.look().cpu
    assert [device.index for device in cpu.devices] == [0, 1, 2, 10]
    assert (cpu.state, cpu.how) == (State.USABLE, "sysfs: 4 processors")


def test_this_machines_processors_are_those_that_this_process_may_use() -> None:
    assert probe(environ={}).cpu.count == len(os.sched_getaffinity(0))


def test_a_machine_that_tells_nothing_has_nothing(machine) -> None:
    found = machine.look()
    assert {getattr(found, kind).state for kind in ("cuda", "rocm", "xpu", "neuron", "cpu")} == {
        State.ABSENT
    }
