"""What the controller sees of ranks at work, where one dies while it is looked at."""

from __future__ import annotations

import os
import select
import socket
import threading

from pytest_ranks.launch.link import RankHandle
from pytest_ranks.launch.sight import Observer
from pytest_ranks.launch.wire import Channel


def test_a_rank_that_dies_with_our_question_unread_is_left_out() -> None:
    ours, theirs = socket.socketpair()
    channel, other = socket.socketpair()
    handle = RankHandle(
        label=0, rank=0, channel=Channel(channel), output=os.dup(2), stacks=os.dup(2)
    )
    handle.witness = ours.fileno()

    def die_unread() -> None:
        poll = select.poll()
        poll.register(theirs, select.POLLIN)
        poll.poll()
        theirs.close()  # the kernel then resets the connection

    thread = threading.Thread(target=die_unread)
    thread.start()
    try:
        assert Observer([handle]).look(records=True, seconds=60) == {}
    finally:
        thread.join()
        ours.close()
        other.close()
        handle.witness = None
        handle.close()
