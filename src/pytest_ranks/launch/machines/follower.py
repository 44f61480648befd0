"""The pytest of a rank other than 0: it collects, then runs on its rank what rank 0 says."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.machines.coordination import (
    Bye,
    Done,
    End,
    Failed,
    Leaving,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Result,
    Retire,
    Run,
    Told,
)
from pytest_ranks.launch.machines.line import Line, LineLost
from pytest_ranks.launch.machines.spread import own_interface
from pytest_ranks.launch.outcome import ExpectedEnd
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.service import is_failure, is_last
from pytest_ranks.launch.wire import Injected, Raised, RunItem

if TYPE_CHECKING:
    from pytest_ranks.launch.service import RankService

RETRY_SECONDS = 0.2


def reach(host: str, port: int, end: float) -> Line:
    """Return a connection to rank 0, which may not listen yet.

    Raises:
        UnavailableError: there is none when the time is up.
    """
    while True:
        left = end - time.monotonic()
        try:
            return Line(socket.create_connection((host, port), timeout=max(0.1, left)))
        except OSError as error:
            if left <= RETRY_SECONDS:
                raise UnavailableError(
                    f"rank 0 could not be reached at {host} port {port}: {error}"
                ) from None
        time.sleep(RETRY_SECONDS)


class Follower:
    """Serves rank 0 over one connection until the session ends.

    Args:
        line: to rank 0.
        service: starts the zygote that the rank's processes are forked from.
    """

    def __init__(self, line: Line, service: RankService) -> None:
        self._line = line
        self._service = service
        self._pools: dict[int, Ranks] = {}
        self._gone: set[int] = set()  # pools whose rank ended with the zygote
        self._backlog: list[Any] = []

    def serve(self) -> int:
        """Answer rank 0 until it says that the session is over; return the exit status.

        Raises:
            LineLost: rank 0 is gone or out of reach.
        """
        while True:
            message = self._backlog.pop(0) if self._backlog else self._line.receive(None)
            if isinstance(message, End):
                self._line.send(Bye())
                return message.status
            self._answer(message)

    def leave(self, reason: str) -> None:
        """Tell rank 0 that this pytest ends of its own accord."""
        try:
            self._line.send(Leaving(reason=reason))
        except LineLost:
            return
        self._line.close()

    def _answer(self, message: object) -> None:
        if isinstance(message, Ping):
            self._line.send(Pong(now=time.monotonic()))
        elif isinstance(message, Prepare):
            self._line.send(Prepared(pool=message.pool, lives=self._prepare(message.pool)))
        elif isinstance(message, Run):
            self._line.send(Result(number=message.number, run=self._run(message)))
        elif isinstance(message, Retire):
            self._retire(message.pool)

    def _prepare(self, pool: int) -> bool:
        """Return whether the rank process of a pool lives, forked now where the pool is new."""
        if pool in self._gone:
            return False
        try:
            if pool not in self._pools:
                self._pools[pool] = Ranks(self._service.link, 1)
            return self._pools[pool].is_alive()
        except UnavailableError:  # the run meets it again, and tells
            return True

    def _run(self, order: Run) -> RankRun:
        rank0 = _RankZero(self._line, order)
        try:
            if order.pool not in self._pools:
                self._pools[order.pool] = Ranks(self._service.link, 1)
            request = _prepared(order.request)
            runs, _ = self._pools[order.pool].run(
                lambda _: request,
                is_last=is_last,
                is_failure=is_failure,
                timeout=order.seconds,
                starts=order.starts,
                peers=rank0,
                expected_ends=_ends(order),
                on_injected=rank0.tell_fault,
            )
        except UnavailableError as error:
            self._gone |= set(self._pools)
            self._pools.clear()
            self._service.recover(error)
            rank0.tell_failure()
            now = time.monotonic()
            told = Raised(headline=str(error), traceback="", at=now)
            return RankRun(rank=0, done=True, at=now, messages=[told])
        finally:
            self._backlog += rank0.others
        if rank0.lost is not None:
            raise rank0.lost
        return runs[0]

    def _retire(self, pool: int) -> None:
        ranks = self._pools.pop(pool, None)
        if ranks is not None:
            ranks.kill()
            ranks.forget()


class _RankZero:
    """The other ranks of one run, of which only rank 0 speaks to this one."""

    def __init__(self, line: Line, order: Run) -> None:
        self.others: list[Any] = []
        self.lost: LineLost | None = None
        self._line = line
        self._order = order
        self._failed = False
        self._finished = False
        self._told = False

    def fileno(self) -> int:
        return self._line.fileno()

    def pump(self) -> None:
        try:
            found = self._line.receive_all()
        except LineLost as error:
            self.lost, self._failed = error, True
            return
        for message in found:
            is_mine = getattr(message, "number", None) == self._order.number
            if isinstance(message, Failed) and is_mine:
                self._failed = True
            elif isinstance(message, Done) and is_mine:
                self._finished = True
            elif not isinstance(message, Failed | Done):
                self.others.append(message)
                self._failed = self._failed or isinstance(message, Retire | End)

    def tell_failure(self) -> None:
        if not self._told:
            self._told = True
            self._send(Failed(number=self._order.number))

    def _send(self, message: object) -> None:
        if self.lost is None:
            try:
                self._line.send(message)
            except LineLost as error:
                self.lost, self._failed = error, True

    def tell_fault(self, fault: Injected) -> None:
        self._send(Told(number=self._order.number, fault=fault))

    def has_failed(self) -> bool:
        return self._failed

    def has_finished(self) -> bool:
        return self._finished


def _ends(order: Run) -> dict[int, ExpectedEnd]:
    """Return the declared ends; our rank is number 0 here, others only have to be there."""
    return {
        0 if rank == order.rank else -1 - rank: ExpectedEnd(text=text, statuses=frozenset(statuses))
        for rank, text, statuses in order.ends
    }


def _prepared(request: Any) -> Any:
    """Return a request with what only this machine knows, and make its folders."""
    if not isinstance(request, RunItem):
        return request
    if request.world.shared_tmp_path is not None:
        Path(request.world.shared_tmp_path).mkdir(parents=True, exist_ok=True)
    rendezvous = request.world.rendezvous
    if rendezvous is None or rendezvous.interface:
        return request
    rendezvous = replace(rendezvous, interface=own_interface(rendezvous.host))
    return replace(request, world=replace(request.world, rendezvous=rendezvous))
