"""One session over the ranks of a real torchrun, on one machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from attached_sessions import Process, World

TESTS = """
import os, signal, time
import pytest
import torch
import torch.distributed as dist

def test_plain(tmp_path):
    assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ

@pytest.mark.ranks(4)
def test_sum(rank, tmp_path):
    t = torch.ones(3) * rank.index
    dist.all_reduce(t)
    assert t.tolist() == [6.0, 6.0, 6.0]
    found = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE")]
    assert found == [str(rank.index), str(rank.index), "4", "1"]
    assert len(set(rank.gather(str(rank.shared_tmp_path)))) == 1
    assert len(set(rank.gather(str(tmp_path)))) == 4
    assert len(set(rank.gather(os.getppid()))) == 4  # each rank has a pytest of its own

@pytest.mark.ranks([1, 2, 8])
def test_sub_world(rank):
    assert dist.get_world_size() == rank.world_size < 8

@pytest.mark.ranks(dp=2, tp=2)
def test_mesh(rank):
    assert rank.mesh["tp"].size() == 2

seen = []

@pytest.fixture(scope="module")
def wide():
    seen.append("set up")
    yield os.getpid()

@pytest.mark.ranks(4)
@pytest.mark.parametrize("time", [1, 2])
def test_wide_fixture(rank, wide, time):
    dist.barrier()
    assert seen == ["set up"]

@pytest.mark.ranks(4)
@pytest.mark.xfail(strict=True)
def test_expected(rank):
    assert rank.index < 0

@pytest.mark.ranks(2)
def test_skipped(rank):
    pytest.skip("because")

@pytest.mark.ranks(4)
def test_fails_on_2(rank):
    print("hello from", rank.index)
    if rank.index == 2:
        raise ValueError("the cause")
    dist.barrier()

@pytest.mark.ranks(4)
def test_dies_on_3(rank):
    if rank.index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

@pytest.mark.ranks(4, timeout=3)
def test_hangs_on_1(rank):
    if rank.index == 1:
        time.sleep(1000)
    dist.barrier()

@pytest.mark.ranks(2)
def test_leaves_0_waiting(rank):
    if rank.index == 0:
        dist.all_reduce(torch.ones(1))

@pytest.mark.ranks(4)
def test_after_all_that(rank):
    dist.barrier()
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Process]]:
    world = World(tmp_path_factory.mktemp("torchrun"))
    world.write(TESTS)
    try:
        process = world.torchrun(
            *("--standalone", "--nproc-per-node=4"), arguments=("--junitxml=junit.xml",)
        )
        process.wait()
        yield world, process
    finally:
        world.end()


def test_rank_0_reports_every_test_once(session: tuple[World, Process]) -> None:
    world, process = session
    assert world.outcomes() == {
        "test_plain": "passed",
        "test_sum": "passed",
        "test_sub_world[ws=1]": "passed",
        "test_sub_world[ws=2]": "passed",
        "test_sub_world[ws=8]": "skipped",
        "test_mesh": "passed",
        "test_wide_fixture[1]": "passed",
        "test_wide_fixture[2]": "passed",
        "test_expected": "skipped",
        "test_skipped": "skipped",
        "test_fails_on_2": "failed",
        "test_dies_on_3": "failed",
        "test_hangs_on_1": "failed",
        "test_leaves_0_waiting": "failed",
        "test_after_all_that": "passed",
    }, process.output
    assert "4 failed, 8 passed, 2 skipped, 1 xfailed" in process.output
    junit = (world.folder / "junit.xml").read_text()
    assert 'tests="15"' in junit


def test_every_rank_says_where_it_is_and_exits_alike(session: tuple[World, Process]) -> None:
    _, process = session
    place = "ranks: attached to a world of 4 on 1 node, this is rank"
    assert f"{place} 0 (from torchrun)" in process.output
    for rank in (1, 2, 3):
        assert f"{place} {rank}; rank 0 reports" in process.output
    assert process.output.count("test session starts") == 1
    # torchrun ends the others when the first has failed, and tells how each exited
    codes = re.findall(r"^  exitcode  : (\S+)", process.output, re.MULTILINE)
    assert codes == ["1", "1", "1", "1"]
    assert process.popen.returncode == 1


def test_what_the_world_is_too_small_for_is_skipped_with_the_reason(
    session: tuple[World, Process],
) -> None:
    world, process = session
    row = next(row for row in world.rows()["test_sub_world[ws=8]"] if row["outcome"] == "skipped")
    assert "needs 8 ranks, the world that torchrun started has 4" in row["text"]
    assert re.search(r"ranks ws=8 +1 +0 +1  needs 8 ranks, the world", process.output)


def test_failures_name_the_rank_that_is_the_cause(session: tuple[World, Process]) -> None:
    world, _ = session
    failed = world.text("test_fails_on_2")
    assert failed.startswith("rank 2 of 4 failed first (ranks 0, 1 and 3 were cut off in barrier")
    assert "ValueError: the cause" in failed
    row = next(row for row in world.rows()["test_fails_on_2"] if row["when"] == "call")
    written = [text for name, text in row["sections"] if "(rank 2)" in name]
    assert "hello from 2\n" in "".join(written)
    died = world.text("test_dies_on_3")
    assert re.match(r"rank 3 of 4 failed first \(.*\): died of SIGKILL without a report", died)
    hangs = world.text("test_hangs_on_1")
    assert hangs.startswith("timed out after 3 s: ")
    assert "rank 1 was in test_hangs_on_1" in hangs
    assert "ranks 0, 2 and 3 were in barrier" in hangs
    left = world.text("test_leaves_0_waiting")
    assert left.startswith("rank 0 was in all_reduce")
    assert "waiting for rank 1 that had finished" in left


def test_nothing_is_left_behind(session: tuple[World, Process]) -> None:
    world, _ = session
    mine = f"FOLDER={world.folder}".encode()
    left = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mine in file.read().split(b"\0"):
                    left.append(pid)
        except OSError:
            continue
    assert left == []
