"""One TCP connection between two controllers, which notices when its other end is out of reach."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import Any

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.channel import is_readable
from pytest_ranks.launch.machines.codec import decode, encode

# Seconds without a sign of life from the other machine after which it counts as out of reach.
# The kernel asks and answers for it, also while a controller is busy. gloo lives through gaps of
# a few seconds, and so should we.
SILENCE_SECONDS = 10
_IDLE_SECONDS, _EVERY_SECONDS, _PROBES = 4, 2, 3
_LENGTH = struct.Struct("!I")
_MOST_BYTES = 1 << 28
_CHUNK = 1 << 16
_OUT_OF_REACH = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


class LineLost(Exception):
    """The other end is gone or out of reach; the text says which.

    Args:
        text: what is known.
        is_silent: whether nothing was heard, which is all that a cut link shows.
    """

    def __init__(self, text: str, *, is_silent: bool = False) -> None:
        super().__init__(text)
        self.is_silent = is_silent


class Line:
    """A connection that carries messages, as data, in order."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._bytes = bytearray()
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _EVERY_SECONDS)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        # keepalive asks only while nothing that we sent is on its way
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)
        end.settimeout(SILENCE_SECONDS)

    def fileno(self) -> int:
        """Return the socket's descriptor, for poll."""
        return self._socket.fileno()

    def own_address(self) -> str:
        """Return the address at which the other end reaches this machine."""
        return str(self._socket.getsockname()[0])

    def other_address(self) -> str:
        """Return the address of the other end, as far as it can be told."""
        try:
            return str(self._socket.getpeername()[0])
        except OSError:
            return "an unknown address"

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, message: object) -> None:
        """Send one message.

        Raises:
            LineLost: the other end is gone or out of reach.
        """
        data = encode(message)
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise _lost(error) from None

    def receive(self, timeout: float | None) -> Any:
        """Return the next message.

        Args:
            timeout: seconds to wait, None to wait for ever.

        Raises:
            TimeoutError: no message came in time.
            LineLost: the other end is gone or out of reach.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (found := self._take()) is None:
            left = None if end is None else end - time.monotonic()
            if (left is not None and left <= 0) or not is_readable(self.fileno(), left):
                raise TimeoutError
            self._read()
        return found[0]

    def receive_all(self) -> list[Any]:
        """Return the messages that have arrived, without waiting.

        Raises:
            LineLost: the other end is gone, and everything it sent has been returned.
        """
        lost: LineLost | None = None
        while lost is None and is_readable(self.fileno(), 0):
            try:
                self._read()
            except LineLost as error:
                lost = error
        found = []
        while (one := self._take()) is not None:
            found.append(one[0])
        if lost is not None and not found:
            raise lost
        return found

    def _read(self) -> None:
        try:
            data = self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise _lost(error) from None
        if not data:
            raise LineLost("its connection ended")
        self._bytes += data

    def _take(self) -> tuple[Any] | None:
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > _MOST_BYTES:
            raise BadInputError(f"a message of {length} bytes: what connected is none of ours.")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        message = decode(bytes(self._bytes[_LENGTH.size : end]))
        del self._bytes[:end]
        return (message,)


def _lost(error: OSError) -> LineLost:
    if isinstance(error, TimeoutError) or error.errno in _OUT_OF_REACH:
        return LineLost(f"nothing was heard for {SILENCE_SECONDS} s", is_silent=True)
    if error.errno in (errno.ECONNRESET, errno.EPIPE):
        return LineLost("its connection ended")
    return LineLost(f"its connection failed: {os.strerror(error.errno or 0)}")
