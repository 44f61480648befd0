"""The other ranks of one run over several controllers, while it goes on."""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.machines.coordination import Done, Failed, Result, Told
from pytest_ranks.launch.machines.line import LineLost
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Raised

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.machines.hub import Hub, Member
    from pytest_ranks.launch.wire import Injected

# Seconds that a rank has for its answer after its deadline: it dumps stacks and ends its process.
# More than the silence after which the line says that the rank is out of reach.
RESULT_SECONDS = 15.0
ENDING_SECONDS = 3.0  # the same when this process was asked to end


class Crew:
    """What rank 0 hears of the other ranks of a run, and tells them of each other.

    Args:
        hub: the other controllers.
        members: those of them whose ranks take part, by their number in the run, from 1.
        on_injected: called for each fault that one of their ranks tells of.
    """

    def __init__(
        self, hub: Hub, members: list[Member], on_injected: Callable[[Injected], None]
    ) -> None:
        self.number = hub.next_number()
        self._hub = hub
        self._members = members
        self._results: dict[int, RankRun] = {}  # index in the run -> what it did
        self._on_injected = on_injected
        self._failed = False
        self._told = False
        self._done = False
        self._epoll = select.epoll()  # one descriptor that stands for all of theirs
        self._epoll.register(hub.wake, select.EPOLLIN)
        for member in members:
            if member.loss is None:
                self._epoll.register(member.line.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Give the descriptor back."""
        self._epoll.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when one of them has something to say."""
        return self._epoll.fileno()

    def has_failed(self) -> bool:
        """Return whether one of them failed or was lost, or this process was asked to end."""
        return self._failed

    def has_finished(self) -> bool:
        """Return whether one of them has finished the run."""
        return bool(self._results)

    def tell_failure(self) -> None:
        """Tell them that a rank failed."""
        self._failed = True
        if not self._told:
            self._told = True
            self._tell(Failed(number=self.number))

    def pump(self) -> None:
        """Take in what they have said."""
        for index, member in enumerate(self._members, start=1):
            if index in self._results:
                continue
            for message in self._hub.hear(member):
                if getattr(message, "number", None) != self.number:
                    continue
                if isinstance(message, Failed):
                    self.tell_failure()
                elif isinstance(message, Told):
                    self._on_injected(message.fault)
                elif isinstance(message, Result):
                    self._results[index] = _ours(message.run, index, member.offset)
                    self._tell(Done(number=self.number))
            if member.loss is not None:
                self._results.setdefault(index, _lost(index, member))
                self.tell_failure()
        if self._hub.is_ending:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._hub.wake)  # or the descriptor would stay readable
            self.tell_failure()

    def gather(self, seconds: float) -> list[RankRun]:
        """Return what they did, once each has said so or is lost; ours has finished."""
        self._tell(Done(number=self.number))
        end = time.monotonic() + seconds
        self.pump()
        while len(self._results) < len(self._members):
            if self._hub.is_ending:
                end = min(end, time.monotonic() + ENDING_SECONDS)
            left = end - time.monotonic()
            if left <= 0:
                self._give_up()
                break
            self._epoll.poll(left)
            self.pump()
        return [self._results[index] for index in range(1, len(self._members) + 1)]

    def _give_up(self) -> None:
        why = "when this rank was asked to end" if self._hub.is_ending else "after the deadline"
        for index, member in enumerate(self._members, start=1):
            if index not in self._results:
                self._hub.lose(member, LineLost(f"it did not say what its rank did {why}"))
                self._results[index] = _lost(index, member)

    def _tell(self, message: Failed | Done) -> None:
        for index, member in enumerate(self._members, start=1):
            if index not in self._results:
                self._hub.send(member, message)


def _ours(run: RankRun, index: int, offset: float) -> RankRun:
    """Return what a rank did with its number in this run and the times of our clock."""
    messages = [
        replace(message, at=message.at + offset)
        if hasattr(message, "at")
        else _shifted(message, offset)
        for message in run.messages
    ]
    sight = None if run.sight is None else replace(run.sight, rank=index)
    return replace(run, rank=index, at=run.at + offset, messages=messages, sight=sight)


def _shifted(message: Any, offset: float) -> Any:
    if not hasattr(message, "phases"):
        return message
    phases = tuple(replace(phase, at=phase.at + offset) for phase in message.phases)
    return replace(message, phases=phases)


def _lost(index: int, member: Member) -> RankRun:
    assert member.loss is not None
    text = member.loss.text
    told = Raised(headline=text, traceback="", at=member.loss.at)
    return RankRun(rank=index, done=True, at=member.loss.at, messages=[told])
