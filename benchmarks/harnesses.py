"""The same trivial test, an all_reduce over N gloo ranks, in other people's harnesses: a pytest file.

    HARNESS=spawn RANKS=2 TESTS=5 pytest benchmarks/harnesses.py

`benchmarks/launch.py` runs it once for each harness, in a pytest of its own, and times its items as it
times ours. What is not installed is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = os.environ.get("HARNESS", "")
RANKS = int(os.environ.get("RANKS", "2"))
TESTS = int(os.environ.get("TESTS", "2"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def all_reduce() -> None:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()


def one_rank(rank: int, port: int) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    all_reduce()
    dist.destroy_process_group()


def spawn() -> None:
    """torch.multiprocessing.spawn for each test."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(one_rank, args=(free_port(),), nprocs=RANKS)


def torchrun() -> None:
    """torchrun for each test."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(
            "import torch, torch.distributed as dist\n"
            "dist.init_process_group('gloo')\n"
            "total = torch.ones(1)\ndist.all_reduce(total)\nassert total == dist.get_world_size()\n"
            "dist.destroy_process_group()\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={RANKS}", str(script)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pool_rank(arguments: tuple[int, int]) -> None:
    """Do on a process of a pool what one rank of a test does, in a group made by the first."""
    import torch.distributed as dist

    rank, port = arguments
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    all_reduce()


_kept: list[tuple[Any, int]] = []


def pool(*, keeps: bool) -> None:
    """A multiprocessing.Pool of spawned processes, made for each test, or kept with its group.

    The shape of the base class that many libraries copy; without that one's fixed sleep.
    """
    import multiprocessing

    if not _kept:
        _kept.append((multiprocessing.get_context("spawn").Pool(RANKS), free_port()))
    processes, port = _kept[0]
    processes.map_async(pool_rank, [(rank, port) for rank in range(RANKS)], chunksize=1).get(120)
    if not keeps:
        teardown_module()


def teardown_module() -> None:
    while _kept:
        processes, _ = _kept.pop()
        processes.terminate()
        processes.join()


def debug_launcher() -> None:
    """accelerate.debug_launcher, which forks the ranks, for each test."""
    import accelerate

    with contextlib.redirect_stdout(None):
        accelerate.debug_launcher(accelerated, num_processes=RANKS)


def accelerated() -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    all_reduce()


def make_case(kind: str) -> type[unittest.TestCase]:
    """Return one of torch's own test classes with as many equal test methods as asked for."""
    from torch.testing._internal import common_distributed

    base = getattr(common_distributed, kind)

    def body(self: Any) -> None:
        if kind == "MultiProcessTestCase":
            import torch.distributed as dist

            store = dist.FileStore(self.file_name, RANKS)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=RANKS)
        all_reduce()

    def set_up(self: Any) -> None:
        base.setUp(self)
        starts = {
            "MultiProcessTestCase": "_spawn_processes",
            "MultiThreadedTestCase": "_spawn_threads",
        }
        if kind in starts:
            getattr(self, starts[kind])()

    members: dict[str, object] = {f"test_{number:04}": body for number in range(TESTS)}
    members |= {"setUp": set_up, "__module__": __name__, "__qualname__": kind}
    if kind == "MultiProcContinuousTest":
        members |= {"world_size": RANKS, "device_type": "cpu"}
        members["backend_str"] = classmethod(lambda _: "gloo")
    else:
        members["world_size"] = property(lambda _: RANKS)
    return type(kind, (base,), members)


FUNCTIONS: dict[str, Callable[[], None]] = {
    "spawn": spawn,
    "torchrun": torchrun,
    "pool": lambda: pool(keeps=False),
    "pool kept": lambda: pool(keeps=True),
    "debug_launcher": debug_launcher,
}
CLASSES = ("MultiProcessTestCase", "MultiProcContinuousTest", "MultiThreadedTestCase")

if NAME in CLASSES:  # in the processes that it spawns too
    try:
        globals()[NAME] = make_case(NAME)
    except ImportError as error:
        import pytest

        pytest.skip(f"{NAME} needs what is not installed: {error}", allow_module_level=True)
elif NAME and "pytest" in sys.modules:  # not in the processes that it spawns
    import pytest

    if NAME == "debug_launcher":
        pytest.importorskip("accelerate")

    @pytest.mark.parametrize("number", range(TESTS))
    def test_all_reduce(number: int) -> None:  # noqa: ARG001 - one test a number
        FUNCTIONS[NAME]()
