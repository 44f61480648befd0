"""A rank in a fresh process: for devices, and where a fork of the zygote would not be safe.

A driver's state, and locks that other threads hold, do not survive a fork. Such a rank is started
by the zygote, so that it has the same parent, the same end and the same orphans' death as a
forked one; it then makes the same pytest session by itself and collects the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

from pytest_ranks.launch import coverage
from pytest_ranks.launch.channel import Channel
from pytest_ranks.launch.preparation import prepare
from pytest_ranks.launch.processes import become_subreaper, die_with_parent
from pytest_ranks.launch.rank import Rank
from pytest_ranks.launch.startline import StartLine

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from pytest_ranks.launch.wire import Fork, Settle

# What the process finds at its descriptors, from the first that is not a standard stream.
_FIRST = 3
_CHANNEL, _OUTPUT, _STACKS, _LINE, _SETTLE = range(_FIRST, _FIRST + 5)
_OUT_OF_THE_WAY = 100  # no descriptor above is one of those


def start(request: Fork, descriptors: Sequence[int]) -> int:
    """Start the process of one rank; return its number.

    Nothing runs between the system's fork and its exec, so that this is safe in a process with
    any number of threads.

    Args:
        request: the rank, with what it has to know to settle.
        descriptors: its channel, output file, stacks file and start line's memory.
    """
    assert request.settle is not None
    settle = os.memfd_create("pytest-ranks-settle")
    with os.fdopen(os.dup(settle), "wb") as file:
        pickle.dump(request.settle, file)
    os.lseek(settle, 0, os.SEEK_SET)
    sources = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for fd in (*descriptors, settle)
    ]
    output = sources[1]
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
        *((os.POSIX_SPAWN_DUP2, fd, place) for place, fd in enumerate(sources, start=_FIRST)),
    ]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    numbers = (request.rank, request.world_size, os.getpid())
    command = [sys.executable, *flags, "-m", __name__, *map(str, numbers)]
    try:
        return os.posix_spawn(
            sys.executable,
            command,
            {**os.environ, **(request.settle.environment or {})},
            file_actions=actions,
            setsid=True,  # Ctrl-C goes to the controller alone
        )
    finally:
        for fd in (*sources, settle):
            os.close(fd)


def main(arguments: list[str]) -> NoReturn:
    """Become the rank that the zygote asked for."""
    rank, world_size, parent = map(int, arguments)
    die_with_parent(parent)
    become_subreaper()
    with os.fdopen(_SETTLE, "rb") as file:
        settle: Settle = pickle.load(file)
    line = StartLine(_LINE, world_size, place=rank)
    os.close(_LINE)

    def serve(session: pytest.Session | None) -> NoReturn:
        prepare(settle.prepare)
        items = None
        if session is not None:
            from pytest_ranks.launch.session import RankSession

            items = RankSession(session)
            items.collect(settle.files)
        coverage.start(settle.prepare.coverage)
        Rank(Channel.from_fd(_CHANNEL), _OUTPUT, _STACKS, line, items).serve()
        raise AssertionError("a rank that serves never returns")

    if settle.configure is None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # so that a killed rank's lines stay
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        serve(None)
    from pytest_ranks.launch.session import become

    become(settle.configure, serve)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    finally:
        os._exit(70)  # EX_SOFTWARE
