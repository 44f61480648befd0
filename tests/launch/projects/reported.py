"""One test of each kind that a report tells apart."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2)


def wait_for_all():
    dist.all_reduce(torch.ones(1))


@pytest.mark.ranks(dp=1, tp=2)
def test_passes(rank, record_property):
    record_property("answer", 42)
    print("said by", rank.index)


def test_fails(rank):
    print("printed by", rank.index)
    if rank.index == 1:
        raise ValueError("boom")
    wait_for_all()


def test_dies(rank):
    print("last words of", rank.index)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()


@pytest.mark.ranks(3)
def test_all_fail_alike(rank):
    rank.barrier()
    assert 1 == 2


@pytest.mark.skip(reason="not today")
def test_skipped_by_mark(rank):
    pass


def test_skips(rank):
    pytest.skip("in the body")


@pytest.fixture
def slow(rank):
    time.sleep(0.2 * rank.index)
    yield
    time.sleep(0.4 * rank.index)


def test_slow(rank, slow):
    time.sleep(0.3 * (1 - rank.index))


@pytest.fixture
def bad_end(rank):
    yield
    assert rank.index == 0


def test_bad_end(bad_end):
    pass


@pytest.mark.ranks(2, timeout=1)
def test_hangs(rank):
    if rank.index == 1:
        time.sleep(1000)
    wait_for_all()
