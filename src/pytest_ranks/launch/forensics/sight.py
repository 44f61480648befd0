"""What the witness of each rank saw, asked for and read by the controller."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch import deadline
from pytest_ranks.launch.forensics.witness import (
    HEADER,
    LOOK,
    RECORDS,
    REQUEST,
    TORCH,
    TORCH_DISTRIBUTED,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.link import RankHandle

# A witness answers in under a millisecond, with 2,000 records in 20; on a machine with more ranks
# than cores it has to wait for its turn.
ANSWER_SECONDS = 1.0
# torch's own words for types, as its flight recorder writes them.
_DTYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Bool": "bool",
}
_PEER_TO_PEER = ("send", "recv")
_WAITING_CALLS = ("wait", "wait_tensor", "synchronize")
# The files whose functions are torch.distributed's collectives.
_FACE = ("distributed_c10d.py", "c10d_logger.py")

Place = tuple[str, int, str]  # file, line, function


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One collective that a rank has issued, as torch's flight recorder tells it.

    Attributes:
        op: its name, without the backend's.
        group: name of the process group.
        label: what the group is for, as in `mesh_dp`, or its name; empty for the default group.
        sequence: its number in the group, from 1.
        inputs: shapes of the tensors that went in.
        outputs: shapes of those that come out.
        dtypes: of the tensors, in torch's words of today: `float32`.
        created: wall-clock seconds at which it was issued.
        timeout: seconds that torch gives it.
        is_over: whether it has ended.
        frames: where it was issued, innermost first.
    """

    op: str
    group: str
    sequence: int
    label: str = ""
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    created: float = 0.0
    timeout: float = 0.0
    is_over: bool = False
    frames: tuple[Place, ...] = ()

    @property
    def name(self) -> str:
        """What the user's side called: gloo's reduce_scatter is an all_reduce to the recorder."""
        name = self.op
        for file, _, function in self.frames:
            if not file.endswith(_FACE):
                break
            if function not in deadline.PLUMBING:
                name = function
        return name

    @property
    def what(self) -> str:
        """The collective in words: `all_reduce #3 of float32 [4, 2]`."""
        shapes = self.inputs or self.outputs
        if not shapes:
            return f"{self.name} #{self.sequence}"
        dtype = self.dtypes[0] if self.dtypes else "tensor"
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        return f"{self.name} #{self.sequence} of {dtype} {list(shapes[0])}{more}"

    @property
    def site(self) -> str:
        """The user's line that issued it, empty where torch did not record it."""
        return site(self.frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The members of a process group and its timeout in seconds, None where torch is silent."""

    ranks: tuple[int, ...]
    timeout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What one rank was doing at one moment.

    Attributes:
        rank: its number.
        frames: of its main thread, innermost first.
        instruction: which one of the innermost frame.
        call: name of what that instruction calls, empty where its source does not tell.
        is_blocked: whether the main thread sleeps in the kernel.
        switches: how often it has gone to sleep or been taken off the processor.
        other_threads: how many other Python threads the process has.
        arguments: of the torch.distributed call that it is in.
        records: the collectives of this run, oldest first.
        left_out: how many older ones there are.
        groups: by name.
        recorder: why there are no records, empty where there may be.
    """

    rank: int
    frames: tuple[Place, ...] = ()
    instruction: int = 0
    call: str = ""
    is_blocked: bool = False
    switches: int = 0
    other_threads: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    left_out: int = 0
    groups: dict[str, Group] = field(default_factory=dict)
    recorder: str = ""

    @property
    def pending(self) -> tuple[Record, ...]:
        """The collectives that have not ended."""
        return tuple(record for record in self.records if not record.is_over)

    @property
    def torch_call(self) -> str:
        """The outermost function of torch.distributed that the main thread is in, or nothing."""
        name = ""
        for file, _, function in self.frames:
            if TORCH_DISTRIBUTED not in file:
                break
            if function not in deadline.PLUMBING:
                name = function
        return name

    @property
    def is_waiting(self) -> bool:
        """Whether the main thread is blocked in communication, as far as its frames tell."""
        if not self.frames:
            return False
        file = self.frames[0][0]
        if TORCH_DISTRIBUTED in file:
            return True
        return bool(self.pending) and (TORCH in file or self.call in _WAITING_CALLS)

    @property
    def waits_for(self) -> tuple[Record, ...]:
        """The collectives of which one has to end before the main thread goes on.

        One where it is in that collective's own function; all that have not ended where it
        waits for a handle, or in C++, as a backward pass under DDP does; none where it waits
        for something else, such as a store.
        """
        pending = self.pending
        if not self.is_waiting or not pending:
            return ()
        file, _, function = self.frames[0]
        newest = pending[-1].frames
        if newest and (newest[0][0], newest[0][2]) == (file, function):
            return pending[-1:]
        is_elsewhere = TORCH_DISTRIBUTED in file and self.call not in _WAITING_CALLS
        return () if is_elsewhere else pending

    @property
    def root(self) -> object:
        """The root that it calls its collective with, None where there is none."""
        values = self.arguments
        return values.get("group_src", values.get("group_dst"))

    @property
    def peer(self) -> int | None:
        """The rank that a `send` or `recv` waits for, None where it is in none or takes any."""
        if self.torch_call not in _PEER_TO_PEER:
            return None
        group = self.groups.get(str(self.arguments.get("group")))
        name = "dst" if self.torch_call == "send" else "src"
        inside = self.arguments.get(f"group_{name}")
        if group is not None and isinstance(inside, int) and inside < len(group.ranks):
            return group.ranks[inside]
        found = self.arguments.get(name)
        return found if isinstance(found, int) else None

    @property
    def is_peer_to_peer(self) -> bool:
        """Whether the main thread is in a `send` or `recv`."""
        return self.torch_call in _PEER_TO_PEER

    @property
    def site(self) -> str:
        """The user's function and line that the main thread is in."""
        return site(self.frames)


def site(frames: Sequence[Place]) -> str:
    """Return the innermost frame of the user's as `function (file:line)`, empty without one."""
    for file, line, function in frames:
        if not deadline.is_library(file) and not deadline.is_plumbing(file):
            return f"{function} ({os.path.relpath(file)}:{line})"
    return ""


class Observer:
    """Asks the witnesses of some ranks, and takes their answers.

    Args:
        handles: of the ranks; one whose witness is not there yet is not asked.
    """

    def __init__(self, handles: Sequence[RankHandle]) -> None:
        self._handles = handles
        self._data = {handle.rank: bytearray() for handle in handles}
        self._number = 0

    def look(self, *, records: bool, seconds: float = ANSWER_SECONDS) -> dict[int, Sight]:
        """Return what each rank is doing, without those that do not answer in time.

        Args:
            records: whether to ask for what torch's flight recorder holds too.
            seconds: how long to wait for the last answer.
        """
        self._number += 1
        request = REQUEST.pack(RECORDS if records else LOOK, self._number)
        waiting: dict[int, int] = {}  # descriptor -> rank
        for handle in self._handles:
            fd = handle.witness
            if fd is None:
                continue
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as end:
                end.send(request, socket.MSG_DONTWAIT)
                waiting[fd] = handle.rank
        found: dict[int, Sight] = {}
        end_at = time.monotonic() + seconds
        while waiting and (left := end_at - time.monotonic()) > 0:
            poll = select.poll()
            for fd in waiting:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(int(left * 1000) + 1):
                rank = waiting[fd]
                chunk = b""
                with contextlib.suppress(ConnectionResetError):  # it ended with our question unread
                    chunk = os.read(fd, 1 << 16)
                self._data[rank] += chunk
                answer = _take(self._data[rank], self._number)
                if answer is not None:
                    found[rank] = read(rank, answer)
                if answer is not None or not chunk:
                    del waiting[fd]
        return found


def _take(data: bytearray, number: int) -> dict[str, Any] | None:
    """Return the answer to a question once it is complete; late answers to others are dropped."""
    while len(data) >= HEADER.size:
        found, length = HEADER.unpack_from(data)
        end = HEADER.size + length
        if len(data) < end:
            return None
        body = bytes(data[HEADER.size : end])
        del data[:end]
        if found == number:
            answer: dict[str, Any] = json.loads(body)
            return answer
    return None


def read(rank: int, answer: dict[str, Any]) -> Sight:
    """Return a witness's answer as a sight."""
    return Sight(
        rank=rank,
        frames=_places(answer.get("frames")),
        instruction=answer.get("instruction", 0),
        call=answer.get("call", ""),
        is_blocked=answer.get("state") == "S",
        switches=answer.get("switches", 0),
        other_threads=answer.get("other_threads", 0),
        arguments=answer.get("arguments", {}),
        records=tuple(_record(one) for one in answer.get("records", ())),
        left_out=answer.get("left_out", 0),
        groups={
            name: Group(ranks=tuple(one["ranks"]), timeout=one["timeout"])
            for name, one in answer.get("groups", {}).items()
        },
        recorder=answer.get("recorder") or answer.get("error", ""),
    )


def _record(one: dict[str, Any]) -> Record:
    return Record(
        op=one["op"],
        group=one["group"],
        label=one["label"],
        sequence=one["sequence"],
        inputs=tuple(map(tuple, one["inputs"])),
        outputs=tuple(map(tuple, one["outputs"])),
        dtypes=tuple(_DTYPES.get(name, name) for name in one["dtypes"]),
        created=one["created"],
        timeout=one["timeout"],
        is_over=one["is_over"],
        frames=_places(one["frames"]),
    )


def _places(found: Any) -> tuple[Place, ...]:
    return tuple((str(file), line or 0, str(function)) for file, line, function in found or ())
