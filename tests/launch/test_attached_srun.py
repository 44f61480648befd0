"""One session over ranks that srun started: its variables, set on plain processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from attached_sessions import Process, World, free_port

HEAD = """
import os, signal, time
import pytest
import torch
import torch.distributed as dist

WHO = os.environ["WHO"]

def pytest_of_this_rank():
    return int(os.environ["PID_OF_PYTEST"])

def test_plain():
    with open(os.environ["FOLDER"] + "/plain.txt", "a") as file:
        file.write(WHO)

@pytest.mark.ranks(2)
def test_world(rank):
    t = torch.ones(1)
    dist.all_reduce(t)
    assert t.item() == 2
    assert rank.gather(int(WHO)) == [0, 1]
    assert (rank.local_rank, os.environ["GROUP_RANK"]) == (0, WHO)
"""
LOSSES = (
    HEAD
    + """
@pytest.mark.ranks(5)
def test_too_large(rank):
    pass

@pytest.mark.ranks(3)
def test_loses_2(rank):
    dist.barrier()
    if rank.index == 2:
        os.kill(pytest_of_this_rank(), signal.SIGKILL)
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))

@pytest.mark.ranks(2)
def test_with_those_left(rank):
    dist.barrier()

@pytest.mark.ranks(3)
def test_with_too_few(rank):
    dist.barrier()

@pytest.mark.ranks(2)
def test_terminated(rank):
    dist.barrier()
    if rank.index == 0:
        os.kill(pytest_of_this_rank(), signal.SIGTERM)
    time.sleep(1000)

@pytest.mark.ranks(2)
def test_never(rank):
    pass
"""
)
DIFFERENT = (
    HEAD
    + """
@pytest.mark.parametrize("who", [WHO])
@pytest.mark.ranks(2)
def test_mine(rank, who):
    pass
"""
)
ORPHANED = (
    HEAD
    + """
@pytest.mark.ranks(2)
def test_ends_rank_0(rank):
    dist.barrier()
    if rank.index == 0:
        os.kill(pytest_of_this_rank(), signal.SIGKILL)
    time.sleep(1000)
"""
)
CHOSEN = (
    HEAD.replace("def test_plain", "def unwanted_plain").replace("def test_world", "def unwanted")
    + """
@pytest.mark.ranks(2)
def test_unwanted(rank):
    pass

@pytest.mark.ranks(2)
def test_flaky(rank):
    mark = os.path.join(os.environ["FOLDER"], f"tried{rank.index}")
    tried = os.path.exists(mark)
    open(mark, "w").close()
    dist.barrier()
    assert tried or rank.index == 0

@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_kills_1(rank, faults):
    faults.kill(1, at="all_reduce#1")
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1))

@pytest.mark.ranks(2)
def test_fails(rank):
    assert rank.index < 0

@pytest.mark.ranks(2)
def test_zzz_never(rank):
    pass
"""
)
NO_RANKS = """
import os

def test_on_every_rank():
    assert os.environ["SLURM_PROCID"] == "1"
