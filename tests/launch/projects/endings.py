"""What a test on a rank may do that is neither a pass nor a plain exception."""

import asyncio
import gc
import os
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2)


def wait_for_all():
    dist.all_reduce(torch.ones(1))


# ---- how pytest is told


def test_fail(rank):
    if rank.index == 1:
        pytest.fail("said so")
    wait_for_all()


def test_did_not_raise(rank):
    if rank.index == 1:
        with pytest.raises(ValueError):
            pass
    wait_for_all()


def test_importorskip(rank):
    if rank.index == 1:
        pytest.importorskip("no_such_module_anywhere")


@pytest.fixture
def skips(rank):
    if rank.index == 1:
        pytest.skip("not here")


def test_skip_in_a_fixture(skips):
    pass


@pytest.mark.skipif("os.environ.get('RANK') == '1'", reason="not on rank 1")
def test_skipif_by_rank(rank):
    pass


@pytest.fixture
def xfails(rank):
    if rank.index == 1:
        pytest.xfail("not here")


def test_xfail_in_a_fixture(xfails):
    pass


@pytest.mark.xfail(raises=ValueError)
def test_xfail_raises(rank):
    raise ValueError


@pytest.mark.xfail(raises=ValueError)
def test_xfail_raises_another(rank):
    raise ValueError if rank.index == 0 else KeyError("other")


@pytest.mark.xfail
def test_xfail_with_peers_cut_off(rank):
    if rank.index == 1:
        raise ValueError
    wait_for_all()


@pytest.mark.xfail(raises=ValueError)
def test_xfail_raises_with_peers_cut_off(rank):
    if rank.index == 1:
        raise ValueError
    wait_for_all()


@pytest.mark.xfail
def test_xfail_does_not_expect_a_death(rank):
    if rank.index == 1:
        os._exit(9)


@pytest.mark.xfail(run=False)
def test_xfail_not_run(rank):
    os._exit(4)


@pytest.mark.xfail("os.environ.get('RANK') == '0'", strict=True, reason="")
def test_strict_by_rank(rank):
    pass


# ---- ways out


def test_sys_exit_0(rank):
    if rank.index == 1:
        sys.exit(0)


def test_sys_exit_3(rank):
    if rank.index == 1:
        sys.exit(3)
    wait_for_all()


def test_os_exit_0(rank):
    if rank.index == 1:
        os._exit(0)


def test_os_exit_in_a_thread(rank):
    if rank.index == 1:
        threading.Thread(target=os._exit, args=(5,)).start()
        time.sleep(1000)
    wait_for_all()


@pytest.fixture
def exits(rank):
    if rank.index == 1:
        raise SystemExit(0)


def test_exit_in_a_fixture(exits):
    pass


@pytest.fixture
def exits_after(rank):
    yield
    if rank.index == 1:
        raise SystemExit(0)


def test_exit_in_teardown(exits_after):
    pass


def test_keyboard_interrupt(rank):
    if rank.index == 1:
        raise KeyboardInterrupt
    wait_for_all()


def test_generator_exit(rank):
    if rank.index == 1:
        raise GeneratorExit


def test_cancelled(rank):
    if rank.index == 1:
        raise asyncio.CancelledError("gone")


# ---- exceptions that are hard to report


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def test_unpicklable(rank):
    if rank.index == 1:
        raise Unpicklable(1, 2)


class BadStr(Exception):
    def __str__(self):
        raise RuntimeError("no str")


def test_bad_str(rank):
    if rank.index == 1:
        raise BadStr


class WorseStr(BaseException):
    def __str__(self):
        raise SystemExit(4)

    __repr__ = __str__


def test_worse_str(rank):
    if rank.index == 1:
        raise WorseStr


class BadStrInterrupt(KeyboardInterrupt):
    def __str__(self):
        raise SystemExit(4)

    __repr__ = __str__


def test_bad_str_of_an_interrupt(rank):
    if rank.index == 1:
        raise BadStrInterrupt


class BadValue:
    def __repr__(self):
        raise RuntimeError("no repr")


def test_bad_repr_of_a_value(rank):
    if rank.index == 1:
        value = BadValue()
        assert value == 3


def recurse(number):
    return recurse(number + 1)


def test_recursion(rank):
    if rank.index == 1:
        recurse(0)


def test_group(rank):
    if rank.index == 1:
        raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])


def test_base_group(rank):
    if rank.index == 1:
        raise BaseExceptionGroup("several", [KeyboardInterrupt("one"), KeyError("two")])


def test_surrogates(rank):
    if rank.index == 1:
        raise ValueError("a \udcff surrogate")


def test_bytes_that_are_no_text(rank):
    os.write(1, b"\xff caf\xe9\n")
    if rank.index == 1:
        os._exit(3)


def test_ten_megabytes(rank):
    if rank.index == 1:
        pytest.fail("x" * 10_000_000)


def test_chained(rank):
    if rank.index == 1:
        raise ValueError("root")
    try:
        wait_for_all()
    except RuntimeError as error:
        raise KeyError("my trainer failed") from error


# ---- what pytest finds beside the test


@pytest.mark.filterwarnings("error")
def test_exception_in_a_thread(rank):
    if rank.index == 1:
        thread = threading.Thread(target=lambda: 1 / 0, name="worker")
        thread.start()
        thread.join()


class Del:
    def __del__(self):
        raise ValueError("in del")


@pytest.mark.filterwarnings("error")
def test_unraisable(rank):
    if rank.index == 1:
        Del()
        gc.collect()


@pytest.mark.filterwarnings("error")
def test_warning(rank):
    if rank.index == 1:
        warnings.warn("careful")


# ---- more than one phase


@pytest.fixture
def told(rank):
    path = rank.shared_tmp_path / "told"
    yield path
    if rank.index == 0:
        path.touch()


@pytest.fixture
def setup_here_teardown_there(rank, told):
    if rank.index == 0:
        raise RuntimeError("in setup")
    yield
    while not told.exists():
        time.sleep(0.01)
    raise RuntimeError("in teardown")


def test_setup_and_teardown(setup_here_teardown_there):
    pass


@pytest.fixture
def bad_end(rank):
    yield
    if rank.index == 1:
        raise RuntimeError("in teardown")


def test_call_and_teardown(bad_end, rank):
    if rank.index == 1:
        raise ValueError("in call")


# ---- collectives at the end


def test_alone_in_a_collective(rank):
    if rank.index == 1:
        wait_for_all()


def test_unawaited_on_one(rank):
    if rank.index == 1:
        dist.all_reduce(torch.ones(3), async_op=True)


def test_unawaited_in_a_subgroup(rank):
    group = dist.new_group([0, 1])
    if rank.index == 1:
        dist.all_reduce(torch.ones(3), group=group, async_op=True)


@pytest.mark.ranks(3)
def test_unawaited_on_two(rank):
    if rank.index != 1:
        dist.broadcast(torch.ones(3), 0, async_op=True)


def test_unawaited_on_all(rank):
    dist.all_reduce(torch.ones(3), async_op=True)


@pytest.mark.ranks(3)
def test_messages_between_two(rank):
    if rank.index == 0:
        dist.send(torch.ones(1), 1)
    elif rank.index == 1:
        dist.recv(torch.ones(1), 0)


def test_last(rank):
    wait_for_all()
