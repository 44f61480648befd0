"""The same trivial test, an all_reduce over N gloo ranks, in other people's harnesses.

    python benchmarks/harnesses.py NAME RANKS TESTS

prints a JSON list: the seconds of each test. Each harness gets a process of its own, as it has in a
real session; `benchmarks/launch.py` starts them in turn. What is not installed is said on stderr,
with exit status 3.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path

MISSING = 3  # exit status: the harness is not installed
CASE = "BENCHMARK_CASE"  # which test class a spawned process has to have


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def all_reduce() -> None:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()


def one_rank(rank: int, world_size: int, port: int) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    all_reduce()
    dist.destroy_process_group()


def spawn(ranks: int, tests: int) -> list[float]:
    """torch.multiprocessing.spawn for each test."""
    import torch.multiprocessing

    def run() -> None:
        torch.multiprocessing.spawn(one_rank, args=(ranks, free_port()), nprocs=ranks)

    return [timed(run) for _ in range(tests)]


def torchrun(ranks: int, tests: int) -> list[float]:
    """torchrun for each test."""
    script = Path(tempfile.mkdtemp(), "script.py")
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1)\ndist.all_reduce(total)\nassert total == dist.get_world_size()\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(script)]

    def run() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return [timed(run) for _ in range(tests)]


def make_case(kind: str, ranks: int, tests: int) -> type[unittest.TestCase]:
    """Return one of torch's own test classes with so many equal test methods."""
    from torch.testing._internal import common_distributed

    base = getattr(common_distributed, kind)

    def body(self: unittest.TestCase) -> None:
        if kind == "MultiProcessTestCase":
            import torch.distributed as dist

            store = dist.FileStore(self.file_name, ranks)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=ranks)
        all_reduce()

    def set_up(self: unittest.TestCase) -> None:
        base.setUp(self)
        starts = {
            "MultiProcessTestCase": "_spawn_processes",
            "MultiThreadedTestCase": "_spawn_threads",
        }
        if kind in starts:
            getattr(self, starts[kind])()

    members: dict[str, object] = {f"test_{number:04}": body for number in range(tests)}
    members |= {"setUp": set_up, "__module__": __name__, "__qualname__": kind}
    if kind == "MultiProcContinuousTest":
        members |= {"world_size": ranks, "device_type": "cpu"}
        members["backend_str"] = classmethod(lambda _: "gloo")
    else:
        members["world_size"] = property(lambda _: ranks)
    return type(kind, (base,), members)


def run_class(ranks: int, tests: int, kind: str) -> list[float]:
    """One of torch's own test classes, a method a test, as unittest runs them."""
    os.environ[CASE] = f"{kind} {ranks} {tests}"  # for the processes that it spawns
    try:
        case = make_case(kind, ranks, tests)
    except ImportError as error:
        print(f"{kind} needs what is not installed: {error}", file=sys.stderr)
        raise SystemExit(MISSING) from None
    globals()[kind] = case
    names = [f"test_{number:04}" for number in range(tests)]
    return time_methods(case, names, prepares=kind == "MultiProcContinuousTest")


def time_methods(case: type[unittest.TestCase], names: list[str], *, prepares: bool) -> list[float]:
    found = []
    start = time.perf_counter()
    if prepares:
        case.setUpClass()
    for name in names:
        result = unittest.TestResult()
        case(name).run(result)
        if not result.wasSuccessful():
            raise RuntimeError("\n".join(text for _, text in result.errors + result.failures))
        found.append(time.perf_counter() - start)
        start = time.perf_counter()
    if prepares:
        with contextlib.suppress(Exception):
            case.tearDownClass()
    return found


def pool_rank(arguments: tuple[int, int, int]) -> None:
    """Do on a process of a pool what one rank of a test does, in a group made by the first."""
    import torch.distributed as dist

    rank, world_size, port = arguments
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    all_reduce()


def pool(ranks: int, tests: int, *, keeps: bool) -> list[float]:
    """A multiprocessing.Pool of spawned processes, made for each test, or kept with its group.

    The shape of the base class that many libraries copy; without that one's fixed sleep.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    found = []
    processes = None
    for _ in range(tests):
        start = time.perf_counter()
        if processes is None:
            processes, port = context.Pool(ranks), free_port()
        work = [(rank, ranks, port) for rank in range(ranks)]
        processes.map_async(pool_rank, work, chunksize=1).get(120)
        if not keeps:
            processes.terminate()
            processes.join()
            processes = None
        found.append(time.perf_counter() - start)
    if processes is not None:
        processes.terminate()
    return found


def debug_launcher(ranks: int, tests: int) -> list[float]:
    """accelerate.debug_launcher, which forks the ranks, for each test."""
    try:
        import accelerate
    except ImportError as error:
        print(f"debug_launcher needs what is not installed: {error}", file=sys.stderr)
        raise SystemExit(MISSING) from None

    def run() -> None:
        with contextlib.redirect_stdout(None):
            accelerate.debug_launcher(accelerated, num_processes=ranks)

    return [timed(run) for _ in range(tests)]


def accelerated() -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    all_reduce()


HARNESSES: dict[str, Callable[[int, int], list[float]]] = {
    "spawn": spawn,
    "torchrun": torchrun,
    "MultiProcessTestCase": lambda n, t: run_class(n, t, "MultiProcessTestCase"),
    "MultiProcContinuousTest": lambda n, t: run_class(n, t, "MultiProcContinuousTest"),
    "MultiThreadedTestCase": lambda n, t: run_class(n, t, "MultiThreadedTestCase"),
    "pool": lambda n, t: pool(n, t, keeps=False),
    "pool kept": lambda n, t: pool(n, t, keeps=True),
    "debug_launcher": debug_launcher,
}


if __name__ == "__mp_main__" and CASE in os.environ:
    _kind, _ranks, _tests = os.environ[CASE].split()
    globals()[_kind] = make_case(_kind, int(_ranks), int(_tests))

if __name__ == "__main__":
    name, ranks, tests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(HARNESSES[name](ranks, tests)))
