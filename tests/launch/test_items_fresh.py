"""Ranks in fresh processes: where a fork is not safe, and where they have devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.fake_gpus import lay_out_gpus
from pytest_ranks.errors import RankFailure, UnavailableError
from pytest_ranks.launch.host import RankHost

pytest.importorskip("torch")

THREADED = """
import threading

# as a client of a metrics or a cloud service starts one when it is imported
threading.Thread(target=threading.Event().wait, daemon=True, name="of the conftest").start()
"""
FILE = """
import os, signal, sys, threading
import pytest, torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def wide():
    return {"uses": 0}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("turn", [1, 2])
def test_sum(turn, rank, wide, record_property, tmp_path):
    wide["uses"] += 1
    assert wide["uses"] == turn
    total = torch.ones(1)
    dist.all_reduce(total)
    record_property("total", total.item())
    names = [thread.name for thread in threading.enumerate()]
    assert "of the conftest" in names  # a fork would have lost it
    left = [1, 2]
    assert left == [1, 2]


@pytest.mark.ranks(2)
def test_explains(rank):
    print("said by", rank.index)
    found = [rank.index, 2]
    assert found == [0, 2]


@pytest.mark.ranks(2)
def test_dies(rank):
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


@pytest.mark.ranks(2)
def test_after(rank):
    dist.barrier()


