"""Open files and sockets that a test left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import stat
from collections import Counter
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_state
from pytest_ranks.launch.group import is_of_the_run

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

_FOLDER = "/proc/self/fd"


class Descriptors:
    """Open descriptors, each known by its number and the device and inode that it is open on.

    A number alone may since have gone to something else. gloo's sockets belong to the groups of
    the run, which end with it: where the test made groups of its own, sockets and the like are
    theirs. Devices and memory files hold nothing that another test could meet.

    Args:
        passing: open now and about to be closed.

    Attributes:
        sockets: inodes of the sockets that were open at the last look.
    """

    def __init__(self, passing: Collection[int] = ()) -> None:
        self._kept = {number for number in map(int, os.listdir(_FOLDER)) if _is_open(number)}
        self._kept.difference_update(passing)
        kept = map(os.fstat, self._kept)
        self._kept_sockets = frozenset(one.st_ino for one in kept if stat.S_ISSOCK(one.st_mode))
        self.sockets: frozenset[int] = self._kept_sockets
        self._groups: tuple[object, ...] = ()
        self._are_all_there = True

    def read(self) -> Mapping[Hashable, Any]:
        """Return what is open beyond what the process began with, with its kind."""
        found: dict[Hashable, int] = {}
        sockets = set(self._kept_sockets)
        # the number that the listing will itself be open on
        os.close(free := os.open(os.devnull, os.O_RDONLY))
        listed = set(map(int, os.listdir(_FOLDER)))
        self._are_all_there = free not in self._kept and listed >= self._kept
        for number in listed - self._kept:
            try:
                status = os.fstat(number)
            except OSError:  # that of this listing is closed by now
                continue
            found[number, status.st_dev, status.st_ino] = status.st_mode
            if stat.S_ISSOCK(status.st_mode):
                sockets.add(status.st_ino)
        self.sockets = frozenset(sockets)
        return found

    def begin(self) -> None:
        """Note which process groups there are."""
        self._groups = _group_marks()

    def lost(self) -> list[str]:
        """Return what was closed at the last look that the test did not open, as text."""
        if self._are_all_there:
            return []
        lost = {number for number in self._kept if not _is_open(number)}
        self._kept -= lost
        return [f"descriptor {number}, which it did not open, is closed" for number in lost]

    def remaining(self, keys: set[Hashable]) -> Mapping[Hashable, Any]:
        """Return what of this is open once garbage is collected, with what it is open on."""
        if not any(self._is_of_the_test(key, mode) for key, mode in self.read().items()):
            return {}
        gc.collect()
        return {
            key: _link(key)
            for key, mode in self.read().items()
            if key in keys and self._is_of_the_test(key, mode)
        }

    def describe(self, found: Mapping[Hashable, Any]) -> list[str]:
        """Return what is open, as text: files by name, the rest by kind."""
        count = Counter(map(str, found.values()))
        return [
            f"{link} is still open" if link.startswith("/") else _still_open(link, number)
            for link, number in sorted(count.items())
        ]

    def end(self, found: Mapping[Hashable, Any]) -> bool:
        """Close nothing: its owner would later close whatever has the number by then."""
        return not found

    def _is_of_the_test(self, key: Any, mode: int) -> bool:
        if key[0] in _compat_state.service_descriptors() or stat.S_ISCHR(mode):
            return False
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            # memory without a place, and the kernel's accounting that a launcher of ours reads
            return not _link(key).startswith(("/memfd:", "/sys/fs/cgroup/"))
        return _group_marks() == self._groups


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _link(key: Any) -> str:
    """Return a file's path, or `socket`, `pipe`, `[eventpoll]`: their numbers tell nothing."""
    with contextlib.suppress(OSError):
        link = os.readlink(f"{_FOLDER}/{key[0]}")
        return link if link.startswith("/") else link.removeprefix("anon_inode:").split(":")[0]
    return "descriptor"


def _still_open(kind: str, number: int) -> str:
    return f"{number} {kind}{'s are' if number > 1 else ' is'} still open"


def _group_marks() -> tuple[object, ...]:
    """Return what changes when a test makes a process group or ends one."""
    return (is_of_the_run(), *_compat_state.group_marks())
