"""Ranks that wait for each other: what is said of them, how soon, and what is left alone."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")

WAITING = """
import threading, time
from datetime import timedelta
import pytest, torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2, timeout=120)


def step(size=4):
    dist.all_reduce(torch.ones(size))


def save_checkpoint():
    time.sleep(1000)


def test_another_operation(rank):
    step()
    if rank.index == 0:
        step()
    else:
        dist.broadcast(torch.ones(4), src=1)


def test_another_order(rank):
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    groups = [first, second] if rank.index == 0 else [second, first]
    for group in groups:
        dist.all_reduce(torch.ones(2), group=group)


def test_another_root(rank):
    dist.broadcast(torch.ones(4), src=rank.index)


@pytest.mark.ranks(3, timeout=3)
def test_one_never_comes(rank):
    if rank.index == 1:
        save_checkpoint()
    step()


def test_a_handle_is_waited_for(rank):
    if rank.index == 0:
        dist.all_reduce(torch.ones(3), async_op=True).wait()


def test_a_backward_pass_waits(rank):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    loss = model(torch.ones(1, 4)).sum()
    if rank.index == 0:
        loss.backward()


def test_both_receive(rank):
    dist.recv(torch.ones(3), src=1 - rank.index)


def test_one_makes_a_group(rank):
    if rank.index == 0:
        dist.new_group([0, 1])
    else:
        dist.barrier()


@pytest.mark.ranks(2, timeout=3)
def test_a_rank_that_does_not_let_go_of_the_interpreter(rank):
    if rank.index == 1:
        import ctypes
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the lock
    step()


def test_slow_in_python(rank):
    if rank.index == 1:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            sum(range(1000))
    step()


def test_slow_asleep(rank):
    if rank.index == 1:
        time.sleep(5)
    step()


def test_slow_and_finished(rank):
    if rank.index == 0:
        time.sleep(3)


def test_an_own_timeout_is_what_the_test_is_about(rank):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    if rank.index == 0:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(2), group=group)


def test_another_thread_answers(rank):
    groups = [dist.new_group([0, 1]) for _ in range(2)]

    def late():
        time.sleep(3)
        dist.all_reduce(torch.ones(2), group=groups[1])

    if rank.index == 1:
        thread = threading.Thread(target=late)
        thread.start()
        dist.all_reduce(torch.ones(2), group=groups[0])
        thread.join()
    else:
        dist.all_reduce(torch.ones(2), group=groups[1])
        dist.all_reduce(torch.ones(2), group=groups[0])


def test_no_thread_of_ours_is_seen(rank):
    names = {thread.name for thread in threading.enumerate()}
    assert names - {"pytest-ranks-drop"} == {"MainThread"}