@pytest.mark.ranks(2)
def test_family(rank):
    from pytest_ranks.launch.processes import children

    assert children(os.getpid()) == []
    assert [pid for child in children(os.getppid()) for pid in children(child)] == []
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session(
        {"test_it.py": FILE, "threaded.py": THREADED},
        *("-p", "threaded", "-p", "no:randomly", "-p", "no:rerunfailures"),
        env={"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
    )


def test_ranks_start_afresh_where_the_zygote_has_threads(session) -> None:
    assert session.call("test_sum[1]").outcome == "passed", session.output
    assert session.call("test_sum[2]").outcome == "passed"
    assert dict(session.call("test_sum[1]").properties)["total"] == 2.0
    assert session.call("test_after").outcome == "passed"


def test_neither_the_zygote_nor_a_fresh_rank_starts_a_zygote_of_its_own(session) -> None:
    assert session.call("test_family").outcome == "passed", session.output


def test_a_fresh_rank_rewrites_assertions_and_captures_output(session) -> None:
    row = session.call("test_explains")
    assert "assert [1, 2] == [0, 2]" in row.text
    assert dict(row.sections)["Captured stdout call (rank 0)"] == "said by 0\n"


def test_a_death_says_how_the_ranks_were_started(session) -> None:
    text = session.call("test_dies").text
    assert "rank 1 of 2 failed first" in text.splitlines()[0], text
    assert "died of SIGSEGV" in text
    assert (
        "note: each rank was started afresh, because the process that they are forked from had"
        in text
    )


# ---- devices


def what_a_rank_sees() -> tuple[str | None, int, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getppid(), os.environ.get("LOCAL_RANK")


def hold_memory(holders: str) -> None:
    Path(holders).write_text("GPU-33, 4711, 300\n")


@pytest.fixture
def gpus(tmp_path, monkeypatch) -> Path:
    """Have nvidia-smi tell of four GPUs; returns the file in which it finds who holds memory."""
    program = tmp_path / "bin" / "nvidia-smi"
    holders = lay_out_gpus(tmp_path, program=program)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the leases lie
    monkeypatch.setattr("tempfile.tempdir", None)
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a driver is here, which tells of its own devices")
    return holders


def test_ranks_with_devices_see_what_was_leased_alone(gpus) -> None:
    with RankHost(preload=("torch",)) as host:
        seen = host.run(what_a_rank_sees, world_size=2, backend="nccl", init=False)
        assert [(devices, rank) for devices, _, rank in seen] == [("3,1", "0"), ("3,1", "1")]
        parents = {parent for _, parent, _ in seen}
        assert len(parents) == 1  # the zygote, which ends what they leave behind
        again = host.run(what_a_rank_sees, world_size=1, backend="nccl", init=False)
        assert again[0][0] == "3"  # given back


def what_a_rank_of_another_vendor_sees() -> tuple[str, str]:
    names = ("HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "NEURON_RT_VISIBLE_CORES")
    ((name, value),) = [(name, os.environ[name]) for name in names if name in os.environ]
    return name, value


CARDS = '{"card0": {"Card Series": "MI300X"}, "card1": {"Card Series": "MI300X"}}'
INTEL = '{"device_list": [{"device_name": "Max 1550"}, {"device_name": "Max 1550"}]}'
CORES = '[{"neuron_device": 0, "nc_count": 2, "neuroncore_ids": [0, 1], "neuron_processes": []}]'


@pytest.mark.parametrize(
    ("backend", "tool", "says", "seen"),
    [
        ("nccl", "rocm-smi", CARDS, [("HIP_VISIBLE_DEVICES", "0,1")] * 2),
        ("xccl", "xpu-smi", INTEL, [("ZE_AFFINITY_MASK", "0,1")] * 2),
        (
            "neuron",
            "neuron-ls",
            CORES,
            [("NEURON_RT_VISIBLE_CORES", "0"), ("NEURON_RT_VISIBLE_CORES", "1")],
        ),
    ],
)
def test_ranks_of_other_vendors_see_their_own_devices(
    tmp_path, monkeypatch, backend, tool, says, seen
) -> None:
    (tmp_path / tool).write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    (tmp_path / tool).chmod(0o755)
    (tmp_path / "torch_neuronx").mkdir()
    (tmp_path / "torch_neuronx" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("CUDA_VISIBLE_DEVICES", *(variable for variable, _ in seen)):
        monkeypatch.delenv(name, raising=False)
    if any(Path(node).exists() for node in ("/dev/kfd", "/dev/nvidiactl", "/dev/neuron0")):
        pytest.skip("a driver is here, which tells of its own devices")
    with RankHost(preload=("torch",)) as host:
        found = host.run(
            what_a_rank_of_another_vendor_sees, world_size=2, backend=backend, init=False
        )
    assert found == seen


def test_too_few_devices_are_named(gpus) -> None:
    with RankHost(preload=("torch",)) as host, pytest.raises(UnavailableError) as caught:
        host.run(what_a_rank_sees, world_size=4, backend="nccl", init=False)
    assert str(caught.value).startswith("needs 4 CUDA devices, found 3 (")


def test_memory_that_stays_is_warned_of(gpus, monkeypatch) -> None:
    monkeypatch.setattr("pytest_ranks.hardware.holders.SETTLE_SECONDS", 0.0)
    with (
        RankHost(preload=("torch",)) as host,
        pytest.warns(ResourceWarning, match=r"process 4711 holds 300 MiB of device 3"),
    ):
        host.run(hold_memory, world_size=1, backend="nccl", init=False, args=(str(gpus),))


def test_a_fresh_rank_that_fails_is_a_failure(gpus) -> None:
    with RankHost(preload=("torch",)) as host, pytest.raises(RankFailure, match="ZeroDivision"):
        host.run(divmod, world_size=1, backend="nccl", init=False, args=(1, 0))


ITEMS_WITH_DEVICES = """
import os
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2, backend="nccl", init=False)


def test_first(rank, record_property):
    assert not dist.is_initialized()
    assert str(rank.device) == f"cuda:{rank.index}"
    record_property("sees", os.environ["CUDA_VISIBLE_DEVICES"])
    record_property("pid", os.getpid())


def test_second(rank, record_property):
    record_property("sees", os.environ["CUDA_VISIBLE_DEVICES"])
    record_property("pid", os.getpid())


def test_third(rank, record_property):
    record_property("sees", os.environ["CUDA_VISIBLE_DEVICES"])
    open(os.environ["HOLDERS"], "w").write("GPU-33, 4711, 300\\n")


@pytest.mark.ranks(4, backend="nccl", init=False)
def test_more_than_there_are(rank):
    pass
"""
SETTLE_AT_ONCE = """
import pytest_ranks.hardware.holders as holders
holders.SETTLE_SECONDS = 0.0
"""


def test_items_get_devices_of_their_own(gpus, run_session) -> None:
    session = run_session(
        {"test_it.py": ITEMS_WITH_DEVICES, "at_once.py": SETTLE_AT_ONCE},
        *("-p", "at_once", "-p", "no:randomly", "-p", "no:rerunfailures"),
        env={
            "HOLDERS": str(gpus),
            "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")]),
        },
    )
    rows = {name: session.call(name) for name in ("test_first", "test_second", "test_third")}
    assert {row.outcome for row in rows.values()} == {"passed"}, session.output
    seen = [dict(row.properties)["sees"] for row in rows.values()]
    assert seen == ["3,1"] * 3
    pids = [dict(rows[name].properties)["pid"] for name in ("test_first", "test_second")]
    assert pids[0] != pids[1]  # a process that has used a device serves no other test
    assert "process 4711 holds 300 MiB of device 3" in session.output
    skipped = session.call("test_more_than_there_are")
    assert skipped.outcome == "skipped"
    assert "backend 'nccl': needs 4 CUDA or ROCm devices, found 3" in skipped.text


ENDS_THE_ZYGOTE = """
import os, signal, time
import pytest

pytestmark = pytest.mark.ranks(2, backend="nccl", init=False)


def test_first(rank):
    if rank.index == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


def test_second(rank, record_property):
    record_property("sees", os.environ["CUDA_VISIBLE_DEVICES"])
"""


def test_devices_are_given_back_where_the_zygote_dies(gpus, run_session) -> None:
    session = run_session(
        {"test_it.py": ENDS_THE_ZYGOTE}, "-p", "no:randomly", "-p", "no:rerunfailures"
    )
    assert "died of SIGKILL" in session.call("test_first").text
    second = session.call("test_second")
    assert second.outcome == "passed", session.output
    assert dict(second.properties)["sees"] == "3,1"
