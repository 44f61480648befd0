"""One run on rank processes, watched until each rank is done, dead or stopped."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any, Protocol

from pytest_ranks.launch import deadline
from pytest_ranks.launch.channel import ChannelClosed
from pytest_ranks.launch.forensics.memory import own_group
from pytest_ranks.launch.processes import read_tail
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Injected, Playing, Ready

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_ranks.launch.forensics.probe import Probe
    from pytest_ranks.launch.link import RankHandle, ZygoteLink
    from pytest_ranks.launch.outcome import ExpectedEnd
    from pytest_ranks.launch.startline import StartLine

# Seconds that ranks have for their own end after one rank failed; its sockets are cut by then, so
# that only a rank that is not in a collective, or a very loaded machine, needs more than milliseconds.
GRACE = 2.0
STATUS_SECONDS = 1.0


class Peers(Protocol):
    """The ranks of a run that are watched elsewhere, each by a controller of its own."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when they have something to say."""

    def pump(self) -> None:
        """Take in what they have said."""

    def tell_failure(self) -> None:
        """Tell them that a rank of ours failed; said again, it changes nothing."""

    def has_failed(self) -> bool:
        """Return whether one of them failed, or cannot be reached any more."""

    def has_finished(self) -> bool:
        """Return whether one of them has finished the run."""