"""


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("srun"))
    try:
        yield made
    finally:
        made.end()


def test_a_world_of_two_nodes_passes_on_both(world: World) -> None:
    world.write(HEAD)
    processes = world.srun(size=2, nodes=2)
    assert [process.wait() for process in processes] == [0, 0], processes[0].output
    assert world.outcomes() == {"test_plain": "passed", "test_world": "passed"}
    assert (world.folder / "plain.txt").read_text() == "0"  # not on rank 1
    assert (
        processes[1].output
        == "ranks: attached to a world of 2 on 2 nodes, this is rank 1; rank 0 reports\n"
    )


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, list[Process]]]:
    made = World(tmp_path_factory.mktemp("losses"))
    made.write(LOSSES)
    try:
        processes = made.srun("--ranks-require=ranks", size=3, nodes=3)
        for process in processes:
            process.wait()
        yield made, processes
    finally:
        made.end()


def test_ranks_that_are_left_go_on(losses: tuple[World, list[Process]]) -> None:
    world, processes = losses
    assert world.outcomes() == {
        "test_plain": "passed",
        "test_world": "passed",
        "test_too_large": "failed",
        "test_loses_2": "failed",
        "test_with_those_left": "passed",
        "test_with_too_few": "failed",
        "test_terminated": "failed",
    }, processes[0].output
    assert [process.popen.returncode for process in processes] == [1, 1, -9]


def test_a_pytest_that_dies_is_named(losses: tuple[World, list[Process]]) -> None:
    world, processes = losses
    head = world.text("test_loses_2").splitlines()[0]
    ended = "its pytest on node host2 ended without a word"
    assert head.startswith("rank 2 of 3 failed first (ranks 0 and 1 were cut off in all_reduce")
    assert head.endswith(f": {ended}")
    lost = f"rank 2 (node host2): {ended}, during test_it.py::test_loses_2"
    assert world.text("test_with_too_few") == (
        f"the test needs 3 ranks, 2 of the world's 3 are left. Lost before: {lost}"
    )
    assert lost in processes[0].output.partition("ranks of the world")[2]


def test_what_the_world_is_too_small_for_fails_where_ranks_are_required(
    losses: tuple[World, list[Process]],
) -> None:
    world, _ = losses
    assert world.text("test_too_large") == (
        "needs 5 ranks, the world that srun started has 3, and --ranks-require was given"
    )


def test_a_rank_0_that_is_asked_to_end_still_reports(losses: tuple[World, list[Process]]) -> None:
    world, processes = losses
    text = "rank 0 was asked to end (SIGTERM), as srun does when a rank ended"
    assert f"!! {text} !!" in processes[0].output
    assert "2 failed, 3 passed, 2 errors" in processes[0].output
    assert "test_never" not in world.rows()
    terminated = world.text("test_terminated")
    assert "rank 0 was asked to end (SIGTERM) while the test ran" in terminated
    assert "in test_terminated (test_it.py:" in terminated


def test_what_differs_between_ranks_is_named_before_any_test(world: World) -> None:
    world.write(DIFFERENT)
    port = free_port()
    first = world.srun_rank(0, size=2, nodes=2, port=port)
    second = world.srun_rank(1, "--ranks-timeout=50", size=2, nodes=2, port=port)
    assert [first.wait(), second.wait()] == [1, 1], first.output
    said = first.output.partition("ranks of the world")[2]
    missing = "rank 1 (node host1) did not collect what rank 0 did: test_it.py::test_mine[0]"
    more = "rank 1 (node host1) collected what rank 0 did not: test_it.py::test_mine[1]"
    assert missing in said
    assert more in said
    assert "rank 1 (node host1) has settings 'ranks: timeout=50 (from --ranks-timeout)'" in said
    assert "rank 0 (node host0) has settings 'the defaults': make them the same" in said
    assert world.outcomes() == {}
    assert "the ranks of the world cannot start: see 'ranks of the world'" in first.output


def test_a_rank_that_does_not_come_is_named(world: World) -> None:
    world.write(HEAD)
    ports = [free_port(), free_port()]
    alone = [
        world.srun_rank(rank, "--ranks-join-timeout=2", size=3, nodes=3, port=ports[rank])
        for rank in (0, 1)
    ]
    assert [process.wait() for process in alone] == [1, 1], alone[0].output
    assert (
        "ranks 1 and 2 of 3 did not join within 2 s (--ranks-join-timeout): expected every rank "
        f"to collect the same tests and to reach 127.0.0.1 port {ports[0]}" in alone[0].output
    )
    assert (
        "ranks: rank 1 (node host1) ends: rank 0 could not be reached at 127.0.0.1 "
        f"port {ports[1]}: [Errno 111] Connection refused" in alone[1].output
    )
    assert world.outcomes() == {}


def test_the_others_end_when_rank_0_is_gone(world: World) -> None:
    world.write(ORPHANED)
    processes = world.srun(size=2, nodes=2)
    assert [process.wait() for process in processes] == [-9, 1], processes[0].output
    assert "ranks: rank 1 (node host1) ends: rank 0: its connection ended" in processes[1].output


def test_a_world_without_tests_on_ranks_is_left_alone(world: World) -> None:
    world.write(NO_RANKS)
    process = world.srun_rank(1, size=2, nodes=1, port=free_port())
    assert process.wait() == 0, process.output
    assert world.outcomes() == {"test_on_every_rank": "passed"}
    assert "attached" not in process.output


def test_only_rank_0_selects_orders_and_repeats(world: World) -> None:
    pytest.importorskip("pytest_rerunfailures")
    world.write(CHOSEN)
    arguments = ("-k", "test_", "-k", "not unwanted", "--reruns=1", "-x", "--ranks-report=r.json")
    processes = world.srun("-p", "rerunfailures", *arguments, size=2, nodes=1)
    assert [process.wait() for process in processes] == [1, 1], processes[0].output
    rows = world.rows()
    assert [row["outcome"] for row in rows["test_flaky"] if row["when"] == "call"] == [
        "rerun",
        "passed",
    ]
    assert set(rows) == {"test_flaky", "test_kills_1", "test_fails"}
    assert all(row["outcome"] == "passed" for row in rows["test_kills_1"])
    assert "1 failed, 2 passed, 1 deselected, 2 rerun" in processes[0].output
    assert processes[1].output.count("\n") == 1
    items = json.loads((world.folder / "r.json").read_text())["items"]
    assert {item["node_id"].partition("::")[2] for item in items} == set(rows)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--ranks-debug=1",),
            "ERROR: --ranks-debug=1: a debugger needs the terminal, which the ranks that srun "
            "started do not have; start pytest without srun",
        ),
        (
            ("-n", "2"),
            "ERROR: pytest-xdist's workers cannot be ranks of the world of 2 that srun started: "
            "expected no -n, no --dist and no --tx, also in addopts; add -n 0, or start pytest "
            "without a launcher",
        ),
        (
            ("--ranks-attach=sometimes",),
            "ERROR: --ranks-attach: found 'sometimes', expected auto, always or never; write for "
            "example --ranks-attach=never",
        ),
    ],
    ids=["debug", "xdist", "attach"],
)
def test_what_cannot_be_is_refused(world: World, arguments: tuple[str, ...], text: str) -> None:
    if "-n" in arguments:
        pytest.importorskip("xdist")
    world.write(HEAD)
    process = world.srun_rank(0, *arguments, size=2, nodes=1, port=free_port())
    assert process.wait() == 4
    assert text in process.output


def test_always_to_attach_needs_a_world(world: World) -> None:
    world.write(HEAD)
    process = world.start(sys.executable, "-m", "pytest", "--ranks-attach=always", WHO="0")
    assert process.wait() == 4
    assert (
        "ERROR: --ranks-attach=always: found no world to attach to, expected the variables that "
        "torchrun or srun set, with at least 2 ranks; start pytest with torchrun "
        "--nproc-per-node=2 -m pytest" in process.output
    )
