"""Leases: the right of one pool to use given devices, exclusive among the processes of this machine.

A lease is a locked file for each device. The kernel gives the lock back when the process that
holds it ends, however it ends, so no lease outlives its owner and none has to be cleaned up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_ranks.errors import UnavailableError
from pytest_ranks.hardware.found import LABELS, Device, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

POLL_SECONDS = 0.05
# All users of a machine lease from one folder, so the folder is as open as /tmp itself.
FOLDER_MODE = 0o1777


@dataclass(slots=True, kw_only=True)
class Lease:
    """Devices that are ours until `release`.

    Attributes:
        kind: the vendor's stack.
        devices: what is leased, in the order of the ranks.
    """

    kind: str
    devices: tuple[Device, ...]
    _files: list[int] = field(default_factory=list, repr=False)

    def release(self) -> None:
        """Give the devices back; does nothing the second time."""
        while self._files:
            os.close(self._files.pop())


class Leases:
    """The leases of one process.

    Args:
        folder: where the lock files lie; None means one folder for the whole machine, so that
            xdist workers and other sessions keep off each other's devices.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / "pytest-ranks-leases"

    def acquire(
        self,
        kind: str,
        devices: Sequence[Device],
        count: int,
        *,
        owner: str,
        timeout: float,
        waiting: Callable[[str], None] | None = None,
    ) -> Lease:
        """Lease so many devices, all or none, waiting until that many are free.

        Args:
            kind: the vendor's stack, as in `Accelerator.kind`.
            devices: those that this process may use, in the order of preference.
            count: how many.
            owner: who wants them, for others that wait.
            timeout: seconds to wait.
            waiting: called once, with a sentence, where it has to wait.

        Raises:
            UnavailableError: they were not free in time; the text names who holds them.
        """
        assert count <= len(devices)
        end = time.monotonic() + timeout
        has_said = False
        while True:
            lease = self._try(kind, devices, count, owner)
            if lease is not None:
                return lease
            text = self._holders(kind, devices, count)
            if time.monotonic() >= end:
                raise UnavailableError(f"{text}; waited {timeout:g} s")
            if not has_said and waiting is not None:
                has_said = True
                waiting(text)
            time.sleep(POLL_SECONDS)

    def _try(self, kind: str, devices: Sequence[Device], count: int, owner: str) -> Lease | None:
        """Lock the first devices that are free; give all back where they are too few.

        Whoever takes some does so alone, under a lock on the folder: two that each hold half of
        what they need would wait for each other for ever.
        """
        self._make_folder()
        lease = Lease(kind=kind, devices=())
        taken: list[Device] = []
        with self._alone():
            for device in devices:
                if len(taken) == count:
                    break
                file = self._lock(kind, device, owner)
                if file is not None:
                    lease._files.append(file)
                    taken.append(device)
        if len(taken) < count:
            lease.release()
            return None
        lease.devices = tuple(taken)
        return lease

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # another user's, who has opened it
            self._folder.chmod(FOLDER_MODE)

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        file = self._open(self._folder / "all.lock")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _lock(self, kind: str, device: Device, owner: str) -> int | None:
        file = self._open(self._path(kind, device))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()}, {owner}".encode(), 0)
        return file

    def _open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(path, flags, 0o666)
        with contextlib.suppress(PermissionError):
            os.fchmod(file, 0o666)  # the umask took that from other users
        return file

    def _path(self, kind: str, device: Device) -> Path:
        name = device.uuid or str(device.index)
        return self._folder / f"{kind}-{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.lock"

    def _holders(self, kind: str, devices: Sequence[Device], count: int) -> str:
        """Say who holds the devices that are not free."""
        held = []
        for device in devices:
            file = self._open(self._path(kind, device))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(file, 500, 0).decode(errors="replace") or "unknown"
                held.append(f"{device.index} by {owner}")
            finally:
                os.close(file)
        wanted = counted(count, f"{LABELS[kind]} device")
        return f"needs {wanted}, leased to others: {'; '.join(held) or 'none any more'}"
