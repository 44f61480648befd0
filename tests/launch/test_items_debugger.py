"""A debugger on a chosen rank, at a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest

from launch.conftest import command, environment, write_files

pytest.importorskip("torch")

SECONDS = 120  # what a loaded machine may need; nothing here waits for a timeout
FILE = """
import time
import pytest
import torch.distributed as dist


@pytest.mark.ranks(2, timeout=2)
def test_stops(rank):
    mine = f"value of {rank.index}"
    breakpoint()
    print("captured again")
    dist.barrier()
    found = rank.gather(mine)
    assert found == ["value of 0", "value of 1"]


@pytest.mark.ranks(2, timeout=2)
def test_fails(rank):
    mine = 40 + rank.index
    dist.barrier()
    assert rank.index == 0, "one fails"
    dist.barrier()


@pytest.mark.ranks(2)
def test_last(rank):
    pass
"""


class Terminal:
    """A pytest session whose controlling terminal is ours."""

    def __init__(self, arguments: list[str], **keywords: object) -> None:
        self._ours, theirs = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=take_terminal,  # noqa: PLW1509 - a terminal is had in no other way
            **keywords,
        )
        os.close(theirs)
        self._seen = ""

    def read_until(self, wanted: str) -> str:
        """Return what was written up to a text, which has to come."""
        self._read(until=wanted, seconds=SECONDS)
        assert wanted in self._seen, f"no {wanted!r} in {self._seen}"
        found, _, self._seen = self._seen.partition(wanted)
        return found + wanted

    def _read(self, *, until: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while until not in self._seen and time.monotonic() < end:
            try:
                if select.select([self._ours], [], [], 1)[0]:
                    data = os.read(self._ours, 4096).decode(errors="replace")
                    self._seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", data)
            except OSError:  # the other end is closed
                return

    def press(self, key: str) -> None:
        os.write(self._ours, key.encode())

    def press_until(self, key: str, wanted: str) -> None:
        """Press a key again until a text comes: what comes before the prompt waits may be lost."""
        end = time.monotonic() + SECONDS
        while wanted not in self._seen and time.monotonic() < end:
            self.press(key)
            self._read(until=wanted, seconds=5)
        self.read_until(wanted)

    def say(self, line: str) -> None:
        self.press(line + "\n")

    def ask(self, line: str, prompt: str = "(Pdb) ") -> str:
        self.say(line)
        return self.read_until(prompt)

    def end(self) -> tuple[int, str]:
        """Return the exit status, and all that was written last."""
        written = self.read_until(" in ") + self.read_until("s ====")
        return self.process.wait(SECONDS), written

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


@pytest.fixture
def debug(tmp_path) -> Iterator[Callable[..., Terminal]]:
    opened = []

    def start(*arguments: str) -> Terminal:
        write_files(tmp_path, {"test_it.py": FILE})
        variables = {**environment(tmp_path), "TERM": "dumb", "PYTHON_COLORS": "0"}
        opened.append(
            Terminal(
                command("-p", "no:randomly", "-p", "no:rerunfailures", *arguments),
                cwd=tmp_path,
                env=variables,
            )
        )
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_breakpoint_stops_the_chosen_rank_alone_and_the_test_goes_on(debug):
    others = [] if find_spec("pytest_timeout") is None else ["--timeout=2"]
    terminal = debug("--ranks-debug=1", "-k", "stops or last", *others)
    shown = terminal.read_until("(Pdb) ")
    assert "[rank 1 of 2 has the terminal]" in shown
    assert "PDB set_trace (IO-capturing turned off)" in shown
    assert "'value of 1'" in terminal.ask("mine")
    time.sleep(3)  # not for synchronisation: longer than the deadlines of test and pytest-timeout
    assert "-> dist.barrier()" in terminal.ask("next")
    shown = terminal.ask("continue", "PDB continue (IO-capturing resumed)")
    status, shown = terminal.end()
    assert "2 passed" in shown
    assert "captured again" not in shown
    assert status == 0


def test_trace_begins_in_the_debugger_ctrl_c_is_its_own_and_quitting_ends_the_session(debug):
    terminal = debug("--trace", "--ranks-debug=1", "-k", "fails")
    shown = terminal.read_until("(Pdb) ")
    assert "PDB runcall (IO-capturing turned off)" in shown
    assert "mine = 40 + rank.index" in shown
    # With a line end, the debugger may read that before the signal comes.
    terminal.press_until("\x03", "--KeyboardInterrupt--")
    assert "<rank 1 of 2>" in terminal.ask("rank", "<rank 1 of 2>")
    terminal.read_until("(Pdb) ")
    terminal.say("quit")
    assert "_pytest.outcomes.Exit: Quitting debugger" in terminal.read_until(" in ")
    assert terminal.process.wait(SECONDS) == 2


def test_post_mortem_is_on_the_rank_that_failed_while_its_peers_wait(debug):
    terminal = debug("--pdb", "-k", "fails or last")
    shown = terminal.read_until("(Pdb) ")
    assert "[rank 1 of 2 has the terminal]" in shown
    assert "AssertionError: one fails" in shown
    assert "41" in terminal.ask("mine")
    time.sleep(3)  # as above
    assert "2" in terminal.ask("dist.get_world_size()")
    terminal.say("continue")
    status, shown = terminal.end()
    assert "rank 1 of 2 failed first" in shown
    assert "collateral: rank 0" in shown
    assert "1 failed, 1 passed" in shown
    assert status == 1


WORLDS = """
import pytest

@pytest.mark.ranks([1, 3])
def test_real(rank):
    breakpoint()

@pytest.mark.ranks(16, fidelity="fake")
def test_one_process_plays_a_rank(rank):
    pass

def test_plain():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks-debug=3"], "no test had a rank 3, the widest world had 3"),
        (["--ranks-debug=0", "-k", "plain"], "no test had a rank 0, none ran on ranks"),
        (["--ranks-debug=2", "-k", "one_process"], "no test had a rank 2, the widest world had 1"),
        (["--ranks-debug=1", "--collect-only"], ""),
    ],
)
def test_a_rank_to_debug_that_no_test_had_is_told(run_session, arguments, told):
    session = run_session({"test_it.py": WORLDS}, *arguments)
    assert session.returncode == 0, session.output
    lines = [line for line in session.output.splitlines() if "no test had" in line]
    assert lines == ([f"{arguments[0]}: {told}"] if told else [])


def test_a_breakpoint_without_a_terminal_is_a_sentence(run_session):
    session = run_session({"test_it.py": FILE}, "-p", "no:randomly", "-k", "stops")
    text = session.call("test_stops").text
    assert (
        "breakpoint() on rank 0: a rank has no terminal; run with --ranks-debug=0 to have" in text
    )
    assert "no test had a rank" not in session.output
    if "xdist" in sys.modules:
        session = run_session({"test_it.py": FILE}, "-n", "2", "--ranks-debug=1")
        assert session.returncode == 4
        assert (
            "--ranks-debug=1: a debugger needs the terminal, which xdist's workers do not have; "
            "add -n0" in session.output
        )
