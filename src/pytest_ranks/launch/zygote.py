"""The preloaded parent that rank processes are forked from, with the store beside it.

Life cycle: a controller starts one (`python -m pytest_ranks.launch.zygote FD`, or a fork of
itself), tells it what to import, and asks for ranks; each is a fork of this process with a
channel of its own to the controller. The zygote never runs a test, opens no group and starts no
thread, so that every fork is safe. It ends when its controller does, and takes everything below
it along.
"""

from __future__ import annotations

import faulthandler
import io
import os
import select
import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from pytest_ranks.launch import coverage, fresh
from pytest_ranks.launch.channel import Channel, ChannelClosed
from pytest_ranks.launch.group import (
    early_variables,
    scrub_rank_variables,
)
from pytest_ranks.launch.guardian import end_everything_below, start_guardian
from pytest_ranks.launch.preparation import prepare
from pytest_ranks.launch.processes import (
    STACKS_SIGNAL,
    become_subreaper,
    children,
    die_with_parent,
    native_threads,
)
from pytest_ranks.launch.rank import ItemRunner, Rank
from pytest_ranks.launch.startline import StartLine
from pytest_ranks.launch.stores import serve_stores
from pytest_ranks.launch.wire import Collect, Exited, Fork, Forked, OpenStore, Prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.terminal.asides import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What a zygote has of its controller.

    Attributes:
        channel: to the controller.
        controller: pidfd of the controller.
        log: file that the controller reads when the zygote ends early or hangs.
    """

    channel: Channel
    controller: int
    log: int

    def tell_stacks(self) -> None:
        """Have a signal write the stacks; before, it would end a process that hangs in an import."""
        faulthandler.register(STACKS_SIGNAL, file=self.log, all_threads=True, chain=False)


class Zygote:
    """Serves one controller: imports, forks, reaps, reports.

    Args:
        ends: what it has of the controller.
        collect: collects test files, in a zygote that is a pytest session.
        items: runs items in the ranks of such a zygote.
    """

    def __init__(
        self,
        ends: Ends,
        *,
        collect: Callable[[tuple[str, ...]], None] | None = None,
        items: ItemRunner | None = None,
    ) -> None:
        self._channel = ends.channel
        self._controller = ends.controller
        self._collect = collect
        self._items = items
        self._coverage: Measure | None = None
        self._ranks: dict[int, tuple[int, int]] = {}  # pidfd -> (pid, label)
        self._helpers = set(children(os.getpid()))  # pids of the stores

    def serve(self) -> NoReturn:
        """Answer the controller until it goes, then end with everything below."""
        signal.signal(signal.SIGTERM, lambda *_: self.end())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        become_subreaper()
        try:
            while True:
                self._wait()
        except ChannelClosed:
            pass
        finally:
            self.end()

    def end(self) -> NoReturn:
        """Kill all that descends from this process and leave."""
        end_everything_below(is_patient=False)  # the guardian waits for those that clean up
        os._exit(0)

    def _wait(self) -> None:
        poll = select.poll()
        for fd in (self._channel.fileno(), self._controller, *self._ranks):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        for fd in ready:
            if fd in self._ranks:
                self._reap(fd)
        if self._channel.fileno() in ready:
            for message, descriptors in self._channel.receive_all():
                self._answer(message, descriptors)
        elif self._controller in ready:
            raise ChannelClosed("the controller ended")

    def _answer(self, message: object, descriptors: tuple[int, ...]) -> None:
        if isinstance(message, Prepare):
            self._coverage = message.coverage
            prepare(message)
        elif isinstance(message, Collect):
            assert self._collect is not None
            self._collect(message.files)
        elif isinstance(message, OpenStore):
            self._open_store(descriptors[0])
        elif isinstance(message, Fork):
            self._fork(message, descriptors)

    def _fork(self, request: Fork, descriptors: tuple[int, ...]) -> None:
        threads = native_threads()
        is_fresh = request.settle is not None and (request.fresh or threads > 1)
        if is_fresh:
            pid = fresh.start(request, descriptors)
        else:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._become_rank(request, descriptors, parent)
        pidfd = os.pidfd_open(pid)
        self._ranks[pidfd] = (pid, request.label)
        for fd in descriptors:
            os.close(fd)
        forked = Forked(label=request.label, pid=pid, native_threads=threads, fresh=is_fresh)
        self._channel.send(forked, (pidfd,))

    def _become_rank(self, request: Fork, descriptors: tuple[int, ...], parent: int) -> NoReturn:
        try:
            os.setsid()  # Ctrl-C goes to the controller alone, which drives the end
            die_with_parent(parent)
            become_subreaper()  # so that hygiene sees what a test has put beside itself
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd in (self._channel.fileno(), self._controller, *self._ranks):
                os.close(fd)
            channel, output, stacks, line = descriptors
            if self._items is None:
                os.dup2(output, 1)
                os.dup2(output, 2)
                for stream in (sys.stdout, sys.stderr):
                    if isinstance(stream, io.TextIOWrapper):  # so that a killed rank's lines stay
                        stream.reconfigure(line_buffering=True)
            start = StartLine(line, request.world_size, place=request.rank)
            os.close(line)
            coverage.start(self._coverage)
            Rank(Channel.from_fd(channel), output, stacks, start, self._items).serve()
        finally:
            os._exit(70)  # EX_SOFTWARE

    def _open_store(self, channel: int) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                die_with_parent(parent)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.close(self._channel.fileno())
                serve_stores(Channel.from_fd(channel))
            finally:
                os._exit(0)
        os.close(channel)
        self._helpers.add(pid)

    def _reap(self, pidfd: int) -> None:
        pid, label = self._ranks.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._channel.send(Exited(label=label, status=os.waitstatus_to_exitcode(status)))
        # Each living rank is the subreaper of what is below it: any other child is of a dead one.
        ranks = {pid for pid, _ in self._ranks.values()}
        end_everything_below(spared=ranks | self._helpers, is_patient=False)


def main(arguments: list[str]) -> NoReturn:
    """Serve the controller whose channel was inherited; no pytest session."""
    os.environ.update(early_variables())
    scrub_rank_variables()
    ends = Ends(
        channel=Channel.from_fd(int(arguments[0])), controller=int(arguments[1]), log=os.dup(2)
    )
    options = arguments[2:]
    litter = [option.removeprefix("--litter=") for option in options if "--litter=" in option]
    start_guardian(ends.channel, ends.controller, litter=litter[0] if litter else None)
    ends.tell_stacks()
    if "--pytest" in options:
        from pytest_ranks.launch.session import become, serve

        request, _ = ends.channel.receive()
        become(request, partial(serve, ends=ends))
    Zygote(ends).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
