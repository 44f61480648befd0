"""CPU tokens: all or nothing, no more than there are, given back by the system, waited for aloud."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from pytest_ranks.launch.spec import ranks
from pytest_ranks.launch.tokens import CpuTokens, needed

SECONDS = 60  # what a loaded machine may need


class Worker(threading.Thread):
    """Holds tokens in a thread until it is told to stop; locks count by open file, not by process."""

    def __init__(self, folder: Path, wanted: int, *, long: float = SECONDS, who: str = "gw0"):
        super().__init__(daemon=True)
        self.said: list[str] = []
        self.complained = threading.Event()
        self._tokens = CpuTokens(folder, 2, who=who, say=self._say, long=long)
        self._wanted = wanted
        self.has = threading.Event()
        self.stop = threading.Event()
        self.start()

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.complained.set()

    def run(self) -> None:
        with self._tokens.held(self._wanted, f"test_of_{self._wanted}"):
            self.has.set()
            self.stop.wait(SECONDS)

    def end(self) -> None:
        self.stop.set()
        self.join(SECONDS)


def test_who_wants_more_than_is_left_waits_and_says_for_whom(tmp_path):
    with CpuTokens(tmp_path, 2, who="gw0", say=print).held(1, "test_with_a_longer_name"):
        pass
    first = Worker(tmp_path, 1)
    assert first.has.wait(SECONDS)
    second = Worker(tmp_path, 2, long=0.01, who="gw1")
    assert second.complained.wait(SECONDS)
    assert second.said == [
        "[gw1] test_of_2 has waited 0.01 s for 2 of 2 CPU tokens (--ranks-cpus). They were taken "
        "last by: gw0 test_of_1"
    ]
    assert not second.has.is_set()
    third = Worker(tmp_path, 1, long=0.01, who="gw2")  # has to wait at the gate
    assert third.complained.wait(SECONDS / 2)  # before the first one gives up by itself
    assert not third.has.is_set()
    first.end()
    assert second.has.wait(SECONDS)
    second.end()
    assert third.has.wait(SECONDS)
    third.end()


def test_more_ranks_than_tokens_run_alone(tmp_path):
    wide = Worker(tmp_path, 64)
    assert wide.has.wait(SECONDS)
    other = Worker(tmp_path, 1, long=0.01, who="gw1")
    assert other.complained.wait(SECONDS)
    assert not other.has.is_set()
    wide.end()
    assert other.has.wait(SECONDS)
    other.end()
    assert wide.said == []


def test_tokens_of_a_dead_worker_come_back(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with CpuTokens(tmp_path, 2, who="gw1", say=print).held(2, "test_dies"):
            os.write(writing, b"x")
            os._exit(1)
    os.read(reading, 1)
    os.waitpid(child, 0)
    one = Worker(tmp_path, 2)
    assert one.has.wait(SECONDS)
    one.end()


def test_what_an_item_needs():
    (two,) = ranks(2)
    (threads,) = ranks(4, fidelity="threads")
    (devices,) = ranks(2, backend="nccl")
    assert [needed(spec) for spec in (two, threads, devices)] == [2, 1, 0]


FILE = """
import os, time
import pytest


def note(rank, word):
    if rank.index == 0:
        with open(os.environ["RECORDED"] + ".turns", "a") as file:
            file.write(f"{word} {rank.world_size} {os.environ['PYTEST_XDIST_WORKER']}\\n")


@pytest.mark.parametrize("number", range(3))
@pytest.mark.ranks([1, 2, 3])
def test_it(rank, number):
    note(rank, "begin")
    time.sleep(0.2)
    note(rank, "end")


def test_plain():
    pass
"""


def test_workers_of_xdist_take_turns(run_session, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("xdist")
    recorded = tmp_path / "recorded"
    session = run_session(
        {"test_it.py": FILE},
        *("-n", "3", "--ranks-cpus=3", "-p", "no:randomly", "-p", "no:cov"),
        f"--basetemp={tmp_path / 'base'}",
        env={"RECORDED": str(recorded)},
    )
    assert session.returncode == 0, session.output
    at_work: Counter[str] = Counter()
    for line in Path(f"{recorded}.turns").read_text().splitlines():
        word, size, worker = line.split()
        at_work[worker] = int(size) if word == "begin" else 0
        busy = [count for count in at_work.values() if count]
        assert sum(busy) <= 3, at_work
    locks = sorted(path.name for path in tmp_path.glob("base/ranks-cpus-*/*"))
    assert locks == ["gate", "token0", "token1", "token2"]
