"""Rank 0's end of a world over several machines: who is there, and who is not any more."""

from __future__ import annotations

import itertools
import os
import select
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError, UnavailableError
from pytest_ranks.launch.machines.agreement import node_labels, who
from pytest_ranks.launch.machines.coordination import Bye, End, Hello, Leaving, Ping, Pong
from pytest_ranks.launch.machines.interfaces import plain_address
from pytest_ranks.launch.machines.line import SILENCE_SECONDS, Line, LineLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.machines.outer_world import OuterWorld

ANSWER_SECONDS = 30.0  # for an answer that takes milliseconds, from a controller that is idle
PROGRESS_SECONDS = 10.0
PINGS = 3
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How a rank of the world was lost.

    Attributes:
        text: what is known, to be read after the rank's name.
        at: CLOCK_MONOTONIC seconds at which it was last heard of.
        during: the test that ran, empty between tests.
    """

    text: str
    at: float
    during: str = ""


@dataclass(slots=True, kw_only=True)
class Member:
    """Another rank of the world.

    Attributes:
        hello: what it says of itself.
        line: to its pytest.
        offset: seconds to add to its clock to have ours.
        loss: how it was lost, None while it is there.
    """

    hello: Hello
    line: Line
    offset: float = 0.0
    loss: Loss | None = None
    pending: list[Any] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Its number in the world."""
        return self.hello.rank