class RunWatch:
    """One run being watched."""

    def __init__(
        self,
        link: ZygoteLink,
        handles: list[RankHandle],
        line: StartLine | None,
        probe: Probe,
        is_last: Callable[[Any], bool],
        is_failure: Callable[[Any], bool],
        timeout: float,
        peers: Peers | None,
    ) -> None:
        self.runs = [RankRun(rank=handle.rank) for handle in handles]
        self._link = link
        self._handles = handles
        self._is_last = is_last
        self._is_failure = is_failure
        self._line = line
        self._timeout = timeout
        self._peers = peers
        self.expected_ends: Mapping[int, ExpectedEnd] = {}
        self.on_injected: Callable[[Injected], None] = lambda _: None
        self._is_injected = False
        now = time.monotonic()
        # The deadline counts from the start of the work. That it has started is read in shared
        # memory, when the time would be up or a message wakes us anyway.
        self._unready = now + link.start_seconds
        self._start = link.watch_start()
        self._started: float | None = now if line is None else None
        self._look = now + min(timeout, STATUS_SECONDS)
        self._grace: float | None = None
        self._probe = probe
        self._kills = own_group().kills()

    def until_over(self) -> bool:
        """Return, once no rank is at work any more, whether the deadline passed."""
        timed_out = False
        if self._peers is not None and self._peers.has_failed():
            self._give_grace()
        while waiting := [run for run in self.runs if not (run.done or run.crashed)]:
            have_others_finished = self._peers is None or self._peers.has_finished()
            if all(run.is_frozen for run in waiting) and have_others_finished:
                self._end_frozen(waiting)
                break
            now = time.monotonic()
            if self._link.attendant.is_patient:
                self._put_off(now)
            limit = self._limit(now)
            grace = limit if self._grace is None else self._grace
            if now >= limit:
                timed_out = True
                if any(self._handles[run.rank].pid is None for run in waiting):
                    raise self._link.overdue()
                self._stop(waiting, "unready" if self._started is None else "deadline")
                break
            if now >= grace:
                self._stop(waiting, "collateral")
                break
            probe = limit if self._is_past_probing() else self._probe.next_at
            if now >= probe:
                if why := self._judge(limit):
                    timed_out = True
                    self._stop(waiting, why)
                    break
                continue  # it took its time
            self._step(max(0.0, min(self._look, limit, grace, probe) - now))
        for handle, run in zip(self._handles, self.runs, strict=True):
            if run.done:
                run.output = read_tail(handle.output)
        self._link.attendant.end(self._handles)
        return timed_out

    def _end_frozen(self, waiting: list[RankRun]) -> None:
        """End ranks that wait for nothing but their end."""
        for run in waiting:
            run.stopped, run.at = "frozen", time.monotonic()
            self._handles[run.rank].kill()

    def _limit(self, now: float) -> float:
        """Return when the time is up, as far as that is known now."""
        if self._started is None and self._line is not None:
            self._started = self._line.all_arrived()
        if self._started is not None:
            self._look = self._started + self._timeout
            return self._look
        if now >= self._look:
            self._look = now + min(self._timeout, STATUS_SECONDS)
            waiting = [handle for handle in self._handles if not self.runs[handle.rank].done]
            self._start.look({one.pid: one.rank for one in waiting if one.pid is not None})
        return self._unready

    def _put_off(self, now: float) -> None:
        """Have all time that is left run from now."""
        self._started = None if self._started is None else now
        self._grace = None if self._grace is None else now + GRACE
        self._probe.put_off()

    def _is_past_probing(self) -> bool:
        """Return whether ranks that wait in vain end without a look at them."""
        # a failure cuts them off; where a death is declared, one may wait for its own timeout
        return self._grace is not None or bool(self.expected_ends) or self._is_injected

    def _judge(self, limit: float) -> str:
        """Return why nothing will come of waiting any longer, nothing where something may."""
        if self._started is None:
            self._probe.put_off()
            return ""
        finished = {run.rank for run in self.runs if run.done}
        elsewhere = None if self._peers is None else self._peers.has_finished()
        return self._probe.look(finished, limit, elsewhere=elsewhere)

    def _step(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._link.channel.fileno(), select.POLLIN)
        by_fd: dict[int, int] = {}
        for index, (handle, run) in enumerate(zip(self._handles, self.runs, strict=True)):
            if not (run.done or run.crashed):
                by_fd[handle.channel.fileno()] = index
                if handle.pidfd is not None:
                    by_fd[handle.pidfd] = index
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        if self._peers is not None:
            poll.register(self._peers.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._link.attendant.milliseconds(seconds))}
        self._link.attendant.look(self._handles)
        if self._peers is not None and self._peers.fileno() in ready:
            self._hear(self._peers)
        if self._link.channel.fileno() in ready:
            self._link.pump()
        for index in {by_fd[fd] for fd in ready if fd in by_fd}:
            self._listen(self._handles[index], self.runs[index])

    def _hear(self, peers: Peers) -> None:
        peers.pump()
        if peers.has_failed():
            self._give_grace()

    def _give_grace(self) -> None:
        """Give those that are at work a short time for their own end, once."""
        if self._grace is None:
            self._grace = time.monotonic() + GRACE

    def _fail(self) -> None:
        self._give_grace()
        if self._peers is not None:
            self._peers.tell_failure()

    def _listen(self, handle: RankHandle, run: RankRun) -> None:
        try:
            messages = handle.channel.receive_all()
        except ChannelClosed:
            # End-of-file is a hint: a child of the rank may hold the socket, or the pidfd is
            # still on its way. Only the end of the process is a death.
            self._await_end(handle)
            messages = []
        for message, descriptors in messages:
            self._take(handle, run, message, descriptors)
        if not run.done and handle.ended():
            self._bury(handle, run)

    def _take(
        self, handle: RankHandle, run: RankRun, message: object, descriptors: tuple[int, ...]
    ) -> None:
        if isinstance(message, Ready):
            handle.ready, handle.main_thread = True, message.main_thread
            handle.witness, handle.captured = descriptors[0], descriptors[1:]
            return
        if isinstance(message, Playing):
            run.threads = message.threads
            return
        if self._link.attendant.take(handle, message):
            return
        run.messages.append(message)
        if isinstance(message, Injected):
            self._is_injected = True
            run.is_frozen = message.kind == "hang"
            self.on_injected(message)
        if self._is_last(message) and not run.done:
            run.done = True
            self._probe.hurry()
        if self._is_failure(message):
            self._fail()

    def _await_end(self, handle: RankHandle) -> None:
        end = time.monotonic() + STATUS_SECONDS
        while not handle.ended() and time.monotonic() < end:
            poll = select.poll()
            poll.register(self._link.channel.fileno(), select.POLLIN)
            if handle.pidfd is not None:
                poll.register(handle.pidfd, select.POLLIN)
            poll.poll(50)
            self._link.pump()
        if not handle.ended():
            handle.kill()

    def _bury(self, handle: RankHandle, run: RankRun) -> None:
        run.crashed, run.at = True, time.monotonic()
        self._link.await_status(handle)
        run.status = handle.status
        run.stacks = read_tail(handle.stacks, 1 << 18)
        self._read_output(handle, run)
        end = self.expected_ends.get(run.rank)
        if end is None or not end.is_met(run.status):
            if not self._is_injected:  # the report names the fault
                run.note = own_group().explain(run.status, self._kills)
            self._fail()

    def _stop(self, waiting: list[RankRun], why: str) -> None:
        handles = [self._handles[run.rank] for run in waiting]
        sights = self._probe.last()
        for run in self.runs:
            run.sight = sights.get(run.rank)
        dumps = deadline.dump_stacks(handles)
        if any(handle.pid is None for handle in handles):
            own = self._link.stacks()  # the zygote has not come to forking them
            dumps = [
                own if handle.pid is None else dump
                for handle, dump in zip(handles, dumps, strict=True)
            ]
        for handle, run, dump in zip(handles, waiting, dumps, strict=True):
            run.stopped, run.at, run.stacks = why, time.monotonic(), dump
            run.start_seconds = self._link.start_seconds
            run.where = deadline.find_where(dump, handle.main_thread)
            self._read_output(handle, run)
        deadline.terminate(handles, seconds=self._link.farewell)

    def _read_output(self, handle: RankHandle, run: RankRun) -> None:
        run.output = read_tail(handle.output)
        run.captured = "".join(read_tail(fd) for fd in handle.captured)
