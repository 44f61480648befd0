"""The witness of a rank and the observer that asks it, over a real socket in one process."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass

import pytest

from pytest_ranks.launch.forensics.sight import Observer
from pytest_ranks.launch.forensics.witness import HEADER, REQUEST, Witness

SECONDS = 60.0


@dataclass
class Handle:
    rank: int
    witness: int | None


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_witness_tells_where_the_main_thread_is_and_threading_does_not_see_it():
    before = threading.enumerate()
    descriptor = Witness().start()
    try:
        sight = Observer([Handle(0, descriptor)]).look(records=False, seconds=SECONDS)[0]
    finally:
        os.close(descriptor)
    assert threading.enumerate() == before
    functions = [function for _, _, function in sight.frames]
    assert functions[0] == "look"
    here = test_a_witness_tells_where_the_main_thread_is_and_threading_does_not_see_it
    assert here.__name__ in functions
    assert sight.call == "poll"
    assert not sight.is_waiting


def test_a_rank_that_dies_with_the_question_unread_is_left_out(pair):
    ours, theirs = pair
    died = threading.Timer(0.2, theirs.close)
    died.start()
    try:
        assert Observer([Handle(0, ours.fileno())]).look(records=False, seconds=SECONDS) == {}
    finally:
        died.join()


def test_a_rank_that_is_gone_or_not_there_yet_is_not_waited_for(pair):
    ours, theirs = pair
    theirs.close()
    handles = [Handle(0, ours.fileno()), Handle(1, None)]
    assert Observer(handles).look(records=True, seconds=SECONDS) == {}


def test_a_late_answer_to_an_earlier_question_is_not_taken_for_a_new_one(pair):
    ours, theirs = pair
    observer = Observer([Handle(0, ours.fileno())])
    assert observer.look(records=False, seconds=0.05) == {}  # it does not answer in time
    late, early = b'{"call": "late"}', b'{"call": "right"}'

    def answer() -> None:
        for number, body in ((1, late), (2, early)):
            theirs.recv(REQUEST.size)
            theirs.sendall(HEADER.pack(number, len(body)) + body)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        assert observer.look(records=False, seconds=SECONDS)[0].call == "right"
    finally:
        thread.join()
