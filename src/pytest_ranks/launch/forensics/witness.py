"""A thread in the rank that tells what the rank is doing while its main thread is blocked.

It sleeps in a read of its own socket until the controller asks, so it costs a test nothing. It
needs the interpreter lock: collectives, store waits and sleeps release that; a rank whose main
thread holds it inside C code does not answer, and only the dump of its stacks is left.
"""

from __future__ import annotations

import _thread
import ast
import json
import linecache
import os
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat

if TYPE_CHECKING:
    from types import CodeType, FrameType

LOOK = b"look"  # where the main thread is
RECORDS = b"tell"  # that, and what torch's flight recorder holds
REQUEST = struct.Struct("!4sI")  # verb, number of the question
HEADER = struct.Struct("!II")  # number of the question, bytes of the answer
MOST_FRAMES = 80
MOST_RECORDS = 200  # of the newest; ranks that wait for each other are at most a few apart

TORCH = os.sep + "torch" + os.sep
TORCH_DISTRIBUTED = TORCH + "distributed" + os.sep
_ARGUMENTS = ("src", "dst", "group_src", "group_dst", "tag", "op", "timeout")


class Witness:
    """Answers the controller's questions about this process.

    Attributes:
        since: wall-clock nanoseconds from which records belong to the present run.
    """

    def __init__(self) -> None:
        self.since = time.time_ns()
        self._main = threading.main_thread().ident or 0
        self._own = 0

    def start(self) -> int:
        """Start the thread; returns the descriptor over which it is asked.

        The thread is unknown to `threading`: a test that counts threads sees its own.
        """
        ours, theirs = socket.socketpair()
        self._own = _thread.start_new_thread(self._serve, (theirs,))
        return ours.detach()

    def _serve(self, end: socket.socket) -> None:
        with end:
            while len(request := end.recv(REQUEST.size, socket.MSG_WAITALL)) == REQUEST.size:
                verb, number = REQUEST.unpack(request)
                data = json.dumps(self._answer(verb), default=str).encode()
                try:
                    end.sendall(HEADER.pack(number, len(data)) + data)
                except OSError:
                    return

    def _answer(self, verb: bytes) -> dict[str, Any]:
        try:
            return self._look() | (self._records() if verb == RECORDS else {})
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _look(self) -> dict[str, Any]:
        frames = sys._current_frames()
        others = [one for one in frames if one not in (self._main, self._own)]
        frame = frames.get(self._main)
        state, switches = _schedule()
        return {
            "state": state,
            "switches": switches,
            "other_threads": len(others),
            "instruction": frame.f_lasti if frame is not None else 0,
            "call": _call(frame),
            "arguments": _arguments(frame),
            "frames": _places(frame),
        }

    def _records(self) -> dict[str, Any]:
        records, reason = _compat.flight_records()
        mine = [one for one in records if one["time_created_ns"] >= self.since]
        return {
            "records": [_plain_record(one) for one in mine[-MOST_RECORDS:]],
            "left_out": max(0, len(mine) - MOST_RECORDS),
            "recorder": reason,
            "groups": _compat.group_members(),
        }


def _schedule() -> tuple[str, int]:
    """Return the kernel's state of the main thread, and how often it has left the processor."""
    state, switches = "", 0
    with open(f"/proc/self/task/{os.getpid()}/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "State":
                state = value.split()[0]
            elif name.endswith("ctxt_switches"):
                switches += int(value)
    return state, switches


def _places(frame: FrameType | None) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    while frame is not None and len(found) < MOST_FRAMES:
        found.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return what matters of one record of the flight recorder, its frames outwards."""
    _, _, op = str(record["profiling_name"]).rpartition(":")
    name, description = map(str, record["process_group"])
    label = name if description == "undefined" else description
    return {
        "op": op,
        "group": name,
        "label": "" if label == "default_pg" else label,
        "sequence": record["collective_seq_id"],
        "inputs": record["input_sizes"],
        "outputs": record["output_sizes"],
        "dtypes": record["input_dtypes"] or record["output_dtypes"],
        "created": record["time_created_ns"] / 1e9,
        "timeout": record["timeout_ms"] / 1e3,
        "is_over": bool(record["retired"]),
        "frames": [
            (one["filename"], one["line"], one["name"])
            for one in (record.get("frames") or ())[:MOST_FRAMES]
        ],
    }


def _arguments(frame: FrameType | None) -> dict[str, Any]:
    """Return the telling arguments of the torch.distributed call that the main thread is in.

    The flight recorder knows neither the root of a broadcast nor anything of send and recv.
    """
    found: dict[str, Any] = {}
    while frame is not None and TORCH_DISTRIBUTED in frame.f_code.co_filename:
        values = frame.f_locals
        for name in _ARGUMENTS:
            value = values.get(name)
            if value is not None and name not in found:
                found[name] = value.total_seconds() if name == "timeout" else _short(value)
        if "group" in values and "group" not in found:
            found["group"] = _compat.group_name(values["group"])
        tensor: Any = values.get("tensor")
        if hasattr(tensor, "dtype") and hasattr(tensor, "shape") and "tensor" not in found:
            found["tensor"] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        frame = frame.f_back
    return found


def _short(value: object) -> object:
    return value if isinstance(value, int) else str(value)


def _call(frame: FrameType | None) -> str:
    """Return the name of what the innermost frame calls now, such as `wait`; empty if unknown.

    A frame that calls into C has no frame below it: its own source tells what it waits for.
    """
    if frame is None:
        return ""
    segment = _segment(frame.f_code, frame.f_lasti)
    try:
        node = ast.parse(segment, mode="eval").body if segment else None
    except SyntaxError:
        return ""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _segment(code: CodeType, instruction: int) -> str:
    """Return the source of the expression that an instruction belongs to."""
    positions = list(code.co_positions())
    if not 0 <= instruction // 2 < len(positions):
        return ""
    first, last, start, end = positions[instruction // 2]
    if first is None or last is None or start is None or end is None:
        return ""
    lines = [linecache.getline(code.co_filename, n) for n in range(first, last + 1)]
    if not all(lines):
        return ""
    lines[-1] = lines[-1].encode()[:end].decode(errors="replace")
    lines[0] = lines[0].encode()[start:].decode(errors="replace")
    return "(" + "".join(lines) + ")"
