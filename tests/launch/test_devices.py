"""Devices of a run on machines laid out in folders: leased, shown, and seen to be given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.fake_gpus import lay_out_gpus
from pytest_ranks.errors import UnavailableError
from pytest_ranks.hardware.leases import Leases
from pytest_ranks.hardware.machine import Machine
from pytest_ranks.hardware.probes import probe
from pytest_ranks.launch.devices import DeviceDesk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with four GPUs, whose nvidia-smi says who holds memory from a file."""
    folder = tmp_path / "machine"
    folder.mkdir()
    lay_out_gpus(folder, program=folder / "usr" / "bin" / "nvidia-smi")
    return folder


def desk(root: Path, **environ: str) -> DeviceDesk:
    environment = {"PATH": "/usr/bin:/bin", **environ}
    machine = Machine(root, environ=environment)
    return DeviceDesk(
        lambda: probe(root, environ=environment),
        machine=machine,
        leases=Leases(root / "leases"),
    )


def test_two_runs_never_share_a_device(root: Path) -> None:
    first = desk(root).check_out("nccl", 2, owner="test_a", timeout=0)
    second = desk(root).check_out("nccl", 2, owner="test_b", timeout=0)
    assert first.variables(0) == first.variables(1) == {"CUDA_VISIBLE_DEVICES": "GPU-00,GPU-11"}
    assert second.variables(0) == {"CUDA_VISIBLE_DEVICES": "GPU-22,GPU-33"}
    with pytest.raises(UnavailableError, match=r"leased to others: 0 by process \d+, test_a; "):
        desk(root).check_out("nccl", 1, owner="test_c", timeout=0)
    assert desk(root).check_in(first) is None
    third = desk(root).check_out("nccl", 1, owner="test_c", timeout=0)
    assert third.variables(0) == {"CUDA_VISIBLE_DEVICES": "GPU-00"}


def test_devices_come_from_inside_the_callers_own_choice(root: Path) -> None:
    devices = desk(root, CUDA_VISIBLE_DEVICES="3,1").check_out("nccl", 1, owner="test_a", timeout=0)
    assert devices.variables(0) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert devices.torch_name(0) == "cuda:0"
    with pytest.raises(UnavailableError, match="needs 3 CUDA devices, found 2"):
        desk(root, CUDA_VISIBLE_DEVICES="3,1").check_out("nccl", 3, owner="test_b", timeout=0)


def test_memory_that_stays_is_told_with_who_holds_it(root: Path) -> None:
    (root / "holders").write_text("GPU-00, 11, 5\n")  # was there before
    devices = desk(root).check_out("nccl", 1, owner="test_a", timeout=0)
    (root / "holders").write_text("GPU-00, 11, 5\nGPU-00, 4711, 300\nGPU-33, 12, 7\n")
    assert desk(root).check_in(devices, timeout=0) == (
        "CUDA memory was not given back within 0 s: process 4711 holds 300 MiB of device 0"
    )
    desk(root).check_out("nccl", 4, owner="test_b", timeout=0)  # the lease ended all the same


def test_a_lease_outlives_no_process(root: Path) -> None:
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]);"
        "from pathlib import Path; from launch.test_devices import desk;"
        "desk(Path(sys.argv[2])).check_out('nccl', 4, owner='gone', timeout=0); os._exit(9)"
    )
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program, tests, str(root)], check=False)
    assert done.returncode == 9
    assert desk(root).check_out("nccl", 4, owner="test_a", timeout=0).torch_name(3) == "cuda:3"
