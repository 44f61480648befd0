"""Whether the kernel killed a rank for memory, read from the control group that ranks live in.

The kernel kills with SIGKILL and leaves no word in the process; what it leaves is a counter:
`memory.events` of a version 2 group, `memory.oom_control` of a version 1 group
(Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the kernel).
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

MEBIBYTE = 1 << 20
# What version 1 shows where nobody set a limit: the largest number of whole pages.
_NO_LIMIT = 1 << 62


class Files(NamedTuple):
    """What a version of control groups calls the counter of kills and the limit."""

    counter: str
    limit: str


_VERSION_1 = Files("memory.oom_control", "memory.limit_in_bytes")
_VERSION_2 = Files("memory.events", "memory.max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Where control groups can be read.

    Attributes:
        point: folder of the mount.
        root: which group lies there; in a container it may be one far down.
        files: how its files are called.
    """

    point: Path
    root: str
    files: Files


class MemoryGroup:
    """The control group of this process, which ranks share unless a test moves them.

    Args:
        root: where `proc` and `sys` are found, for tests.

    Attributes:
        reason: why the counter cannot be read, empty where it can.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.reason = ""
        self._descriptor: int | None = None
        self._folder: Path | None = None
        self._top = Path("/")
        self._files = _VERSION_2
        try:
            self._open(root)
        except (OSError, ValueError) as error:
            self.reason = f"{type(error).__name__}: {error}"

    def _open(self, root: Path) -> None:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        groups = [line.split(":", 2) for line in lines]
        mounts = _mounts(root)
        for version, names in ((_VERSION_1, "memory"), (_VERSION_2, "")):
            path = next((path for _, found, path in groups if names in found.split(",")), None)
            mount = next((one for one in mounts if one.files == version), None)
            if path is None or mount is None:
                continue
            for folder in (mount.point / _below(path, mount.root), mount.point):
                with contextlib.suppress(OSError):
                    self._descriptor = os.open(folder / version.counter, os.O_RDONLY | os.O_CLOEXEC)
                    self._folder, self._top, self._files = folder, mount.point, version
                    self.kills()
                    return
        raise ValueError("no control group with a memory controller is mounted here")

    def kills(self) -> int | None:
        """Return how many processes of the group the kernel has killed for memory.

        None where that cannot be read. Takes about a microsecond.
        """
        if self._descriptor is None:
            return None
        try:
            text = os.pread(self._descriptor, 4096, 0).decode()
        except OSError:
            return None
        fields = (line.split() for line in text.splitlines())
        return next((int(one[1]) for one in fields if one[0] == "oom_kill"), None)

    def limit(self) -> int | None:
        """Return the lowest limit of the group and those above it in bytes, None without one."""
        found = []
        folder = self._folder
        while folder is not None:
            with contextlib.suppress(OSError, ValueError):
                found.append(int((folder / self._files.limit).read_text()))
            folder = folder.parent if folder != self._top else None
        return min((one for one in found if one < _NO_LIMIT), default=None)

    def explain(self, status: int | None, before: int | None) -> str:
        """Return what is known of a death by SIGKILL that was not ours; nothing for another one.

        Args:
            status: exit code or -signal of the process.
            before: what `kills` said before the run.
        """
        if status != -signal.SIGKILL:
            return ""
        after = self.kills()
        if before is None or after is None:
            why = self.reason or "the kernel counts no kills in this control group"
            return (
                "was killed by SIGKILL, and not by us: by the kernel for memory, by the test, or "
                f"by something else on this machine; which one cannot be told ({why})"
            )
        if after > before:
            limit = self.limit()
            bound = "no limit: the machine is out of memory"
            if limit is not None:
                bound = f"limit {limit / MEBIBYTE:.0f} MiB"
            return f"was killed by the kernel for memory (oom_kill {before} -> {after}, {bound})"
        return (
            "was killed by SIGKILL, and neither by us nor by the kernel for memory (oom_kill stays "
            f"{after}): the test, a process that it started, or something else on this machine "
            "sent it"
        )


@cache
def own_group() -> MemoryGroup:
    """Return the control group of this process, opened once."""
    return MemoryGroup()


def _mounts(root: Path) -> list[Mount]:
    found = []
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        group, point = fields.split(" ")[3:5]
        files = _VERSION_2 if kind == "cgroup2" else _VERSION_1
        is_memory = kind == "cgroup2" or "memory" in options.split()[-1].split(",")
        if kind in ("cgroup", "cgroup2") and is_memory:
            found.append(Mount(point=root / point.lstrip("/"), root=group, files=files))
    return found


def _below(path: str, root: str) -> str:
    """Return a group's path relative to the group that is mounted."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path.lstrip("/")
