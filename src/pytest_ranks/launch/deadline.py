"""The ladder for ranks that do not end: dump stacks, read them, terminate, kill."""

from __future__ import annotations

import os
import re
import signal
import sysconfig
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.launch.processes import STACKS_SIGNAL, has_ended, read_tail, send_signal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.link import RankHandle

DUMP_SECONDS = 0.5  # measured: 0.4 to 26 ms
TERMINATE_SECONDS = 0.2
MOST_CAUSES = 20  # of an exception: a chain may be a ring

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+).*:$")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_COLLECTIVES = (os.sep + "torch" + os.sep + "distributed" + os.sep,)
_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_HERE) + os.sep
PLUMBING = {"wrapper", "inner", "__call__", "_call_impl", "_wrapped_call_impl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where the main thread of a rank is: the user's frame, and what it called in torch."""

    collective: str
    function: str
    file: str
    line: int

    def __str__(self) -> str:
        place = f"{self.function} ({os.path.relpath(self.file)}:{self.line})"
        return f"{self.collective}, called from {place}" if self.collective else place


def dump_stacks(handles: Sequence[RankHandle]) -> list[str]:
    """Return the Python stacks of all threads of each rank, empty for one that cannot answer.

    The signal's handler is C code of faulthandler: it needs no GIL, so it works while the rank
    is blocked inside a collective.
    """
    for handle in handles:
        os.ftruncate(handle.stacks, 0)
        if handle.ready and handle.pidfd is not None:
            send_signal(handle.pidfd, STACKS_SIGNAL)
    end = time.monotonic() + DUMP_SECONDS
    before: list[int] | None = None
    while time.monotonic() < end:
        sizes = [os.fstat(handle.stacks).st_size for handle in handles]
        if sizes == before and all(sizes):
            break
        before = sizes
        time.sleep(0.02)
    return [read_tail(handle.stacks, 1 << 18) for handle in handles]


def terminate(handles: Sequence[RankHandle], *, seconds: float = TERMINATE_SECONDS) -> None:
    """Ask ranks to end, then kill them with everything below them.

    Args:
        handles: the ranks.
        seconds: to wait for those that do end when asked.
    """
    for handle in handles:
        if handle.pidfd is not None:
            send_signal(handle.pidfd, signal.SIGTERM)
    end = time.monotonic() + seconds
    for handle in handles:
        if handle.pidfd is not None:
            has_ended(handle.pidfd, timeout=max(0.0, end - time.monotonic()))
        handle.kill()


def find_where(dump: str, main_thread: int) -> Where | None:
    """Return where the main thread is, read from a faulthandler dump."""
    frames = main_frames(dump, main_thread)
    collective = ""
    for file, line, function in frames:
        if any(part in file for part in _COLLECTIVES):
            if function not in PLUMBING:
                collective = function
            continue
        if is_library(file):
            continue
        return Where(collective=collective, function=function, file=file, line=line)
    if frames:
        file, line, function = frames[0]
        return Where(collective="", function=function, file=file, line=line)
    return None


def collective_of(error: BaseException | None) -> str:
    """Return the name of the collective that an exception came out of, empty if out of none.

    Of the exception that this one was raised over, where it came out of none itself.
    """
    for _ in range(MOST_CAUSES):
        trace = error.__traceback__ if error is not None else None
        while trace is not None:
            code = trace.tb_frame.f_code
            if _COLLECTIVES[0] in code.co_filename and code.co_name not in PLUMBING:
                return code.co_name  # the outermost: what the user's line called
            trace = trace.tb_next
        error = error and (error.__cause__ or error.__context__)
    return ""


def main_frames(dump: str, main_thread: int) -> list[tuple[str, int, str]]:
    """Return file, line and function of the main thread's frames, innermost first.

    Of the thread that wrote the dump, where the main thread's number is not known (0).
    """
    frames: list[tuple[str, int, str]] = []
    in_main = False
    for text in dump.splitlines():
        if (head := _THREAD.match(text)) is not None:
            is_asked = main_thread == 0 and text.startswith("Current thread")
            in_main = is_asked or int(head[1], 16) == main_thread
        elif in_main and (frame := _FRAME.match(text)) is not None:
            frames.append((frame[1], int(frame[2]), frame[3]))
    return frames


def only_thread(dump: str, thread: int) -> str:
    """Return the part of a dump that is about one thread, empty where it is not in there."""
    kept: list[str] = []
    is_asked = False
    for text in dump.splitlines():
        if (head := _THREAD.match(text)) is not None:
            is_asked = int(head[1], 16) == thread
        if is_asked:
            kept.append(text)
    return "\n".join(kept)


def trim(dump: str) -> str:
    """Return a dump without the frames of pytest and of the rank's loop, and without extensions.

    Threads that are left with no frame go too, and numbers of threads, so that the stacks of
    ranks that are at the same place are the same text.
    """
    kept: list[str] = []
    head = ""
    for text in dump.splitlines():
        frame = _FRAME.match(text)
        if _THREAD.match(text) is not None:
            head = "current thread" if text.startswith("Current") else "another thread"
            head += " (most recent call first):"
        elif frame is not None and not is_plumbing(frame[1]):
            kept += [*([head] if head else []), text]
            head = ""
        elif frame is None and text.strip() and not text.startswith("Extension modules:"):
            kept.append(text)
    return "\n".join(kept)


def is_plumbing(file: str) -> bool:
    """Return whether a file only carries the call from the rank's loop to the user's code."""
    return file.startswith(("<frozen runpy>", _PACKAGE)) or any(
        f"{os.sep}{folder}{os.sep}" in file for folder in ("_pytest", "pluggy")
    )


def is_library(file: str) -> bool:
    """Return whether a file belongs to Python, an installed package, or to us."""
    paths = sysconfig.get_paths()
    folders = (paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"])
    return file.startswith(("<", *folders)) or os.path.dirname(file).startswith(_HERE)
