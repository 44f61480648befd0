"""Leases: exclusive among processes, all or none, gone with their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_ranks.errors import UnavailableError
from pytest_ranks.hardware.found import Device
from pytest_ranks.hardware.leases import Leases

GPUS = tuple(Device(index=index, uuid=f"GPU-{index}") for index in range(3))
HOLDER = """
import sys, time
from pathlib import Path
from pytest_ranks.hardware.found import Device
from pytest_ranks.hardware.leases import Leases
devices = [Device(index=int(n), uuid=f"GPU-{n}") for n in sys.argv[2].split(",")]
lease = Leases(Path(sys.argv[1])).acquire(
    "cuda", devices, len(devices), owner="test_other.py::test_x", timeout=0)
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def hold(tmp_path: Path):
    """Have another process lease devices: `hold("0,1")` returns it once it holds them."""
    started = []

    def start(numbers: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), numbers], stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def acquire(folder: Path, count: int, *, timeout: float = 0.0, waiting=None):
    return Leases(folder).acquire(
        "cuda", GPUS, count, owner="test_mine.py::test_y", timeout=timeout, waiting=waiting
    )


def test_a_lease_takes_the_first_free_devices_in_order(tmp_path, hold) -> None:
    hold("0")
    assert acquire(tmp_path, 2).devices == GPUS[1:]


def test_what_another_process_holds_is_refused_with_its_owner(tmp_path, hold) -> None:
    other = hold("1,2")
    with pytest.raises(UnavailableError) as caught:
        acquire(tmp_path, 2)
    assert str(caught.value) == (
        f"needs 2 CUDA devices, leased to others: 1 by process {other.pid}, "
        f"test_other.py::test_x; 2 by process {other.pid}, test_other.py::test_x; waited 0 s"
    )


def test_too_few_devices_hold_none_of_them(tmp_path, hold) -> None:
    hold("1,2")
    with pytest.raises(UnavailableError):
        acquire(tmp_path, 2)
    assert acquire(tmp_path, 1).devices == GPUS[:1]  # the one that is free was given back


def test_a_released_lease_is_free_again(tmp_path) -> None:
    lease = acquire(tmp_path, 3)
    with pytest.raises(UnavailableError):
        acquire(tmp_path, 1)
    lease.release()
    lease.release()
    assert acquire(tmp_path, 3).devices == GPUS


def test_a_killed_owner_holds_nothing(tmp_path, hold) -> None:
    other = hold("0,1,2")
    said: list[str] = []

    def kill_the_owner(text: str) -> None:
        said.append(text)
        os.kill(other.pid, signal.SIGKILL)

    lease = acquire(tmp_path, 3, timeout=60, waiting=kill_the_owner)
    assert lease.devices == GPUS
    assert len(said) == 1
    assert said[0].startswith("needs 3 CUDA devices, leased to others: 0 by process ")


def test_kinds_and_identities_do_not_meet(tmp_path) -> None:
    leases = Leases(tmp_path)
    first = leases.acquire("neuron", [Device(index=0)], 1, owner="a", timeout=0)
    second = leases.acquire("cuda", [Device(index=0)], 1, owner="b", timeout=0)
    third = leases.acquire("cuda", [Device(index=0, uuid="MIG-a/0/1")], 1, owner="c", timeout=0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "all.lock",
        "neuron-0.lock",
        "cuda-0.lock",
        "cuda-MIG-a_0_1.lock",
    }
    for lease in (first, second, third):
        lease.release()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path) -> None:
    (tmp_path / "cuda-GPU-0.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        acquire(tmp_path, 1)
    assert not (tmp_path / "elsewhere").exists()
