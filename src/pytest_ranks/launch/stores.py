"""Rendezvous stores: served by a child of the zygote, kept ready by the controller.

A store is a place where the ranks of one run find each other. To open one takes most of a
millisecond and a reverse look-up of its address, so the next one is asked for while the ranks
are at work, and one that nobody wrote to is taken again.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.channel import Channel, channel_pair
from pytest_ranks.launch.group import LOOPBACK
from pytest_ranks.launch.resolver import look_up_in_files
from pytest_ranks.launch.start_watch import LOOK_SECONDS, START_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from typing import NoReturn


class Stores:
    """The stores of one controller, asked for ahead of need.

    Args:
        start: hands the other end of the channel to whoever serves the stores.
    """

    def __init__(self, start: Callable[[socket], None]) -> None:
        self._start = start
        self._channel: Channel | None = None
        self._free: list[int] = []
        self._asked = 0

    def prepare(self) -> None:
        """Ask for a store that is soon needed; returns at once.

        Raises:
            ChannelClosed: the process that serves them ended.
        """
        if not self._free and not self._asked:
            self._ask("open")

    def take(
        self, *, seconds: float = START_SECONDS, look: Callable[[], None] = lambda: None
    ) -> int:
        """Return the port of a store that nobody has written to.

        Args:
            seconds: to wait; before the first store the zygote imports.
            look: called now and then meanwhile.

        Raises:
            UnavailableError: torch cannot be imported.
            TimeoutError: there was no answer.
            ChannelClosed: the process that serves them ended.
        """
        if not self._free:
            self.prepare()
            assert self._channel is not None
            answer = self._await(self._channel, seconds, look)
            self._asked -= 1
            if isinstance(answer, str):
                raise UnavailableError(f"no rendezvous store: {answer}")
            self._free.append(int(answer))
        return self._free.pop()

    def _await(self, channel: Channel, seconds: float, look: Callable[[], None]) -> Any:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > LOOK_SECONDS:
            with contextlib.suppress(TimeoutError):
                return channel.receive(LOOK_SECONDS)[0]
            look()
        return channel.receive(max(0.0, left))[0]

    def give_back(self, port: int, *, is_used: bool) -> None:
        """Give a store back, and ask for one in its place.

        Args:
            port: of the store.
            is_used: whether it may hold, or still get, something; else it is looked at.

        Raises:
            ChannelClosed: the process that serves them ended.
        """
        self._ask("replace" if is_used else "renew", port)

    def close(self) -> None:
        """Close the channel, which ends the process that serves the stores."""
        if self._channel is not None:
            self._channel.close()

    def _ask(self, verb: str, port: int = 0) -> None:
        if self._channel is None:
            ours, theirs = channel_pair()
            self._start(theirs)
            theirs.close()
            self._channel = ours
        if self._asked + len(self._free) > 1:  # two are ready: a run's, and a new pool's own
            self._channel.send(("close", port))
            return
        self._channel.send((verb, port))
        self._asked += 1


def serve_stores(channel: Channel) -> NoReturn:
    """Answer each request with the port of a store that nobody has written to."""
    look_up_in_files()
    stores: dict[int, tuple[Any, int]] = {}  # with how many keys it was born
    while True:
        (verb, port), _ = channel.receive()
        try:
            if verb == "renew" and stores[port][0].num_keys() == stores[port][1]:
                channel.send(port)
                continue
            stores.pop(port, None)
            if verb != "close":
                opened = _open_store()
                stores[opened.port] = opened, opened.num_keys()
                channel.send(opened.port)
                del opened  # or it would outlive its place in the table
        except Exception as error:
            channel.send(f"{type(error).__name__}: {error}")


def _open_store() -> Any:
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        LOOPBACK, 0, is_master=True, wait_for_workers=False
    )
