"""Tests that leak, and tests that only seem to, for a session that fails the first kind."""

import os
import subprocess
import threading

import pytest
import torch

pytestmark = pytest.mark.ranks(2)


def test_leaks(rank):
    os.environ["A"] = "1"
    threading.Thread(target=threading.Event().wait, name="prefetch", daemon=True).start()


def test_leaks_on_one(rank):
    if rank.index == 1:
        os.chdir("/")


def test_leaks_unevenly(rank):
    os.environ["A"] = str(rank.index)
    torch.set_default_dtype(torch.float64)


@pytest.mark.xfail
def test_leaks_where_failure_is_expected(rank):
    os.environ["A"] = "1"
    raise ValueError


def test_fails_and_leaks(rank):
    os.environ["A"] = "1"
    raise ValueError("its own")


def test_undoes_what_it_does(rank, monkeypatch, tmp_path):
    monkeypatch.setenv("A", "1")
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=len, args=("x",))
    thread.start()
    subprocess.run(["true"], check=True)
    with torch.inference_mode(), torch.autocast("cpu"), (tmp_path / "x").open("w"):
        pass


def test_a_thread_that_is_about_to_end_is_none(rank):
    from concurrent.futures import ThreadPoolExecutor

    ThreadPoolExecutor(1).submit(len, "x").result()


def test_groups_end_with_the_test(rank):
    group = torch.distributed.new_group([0, 1])
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()


def test_a_loader_with_workers(rank):
    data = torch.utils.data.TensorDataset(torch.arange(4))
    loader = torch.utils.data.DataLoader(data, num_workers=1)
    assert len(list(loader)) == 4


def test_multiprocessing(rank):
    import multiprocessing
    from multiprocessing import shared_memory

    with multiprocessing.Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
    block = shared_memory.SharedMemory(create=True, size=10)
    block.close()
    block.unlink()


def test_tqdm(rank):
    tqdm = pytest.importorskip("tqdm")
    for _ in tqdm.tqdm(range(2)):
        pass


def test_accelerate(rank):
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.state.PartialState._shared_state == {}
    assert accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3).num_processes == 2


def test_accelerate_again(rank):
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.state.PartialState._shared_state == {}
    assert accelerate.state.GradientState().num_steps == 1


def compiled(x):
    return x + 1


@pytest.mark.parametrize("time", [1, 2])
def test_compile(rank, time):
    torch.compile(compiled, backend="eager")(torch.ones(1))
    assert torch._dynamo.convert_frame.FRAME_COUNTER == 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Changes one of each kind, and undoes it in the end."""
    os.environ["WIDE"] = "1"
    torch.set_default_dtype(torch.float64)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="wide")
    thread.start()
    child = subprocess.Popen(["sleep", "1002"])
    file = open(tmp_path_factory.mktemp("wide") / "x", "w")
    yield child
    assert os.environ.pop("WIDE") == "1"
    torch.set_default_dtype(torch.float32)
    stop.set()
    thread.join()
    child.kill()
    child.wait()
    file.close()


@pytest.mark.parametrize("time", [1, 2])
def test_with_a_wide_fixture(rank, wide, time):
    assert os.environ["WIDE"] == "1"
    assert torch.get_default_dtype() == torch.float64
    assert wide.poll() is None


def test_spoils_a_wide_fixture(rank, wide):
    os.environ["WIDE"] = "2"


def test_has_the_wide_fixture_anew(rank, wide):
    assert os.environ["WIDE"] == "1"


@pytest.fixture(scope="class")
def careless():
    os.environ["CARELESS"] = "1"
    child = subprocess.Popen(["sleep", "1003"])


class TestWithACarelessFixture:
    def test_first(self, rank, careless):
        pass

    def test_last(self, rank, careless):
        pass


@pytest.fixture(scope="module")
def outer():
    os.environ["BOTH"] = "outer"
    yield
    del os.environ["BOTH"]


@pytest.fixture(scope="class")
def inner(outer):
    os.environ["BOTH"] = "inner"
    yield
    os.environ["BOTH"] = "outer"


class TestWithTwo:
    def test_inner(self, rank, inner):
        assert os.environ["BOTH"] == "inner"


def test_outer(rank, outer):
    assert os.environ["BOTH"] == "outer"


def test_nothing_is_left(rank):
    assert {"A", "WIDE", "CARELESS", "BOTH"}.isdisjoint(os.environ)