"""
PLACE = r"\(test_waiting.py:\d+\)"


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_waiting.py": WAITING}, "-p", "no:randomly", "-p", "no:timeout")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "test_another_operation",
            [
                rf"deadlock: rank 0 was in all_reduce, called from step {PLACE}; "
                rf"rank 1 was in broadcast, called from test_another_operation {PLACE}",
                rf"the ranks called different collectives: "
                rf"rank 0 called all_reduce #2 of float32 \[4\], step {PLACE}; "
                rf"rank 1 called broadcast #2 of float32 \[4\], test_another_operation {PLACE}",
                rf"rank 0 waits in all_reduce #2 of float32 \[4\], step {PLACE}",
                rf"rank 1 waits in broadcast #2 of float32 \[4\], test_another_operation {PLACE}",
            ],
        ),
        (
            "test_another_root",
            [
                rf"deadlock: ranks 0 and 1 were in broadcast, called from test_another_root "
                rf"{PLACE}",
                rf"the ranks called a collective with different roots: rank 0 called "
                rf"broadcast #1 of float32 \[4\] with src=0, test_another_root {PLACE}; rank 1 "
                rf"called broadcast #1 of float32 \[4\] with src=1, test_another_root {PLACE}",
                rf"ranks 0 and 1 wait in broadcast #1 of float32 \[4\], "
                rf"test_another_root {PLACE}",
            ],
        ),
        (
            "test_one_never_comes",
            [
                rf"timed out after 3 s: ranks 0 and 2 were in all_reduce, called from step "
                rf"{PLACE}; rank 1 was in save_checkpoint {PLACE}",
                rf"ranks 0 and 2 wait in all_reduce #1 of float32 \[4\], step {PLACE}; "
                rf"rank 1 never issued it: it is in save_checkpoint {PLACE}",
            ],
        ),
        (
            "test_a_handle_is_waited_for",
            [
                rf"rank 0 was in test_a_handle_is_waited_for {PLACE}, waiting for rank 1 that "
                rf"had finished",
                rf"rank 0 waits in all_reduce #1 of float32 \[3\], test_a_handle_is_waited_for "
                rf"{PLACE}; rank 1 never issued it: it has finished",
            ],
        ),
        (
            "test_a_backward_pass_waits",
            [
                rf"rank 0 was in test_a_backward_pass_waits {PLACE}, waiting for rank 1 that "
                rf"had finished",
                rf"rank 0 waits in all_reduce #\d+ of float32 \[20\], "
                rf"test_a_backward_pass_waits {PLACE}; rank 1 never issued it: it has finished",
            ],
        ),
        (
            "test_both_receive",
            [
                rf"deadlock: ranks 0 and 1 were in recv, called from test_both_receive {PLACE}",
                rf"rank 0 waits in recv from rank 1 of float32 \[3\], test_both_receive {PLACE}",
                rf"rank 1 waits in recv from rank 0 of float32 \[3\], test_both_receive {PLACE}",
            ],
        ),
        (
            "test_one_makes_a_group",
            [
                rf"deadlock: rank 0 was in new_group, called from test_one_makes_a_group "
                rf"{PLACE}; rank 1 was in barrier, called from test_one_makes_a_group {PLACE}",
                rf"rank 0 waits in new_group, test_one_makes_a_group {PLACE}",
                rf"rank 1 waits in barrier #1, test_one_makes_a_group {PLACE}; "
                rf"rank 0 never issued it: it waits in new_group",
            ],
        ),
        (
            "test_a_rank_that_does_not_let_go_of_the_interpreter",
            [
                rf"timed out after 3 s: rank 0 was in all_reduce, called from step {PLACE}; "
                rf"rank 1 was in test_a_rank_that_does_not_let_go_of_the_interpreter {PLACE}",
                rf"rank 0 waits in all_reduce #1 of float32 \[4\], step {PLACE}",
                rf"rank 1 did not answer: its main thread holds the interpreter lock in "
                rf"test_a_rank_that_does_not_let_go_of_the_interpreter {PLACE}, or its process "
                rf"is stopped",
            ],
        ),
    ],
)
def test_the_report_says_who_waits_where(session, name, expected):
    row = session.call(name)
    assert row.outcome == "failed"
    lines = row.text.splitlines()
    for line, pattern in zip(lines, expected, strict=False):
        assert re.fullmatch(pattern, line), row.text
    assert len(lines) > len(expected)
    assert lines[len(expected)] in ("", lines[-1]), row.text


def test_ranks_that_take_groups_in_another_order_are_told_apart(session):
    lines = session.call("test_another_order").text.splitlines()
    assert lines[0].startswith("deadlock: ranks 0 and 1 were in all_reduce, called from")
    one, other = (
        rf"rank {rank} waits in all_reduce #1 of float32 \[2\] on group '{mine}' of ranks 0 and 1, "
        rf"test_another_order {PLACE}; rank {1 - rank} never issued it: it waits in all_reduce #1 "
        rf"of float32 \[2\] on group '{3 - mine}' of ranks 0 and 1"
        for rank, mine in ((0, 1), (1, 2))
    )
    assert re.fullmatch(one, lines[1]), lines[1]
    assert re.fullmatch(other, lines[2]), lines[2]


@pytest.mark.parametrize(
    "name",
    [
        "test_slow_in_python",
        "test_slow_asleep",
        "test_slow_and_finished",
        "test_an_own_timeout_is_what_the_test_is_about",
        "test_another_thread_answers",
        "test_no_thread_of_ours_is_seen",
    ],
)
def test_a_slow_but_healthy_test_is_left_alone(session, name):
    row = session.call(name)
    assert row.outcome == "passed", row.text
