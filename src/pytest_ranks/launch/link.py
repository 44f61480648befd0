"""The controller's end of a zygote: start it, ask it for ranks and stores, end it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.channel import Channel, ChannelClosed, channel_pair, is_readable
from pytest_ranks.launch.deadline import TERMINATE_SECONDS, trim
from pytest_ranks.launch.group import early_variables, scrub_rank_variables
from pytest_ranks.launch.guardian import JANITOR_SECONDS
from pytest_ranks.launch.processes import (
    STACKS_SIGNAL,
    describe_end,
    has_ended,
    kill_tree,
    read_tail,
    send_signal,
)
from pytest_ranks.launch.start_watch import START_SECONDS, StartOverdue, StartWatch
from pytest_ranks.launch.startline import StartLine
from pytest_ranks.launch.stores import Stores
from pytest_ranks.launch.terminal.attendant import Attendant
from pytest_ranks.launch.wire import (
    Born,
    Collect,
    Configure,
    Ended,
    Exited,
    Fork,
    Forked,
    OpenStore,
    Prepare,
    Settle,
)

if TYPE_CHECKING:
    from collections.abc import Callable

END_SECONDS = 2.0
STACKS_SECONDS = 0.5
STATUS_SECONDS = 1.0


@dataclass(slots=True)
class RankHandle:
    """The controller's side of one rank process."""

    label: int
    rank: int
    channel: Channel
    output: int
    stacks: int
    pid: int | None = None
    pidfd: int | None = None
    status: int | None = None
    native_threads: int = 1
    fresh: bool = False
    main_thread: int = 0
    captured: tuple[int, ...] = ()
    witness: int | None = None
    ready: bool = False
    _closed: bool = field(default=False)

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self.status is not None or (self.pidfd is not None and has_ended(self.pidfd))

    def kill(self) -> None:
        """Kill the process and everything below it."""
        if self.pid is not None and self.pidfd is not None:
            kill_tree(self.pid, self.pidfd)

    def close(self) -> None:
        """Give back the descriptors."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        others = [fd for fd in (self.pidfd, self.witness) if fd is not None]
        for fd in (self.output, self.stacks, *others, *self.captured):
            with contextlib.suppress(OSError):
                os.close(fd)


class ZygoteLink:
    """One zygote, seen from its controller.

    Args:
        channel: to the zygote.
        pid: the zygote's guardian, or itself where it has none.
        log: descriptor of what it writes, to explain an early end.
        reap: takes the exit status from the kernel once the zygote has ended.
        how: one word for how it was started, for debugging.
    """

    def __init__(
        self, channel: Channel, pid: int, *, log: int, reap: Callable[[], object], how: str
    ) -> None:
        self.channel = channel
        self.how = how
        self.attendant = Attendant()
        self.start_seconds = START_SECONDS
        self.farewell = TERMINATE_SECONDS  # seconds that ranks get between SIGTERM and SIGKILL
        self._owner = os.getpid()
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._zygote: int | None = None  # pidfd of the process below its guardian, once known
        self._status: int | None = None  # how that process ended
        self._log = log
        self._reap = reap
        self._labels = itertools.count()
        self._handles: dict[int, RankHandle] = {}
        self._closed = False
        self._settle: Settle | None = None
        self._stores = Stores(lambda end: self._send(OpenStore(), (end.fileno(),)))

    @classmethod
    def start_forked(cls, serve: Callable[[Channel, int, int], NoReturn]) -> ZygoteLink:
        """Start a zygote as a fork of this process, which must have one native thread.

        Args:
            serve: called in the fork with its channel, the pidfd of this process, and a log.
        """
        ours, theirs = channel_pair()
        log = _memory_file("pytest-ranks-zygote")
        controller = os.pidfd_open(os.getpid())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()  # Ctrl-C goes to the controller alone
                ours.close()
                os.environ.update(early_variables())
                scrub_rank_variables()
                serve(Channel(theirs), controller, log)
            except BaseException:
                with os.fdopen(log, "w") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(1)
        theirs.close()
        os.close(controller)
        return cls(ours, pid, log=log, reap=lambda: os.waitpid(pid, 0), how="forked")

    @classmethod
    def start_fresh(
        cls, environment: dict[str, str], *options: str, litter: str | None = None
    ) -> ZygoteLink:
        """Start a zygote as a fresh process; returns at once."""
        ours, theirs = channel_pair()
        log = _memory_file("pytest-ranks-zygote")
        controller = os.pidfd_open(os.getpid())
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *flags,
                    "-m",
                    "pytest_ranks.launch.zygote",
                    str(theirs.fileno()),
                    str(controller),
                    *options,
                    *([] if litter is None else [f"--litter={litter}"]),
                ],
                pass_fds=(theirs.fileno(), controller),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        finally:
            theirs.close()
            os.close(controller)
        return cls(ours, process.pid, log=log, reap=process.wait, how="fresh")

    def become(self, request: Configure) -> None:
        """Have a fresh zygote become a pytest session; returns at once."""
        self._send(request)

    def prepare(
        self,
        request: Prepare,
        *,
        configure: Configure | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Have the zygote import modules; returns at once.

        Args:
            request: the modules, and where they are found.
            configure: the pytest session that it is, for ranks that are started afresh.
            environment: the variables that such ranks start with.
        """
        self._settle = Settle(prepare=request, configure=configure, environment=environment)
        self._send(request)
        with contextlib.suppress(ChannelClosed):  # whoever takes it meets that again
            self._stores.prepare()

    def collect(self, files: tuple[str, ...]) -> None:
        """Have the zygote collect test files; returns at once."""
        assert self._settle is not None
        self._settle = replace(self._settle, files=files)
        self._send(Collect(files=files))

    def fork(self, world_size: int, *, fresh: bool = False) -> tuple[list[RankHandle], StartLine]:
        """Ask for rank processes; they are there when their handles are ready.

        Args:
            world_size: how many.
            fresh: start each afresh, as devices need it, in place of a fork of the zygote.
        """
        handles = []
        line, memory = StartLine.create(world_size)
        for rank in range(world_size):
            ours, theirs = channel_pair()
            handle = RankHandle(
                label=next(self._labels),
                rank=rank,
                channel=ours,
                output=_memory_file("pytest-ranks-output"),
                stacks=_memory_file("pytest-ranks-stacks"),
            )
            self._handles[handle.label] = handle
            handles.append(handle)
            request = Fork(
                label=handle.label,
                rank=rank,
                world_size=world_size,
                settle=self._settle,
                fresh=fresh,
            )
            self._send(request, (theirs.fileno(), handle.output, handle.stacks, memory))
            theirs.close()
        os.close(memory)
        return handles, line

    def forget(self, handle: RankHandle) -> None:
        """Close a handle whose process has ended or is not of interest any more."""
        self._handles.pop(handle.label, None)
        handle.close()

    def pump(self) -> None:
        """Take in what the zygote has said.

        Raises:
            UnavailableError: the zygote ended.
        """
        try:
            messages = self.channel.receive_all()
        except ChannelClosed:
            raise self._ended() from None
        for message, descriptors in messages:
            if isinstance(message, Born):
                (self._zygote,) = descriptors
                continue
            if isinstance(message, Ended):
                self._status = message.status
                raise self._ended()
            handle = self._handles.get(message.label)
            if isinstance(message, Forked):
                if handle is None:
                    os.close(descriptors[0])
                    continue
                handle.pid, handle.pidfd = message.pid, descriptors[0]
                handle.native_threads = message.native_threads
                handle.fresh = message.fresh
            elif isinstance(message, Exited) and handle is not None:
                handle.status = message.status

    def await_status(self, handle: RankHandle) -> None:
        """Wait shortly for the zygote's word on how a process ended."""
        until = time.monotonic() + STATUS_SECONDS
        while handle.status is None and time.monotonic() < until:
            is_readable(self.channel.fileno(), 0.05)
            self.pump()

    def open_store(self) -> int:
        """Return the port of a new store.

        Raises:
            UnavailableError: torch cannot be imported, or the zygote ended.
        """
        try:
            watch = self.watch_start()
            return self._stores.take(seconds=self.start_seconds, look=lambda: watch.look({}))
        except ChannelClosed:
            raise self._ended() from None
        except TimeoutError:
            raise self.overdue() from None

    def watch_start(self) -> StartWatch:
        """Return what looks at the processes that a run needs to start."""
        handles = self._handles.values()
        return StartWatch(
            self._pid, lambda: {one.pid: one.rank for one in handles if one.pid is not None}
        )

    def overdue(self) -> StartOverdue:
        """Return the error to raise where the zygote has not come to forking ranks in time."""
        return StartOverdue(
            f"the ranks could not start within {self.start_seconds:g} s (--ranks-join-timeout). "
            "What the process that they are forked from wrote, and where it is:\n"
            f"{trim(self.stacks())}"
        )

    def stacks(self) -> str:
        """Return what the zygote is doing, as Python stacks."""
        before = os.fstat(self._log).st_size
        with contextlib.suppress(UnavailableError):
            self.pump()
        if self._zygote is not None:
            send_signal(self._zygote, STACKS_SIGNAL)
        end = time.monotonic() + STACKS_SECONDS
        while os.fstat(self._log).st_size == before and time.monotonic() < end:
            time.sleep(0.02)
        return read_tail(self._log, 1 << 16)

    def close_store(self, port: int, *, is_used: bool = True) -> None:
        """Give a store back; one that nobody may have used is looked at, and taken again."""
        with contextlib.suppress(ChannelClosed):
            self._stores.give_back(port, is_used=is_used)

    def close(self) -> None:
        """End the zygote and everything below it; does nothing in a fork of the controller."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        self._stores.close()
        for handle in list(self._handles.values()):
            self.forget(handle)
        if os.getpid() == self._owner:
            if not has_ended(self._pidfd, timeout=END_SECONDS):
                send_signal(self._pidfd, signal.SIGTERM)  # the guardian then ends all below it
            if not has_ended(self._pidfd, timeout=END_SECONDS + JANITOR_SECONDS):
                kill_tree(self._pid, self._pidfd)
            with contextlib.suppress(ChildProcessError):
                self._reap()
        for fd in (self._pidfd, self._log, *(() if self._zygote is None else (self._zygote,))):
            os.close(fd)

    def _send(self, message: object, descriptors: tuple[int, ...] = ()) -> None:
        try:
            self.channel.send(message, descriptors)
        except ChannelClosed:
            raise self._ended() from None

    def _ended(self) -> UnavailableError:
        if self._status is None:
            with contextlib.suppress(ChannelClosed):
                told = self.channel.receive_all()
                found = [one.status for one, _ in told if isinstance(one, Ended)]
                self._status = found[0] if found else None
        how = "ended" if self._status is None else describe_end(self._status)
        return UnavailableError(
            f"the process that ranks are forked from {how}. It wrote: "
            f"{read_tail(self._log).strip() or 'nothing'}"
        )


def _memory_file(name: str) -> int:
    """Return a file without a place; appending keeps its writers' lines in order."""
    fd = os.memfd_create(name)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd
