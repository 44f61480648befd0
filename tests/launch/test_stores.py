"""Rendezvous stores are ready ahead of need, and nobody gets one that was written to."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.stores import Stores

torch = pytest.importorskip("torch")

SERVER = """
import sys
from pytest_ranks.launch.stores import serve_stores
from pytest_ranks.launch.channel import Channel
if "broken" in sys.argv:
    sys.modules["torch.distributed"] = None
serve_stores(Channel.from_fd(int(sys.argv[1])))
"""


@pytest.fixture
def serve():
    made, started = [], []

    def make(*arguments):
        def start(end):
            command = [sys.executable, "-c", SERVER, str(end.fileno()), *arguments]
            started.append(
                subprocess.Popen(command, pass_fds=(end.fileno(),), stderr=subprocess.DEVNULL)
            )

        made.append(Stores(start))
        return made[-1]

    yield make
    for stores in made:
        stores.close()
    for process in started:
        process.wait()


@pytest.fixture
def stores(serve):
    return serve()


def write(port):
    client = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    client.set("left", "behind")


def test_an_untouched_store_is_taken_again_and_a_written_one_is_not(stores):
    first = stores.take()
    stores.give_back(first, is_used=False)
    assert stores.take() == first
    write(first)
    stores.give_back(first, is_used=False)
    second = stores.take()
    assert second != first
    stores.give_back(second, is_used=True)
    third = stores.take()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", first))
    write(third)


def test_stores_do_not_pile_up(stores):
    taken = [stores.take() for _ in range(4)]
    assert len(set(taken)) == 4
    for port in taken:
        stores.give_back(port, is_used=False)
    ready = [stores.take() for _ in range(2)]
    assert set(ready) <= set(taken)
    closed = set(taken) - set(ready)
    assert stores.take() not in closed


def test_a_store_that_cannot_be_opened_says_why(serve):
    with pytest.raises(UnavailableError, match=r"no rendezvous store: ModuleNotFoundError: "):
        serve("broken").take()
