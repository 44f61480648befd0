"""Rank 0's end of a world: who is admitted, whose clock is compared, and how a loss reads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pytest_ranks.launch.machines import crew
from pytest_ranks.launch.machines.coordination import Bye, End, Hello, Leaving, Ping, Pong
from pytest_ranks.launch.machines.hub import Hub
from pytest_ranks.launch.machines.line import Line
from pytest_ranks.launch.machines.outer_world import OuterWorld
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Finished, Phase

WORLD = OuterWorld(
    launcher="srun",
    rank=0,
    size=3,
    node=0,
    nodes=1,
    node_name="a",
    address="127.0.0.1",
    port=0,
    has_store=False,
    run="1.0",
)
HELLO = Hello(token="secret", rank=0, node=0, node_name="a")
AHEAD = 1000.0  # seconds by which the clocks of the others are ahead


class Other:
    """What another rank does to join, in a thread of its own."""

    def __init__(self, port: int) -> None:
        self.line = Line(socket.create_connection(("127.0.0.1", port)))
        self.heard: list[object] = []
        self._thread: threading.Thread | None = None

    def join(self, hello: object) -> None:
        self.line.send(hello)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            try:
                message = self.line.receive(60)
            except Exception:
                return
            self.heard.append(message)
            if isinstance(message, Ping):
                self.line.send(Pong(now=time.monotonic() + AHEAD))
            if isinstance(message, End):
                self.line.send(Bye())
                return

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(60)
        self.line.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(WORLD, HELLO)
    yield made
    for member in made.members:
        member.line.close()


def test_only_missing_ranks_of_this_world_are_admitted(hub: Hub) -> None:
    port = hub.listen(0)
    hellos = [
        replace(HELLO, rank=2, node=1, node_name="b"),
        replace(HELLO, rank=1, token="of another job"),
        replace(HELLO, rank=7),
        replace(HELLO, rank=1),
    ]
    others = [Other(port) for _ in hellos]
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(b"\0\0\0\5hello")
    for other, hello in zip(others, hellos, strict=True):
        other.join(hello)
    hub.admit(time.monotonic() + 60, lambda _: None)
    assert [member.rank for member in hub.members] == [1, 2]
    assert hub.missing() == []
    assert all(abs(member.offset + AHEAD) < 1 for member in hub.members)
    # the stranger and the first two of the others may come after the last one that was missing
    assert set(hub.refused) <= {
        "what connected from 127.0.0.1 spoke another language: is it the same pytest-ranks there?",
        "what connected from 127.0.0.1 was no missing rank of this world: does another job run "
        "there?",
    }
    hub.end(5)
    assert others[0].heard[-1] == End(status=5)
    assert others[3].heard[-1] == End(status=5)
    for other in others:
        other.close()
    stranger.close()


def test_who_else_connects_is_named_where_ranks_are_missing(hub: Hub) -> None:
    port = hub.listen(0)
    shown: list[list[int]] = []
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"\0\0\0\5hello")
        other = Other(port)
        other.join(replace(HELLO, rank=1, token="of another job"))
        hub.admit(time.monotonic() + 1, shown.append)
    other.close()
    assert hub.missing() == [1, 2]
    assert sorted(hub.refused) == [
        "what connected from 127.0.0.1 spoke another language: is it the same pytest-ranks there?",
        "what connected from 127.0.0.1 was no missing rank of this world: does another job run "
        "there?",
    ]


def test_a_rank_that_leaves_says_why(hub: Hub) -> None:
    port = hub.listen(0)
    others = [Other(port), Other(port)]
    for rank, other in enumerate(others, start=1):
        other.join(replace(HELLO, rank=rank, node=rank, node_name=f"n{rank}"))
    hub.admit(time.monotonic() + 60, lambda _: None)
    hub.during = "test_a.py::test_x"
    others[0].line.send(Leaving(reason="it was interrupted"))
    others[1].line._socket.shutdown(socket.SHUT_RDWR)
    for member in hub.members:
        assert hub.ask(member, Ping(), Bye) is None
    assert hub.describe_losses() == [
        "rank 1 (node n1): its pytest ended: it was interrupted, during test_a.py::test_x",
        "rank 2 (node n2): its pytest on node n2 ended without a word, during test_a.py::test_x",
    ]
    assert hub.too_few(3).startswith("the test needs 3 ranks, 1 of the world's 3 are left. Lost")
    for other in others:
        other.close()


def test_times_of_another_machine_become_ours() -> None:
    phase = Phase(when="call", outcome="failed", was_xfail=None, report={}, at=AHEAD + 3)
    run = RankRun(rank=0, at=AHEAD + 4, messages=[phase, Finished(phases=(phase,))])
    ours = crew._ours(run, 2, -AHEAD)
    assert (ours.rank, ours.at) == (2, 4)
    assert ours.messages[0].at == 3
    assert ours.messages[1].phases[0].at == 3
