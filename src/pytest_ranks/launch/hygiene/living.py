"""Threads and child processes that a test left running."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_state
from pytest_ranks.launch.hygiene.trait import show
from pytest_ranks.launch.processes import children, descendants, is_janitor, is_running

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Mapping

OURS = "pytest-ranks-"
# What ends together with the test may need a moment for that; only a leak ever waits this long.
MOMENT = 0.2


class Threads:
    """Python threads, without our own and without those that stand for foreign ones."""

    def read(self) -> Mapping[Hashable, Any]:
        """Return the threads that run."""
        return {one: one.name for one in threading.enumerate() if _is_of_a_test(one)}

    def remaining(self, keys: set[Hashable]) -> Mapping[Hashable, Any]:
        """Return what of this still runs: an executor that is garbage ends its threads."""
        gc.collect()
        end = time.monotonic() + MOMENT
        for one in keys:
            if isinstance(one, threading.Thread):
                one.join(max(0.0, end - time.monotonic()))
        return {key: name for key, name in self.read().items() if key in keys}

    def describe(self, found: Mapping[Hashable, Any]) -> list[str]:
        """Return what runs, as text: `1 thread 'prefetch' still runs`."""
        return [_still_run("thread", sorted(map(str, found.values())))]

    def end(self, found: Mapping[Hashable, Any]) -> bool:
        """End nothing: a thread cannot be ended from outside."""
        return not found


class Children:
    """Child processes, and what those left to this one, without multiprocessing's helpers."""

    def read(self) -> Mapping[Hashable, Any]:
        """Return the children; one call of the kernel where there are none."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return {}
        services = _compat_state.service_pids()
        return {
            pid: pid for pid in children(os.getpid()) if pid not in services and not is_janitor(pid)
        }

    def remaining(self, keys: set[Hashable]) -> Mapping[Hashable, Any]:
        """Return what of this still runs, with its command."""
        gc.collect()  # an iterator over a loader with workers ends them
        end = time.monotonic() + MOMENT
        running = _running(keys)
        while running and time.monotonic() < end:
            time.sleep(0.005)
            running = _running(keys)
        for pid in keys - set(running):
            _reap(pid)
        return {pid: _command(pid) for pid in running}

    def describe(self, found: Mapping[Hashable, Any]) -> list[str]:
        """Return what runs, as text."""
        return [_still_run("child process", sorted(map(str, found.values())))]

    def end(self, found: Mapping[Hashable, Any]) -> bool:
        """Kill the children with everything below them."""
        with _untold_of_children():
            for pid in found:
                assert isinstance(pid, int)
                for one in (*descendants(pid), pid):
                    with contextlib.suppress(OSError):
                        os.kill(one, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.waitpid(pid, 0)
        return True


@contextlib.contextmanager
def _untold_of_children() -> Generator[None]:
    """Keep from handlers that children end: torch's raises when a worker of a loader is killed."""
    handler = signal.getsignal(signal.SIGCHLD)
    is_ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGCHLD, handler)


def _is_of_a_test(thread: threading.Thread) -> bool:
    kind = type(thread)
    # tqdm keeps one thread that looks after slow bars; a dummy stands for a thread of torch's
    is_service = kind.__name__ in ("TMonitor", "_DummyThread", "_MainThread")
    return not is_service and not thread.name.startswith(OURS)


def _running(keys: set[Hashable]) -> list[int]:
    return [pid for pid in keys if isinstance(pid, int) and is_running(pid)]


def _reap(pid: Hashable) -> None:
    with contextlib.suppress(OSError):
        os.waitpid(int(str(pid)), os.WNOHANG)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        return " ".join(word.decode(errors="replace") for word in words)
    return str(pid)


def _still_run(kind: str, names: list[str]) -> str:
    several = len(names) > 1
    plural = f"{kind}es" if kind.endswith("ss") else f"{kind}s"
    return (
        f"{len(names)} {plural if several else kind} {', '.join(map(show, names))} "
        f"still {'run' if several else 'runs'}"
    )