class Hub:
    """All other ranks of the world, as rank 0 sees them.

    Life cycle: `listen`, tell the others where, `admit` them, run tests on some of them, `end`.

    Args:
        world: as the launcher made it.
        hello: what rank 0 says of itself; its token is what the others have to show.
    """

    def __init__(self, world: OuterWorld, hello: Hello) -> None:
        self.world = world
        self.hello = hello
        self.during = ""
        self.is_busy = False  # whether this process waits for others, and looks at `wake`
        self.members: list[Member] = []  # by rank
        self.refused: list[str] = []  # who else connected, a sentence each
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.is_ending = False
        self._listener: socket.socket | None = None
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """Return a number that was never used in this session, for a run or a pool."""
        return next(self._numbers)

    # ---- the beginning

    def listen(self, port: int) -> int:
        """Listen for the others; 0 has the system choose the port. Return the port.

        Raises:
            UnavailableError: the port is taken, or the address cannot be resolved.
        """
        host = LOOPBACK if self.world.nodes == 1 else ""
        try:
            family = socket.AF_INET
            if host == "":
                family = socket.getaddrinfo(self.world.address, None)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise UnavailableError(
                f"rank 0 cannot listen on port {port} for the other ranks ({error}): set "
                "MASTER_PORT to a free port of its machine, the same on all ranks."
            ) from None
        return int(self._listener.getsockname()[1])

    def admit(self, end: float, progress: Callable[[list[int]], None]) -> None:
        """Wait until all ranks have said hello; `missing` tells who has not.

        Args:
            end: CLOCK_MONOTONIC seconds at which to stop waiting.
            progress: called with the missing ranks, now and then.
        """
        assert self._listener is not None
        waiting: list[Line] = []
        shown = time.monotonic() + PROGRESS_SECONDS
        while (missing := self.missing()) and not self.is_ending:
            now = time.monotonic()
            if now >= end:
                break
            if now >= shown:
                progress(missing)
                shown = now + PROGRESS_SECONDS
            poll = select.poll()
            for fd in (self._listener.fileno(), self.wake, *(line.fileno() for line in waiting)):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(int(1000 * (min(end, shown) - now)) + 1)}
            if self._listener.fileno() in ready:
                waiting.append(Line(self._listener.accept()[0]))
            waiting = [line for line in waiting if line.fileno() not in ready or self._meet(line)]
        for line in waiting:
            line.close()
        self._listener.close()
        self.members.sort(key=lambda member: member.rank)

    def _meet(self, line: Line) -> bool:
        """Take in what a new connection says; return whether it has yet to say hello."""
        try:
            found = line.receive_all()
        except (LineLost, BadInputError) as error:
            if isinstance(error, BadInputError):
                self._refuse(line, "spoke another language: is it the same pytest-ranks there?")
            line.close()
            return False
        if not found:
            return True
        hello = found[0]
        is_one_of_us = (
            isinstance(hello, Hello)
            and hello.token == self.hello.token
            and hello.rank in self.missing()
        )
        if not is_one_of_us:
            self._refuse(line, "was no missing rank of this world: does another job run there?")
            return False
        member = Member(hello=hello, line=line, pending=found[1:])
        self.members.append(member)
        self._compare_clocks(member)
        return False

    def _refuse(self, line: Line, why: str) -> None:
        self.refused.append(f"what connected from {line.other_address()} {why}")
        line.close()

    def _compare_clocks(self, member: Member) -> None:
        """Find what separates the two clocks, from the quickest of a few questions."""
        best = float("inf")
        for _ in range(PINGS):
            asked = time.monotonic()
            pong = self.ask(member, Ping(), Pong)
            answered = time.monotonic()
            if pong is not None and answered - asked < best:
                best = answered - asked
                member.offset = (asked + answered) / 2 - pong.now

    # ---- who is there

    def missing(self) -> list[int]:
        """Return the ranks that have not said hello."""
        return sorted(set(range(1, self.world.size)) - {member.rank for member in self.members})

    def reachable(self) -> list[Member]:
        """Return the other ranks that are there, by number."""
        return [member for member in self.members if member.loss is None]

    def lost(self) -> list[Member]:
        """Return the other ranks that were there and are not any more."""
        return [member for member in self.members if member.loss is not None]

    def label(self, node: int) -> str:
        """Return what a node is called."""
        return node_labels([self.hello, *(member.hello for member in self.members)])[node]

    def host(self) -> str:
        """Return the address at which the other nodes reach this one."""
        for member in self.members:
            if member.hello.node != self.hello.node:
                return plain_address(member.line.own_address())
        return LOOPBACK

    def describe_losses(self) -> list[str]:
        """Return how ranks were lost, a sentence for all that were lost in the same way."""
        found: dict[str, list[Hello]] = {}
        for member in self.lost():
            assert member.loss is not None
            when = f"during {member.loss.during}" if member.loss.during else "between tests"
            found.setdefault(f"{member.loss.text}, {when}", []).append(member.hello)
        labels = {one.node: self.label(one.node) for hellos in found.values() for one in hellos}
        return [f"{who(hellos, labels)}: {text}" for text, hellos in found.items()]

    def too_few(self, world_size: int) -> str:
        """Return why a test cannot have so many ranks."""
        return (
            f"the test needs {world_size} ranks, {1 + len(self.reachable())} of the world's "
            f"{self.world.size} are left. Lost before: {'; '.join(self.describe_losses())}"
        )

    # ---- talking

    def send(self, member: Member, message: object) -> None:
        """Send a message to a rank that is there; that it is not any more is noted."""
        if member.loss is None:
            try:
                member.line.send(message)
            except LineLost as error:
                self.lose(member, error)

    def hear(self, member: Member) -> list[Any]:
        """Return what a rank has said; that it is gone, or leaves, is noted."""
        if member.loss is not None:
            return []
        found, member.pending = member.pending, []
        try:
            found += member.line.receive_all()
        except (LineLost, BadInputError) as error:
            self.lose(member, error)
        for message in found:
            if isinstance(message, Leaving):
                self.lose(member, LineLost(f"its pytest ended: {message.reason}"))
        return found

    def ask(self, member: Member, message: object, kind: type, **fields: object) -> Any:
        """Return a rank's answer, None where it gave none; what came before it is dropped.

        Args:
            member: who is asked.
            message: the question.
            kind: of the answer.
            fields: what the answer says of itself, where a late one to another may come.
        """
        self.send(member, message)
        return self._await(member, kind, time.monotonic() + ANSWER_SECONDS, **fields)

    def _await(self, member: Member, kind: type, end: float, **fields: object) -> Any:
        while member.loss is None:
            for found in self.hear(member):
                if isinstance(found, kind) and all(
                    getattr(found, name) == value for name, value in fields.items()
                ):
                    return found
            left = end - time.monotonic()
            if left <= 0:
                self.lose(member, LineLost(f"it did not answer within {ANSWER_SECONDS:g} s"))
            elif member.loss is None:
                poll = select.poll()
                poll.register(member.line.fileno(), select.POLLIN)
                poll.poll(int(left * 1000) + 1)
        return None

    def lose(self, member: Member, error: Exception) -> None:
        """Note that a rank is not there any more."""
        if member.loss is not None:
            return
        node = self.label(member.hello.node)
        at, text = time.monotonic(), str(error)
        if isinstance(error, LineLost) and error.is_silent:
            at -= SILENCE_SECONDS
            text += f" from node {node}: the link is cut, or the node is down"
        elif text == "its connection ended":
            text = f"its pytest on node {node} ended without a word"
        member.loss = Loss(text=text, at=at, during=self.during)
        member.line.close()

    def interrupt(self) -> None:
        """End what goes on, from a signal handler."""
        self.is_ending = True
        os.eventfd_write(self.wake, 1)

    # ---- the end

    def end(self, status: int) -> None:
        """Tell all ranks the exit status, and wait until they have it."""
        for member in self.reachable():
            self.send(member, End(status=status))
        end = time.monotonic() + ANSWER_SECONDS
        for member in self.reachable():
            self._await(member, Bye, end)
        for member in self.reachable():
            member.line.close()
