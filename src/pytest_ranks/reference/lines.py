"""A large text file by lines: read once from the start, then any line through a memory map."""

from __future__ import annotations

import mmap
import stat
import zlib
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


NO_TEXT = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}
"""What files of other kinds begin with."""


class LineFile:
    """A file whose lines are found again by the byte at which they begin.

    Nothing of it is kept in memory but what the operating system can take back. A copy in another
    process (a loading process, say) opens the file again and refuses it if it is not the same one.
    """

    def __init__(self, path: Path) -> None:
        """Look at the file.

        Raises:
            BadInputError: there is none, or it is a pipe or a device.
        """
        self.path = path
        self._place = path.absolute()
        self._map: mmap.mmap | None = None
        self._stamp = self._look()
        self.checksum = 0
        """Of all lines that were read from the start (CRC-32)."""
        kind = self._place.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise BadInputError(
                f"{self.path} is a pipe or a device, and lines are drawn from their place in a "
                "file; write it to the disk first."
            )

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """Yield each line's number, its first byte and its text, without its end.

        Raises:
            BadInputError: the file cannot be read, is of another kind, or a line is not UTF-8.
        """
        start = self.checksum = 0
        try:
            with self._place.open("rb") as file:
                self._check_kind(file.peek(8))
                for number, line in enumerate(file, start=1):
                    yield number, start, self._decode(line, f", line {number}")
                    start += len(line)
                    self.checksum = zlib.crc32(line, self.checksum)
        except OSError as error:
            raise BadInputError(f"{self.path} cannot be read: {error.strerror}.") from error

    def line(self, start: int) -> str:
        """Return the line that begins at a byte.

        Raises:
            BadInputError: the file is not the one that was opened first.
        """
        found = self._look()
        if found != self._stamp:
            raise BadInputError(
                f"{self.path} was changed while it is in use: found {found[0]} bytes, it had "
                f"{self._stamp[0]}, or the same written anew; leave the file as it is during a run."
            )
        if self._map is None:
            with self._place.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        end = self._map.find(b"\n", start)
        return self._decode(self._map[start : end if end >= 0 else len(self._map)], "")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    def _look(self) -> tuple[int, int, int]:
        """Return what is another when the file is; a map of one that was cut short kills the process."""
        try:
            found = self._place.stat()
        except OSError as error:
            raise BadInputError(f"{self.path} cannot be read: {error.strerror}.") from error
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _check_kind(self, head: bytes) -> None:
        for begins, kind in NO_TEXT.items():
            if head.startswith(begins):
                raise BadInputError(
                    f"{self.path} is a {kind} file; expected lines of UTF-8 text: unpack or "
                    "convert it."
                )

    def _decode(self, line: bytes, which: str) -> str:
        try:
            return line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInputError(
                f"{self.path}{which} is not UTF-8 text ({error.reason})."
            ) from error
