"""The socket that carries messages between controller, zygote and ranks."""

from __future__ import annotations

import array
import os
import pickle
import select
import socket
import struct
import threading
import time
from typing import Any

_HEADER = struct.Struct("!QI")  # bytes of the pickle, number of descriptors that travel with it
_MOST_DESCRIPTORS = 8
_CHUNK = 1 << 16


class ChannelClosed(EOFError):
    """The other end of a channel is gone."""


class Channel:
    """A stream socket that carries pickled messages and descriptors, in order.

    Both ends are processes that we started and that run the same code as we do, so pickle opens
    no new door; what users supply (arguments, results) travels as bytes inside a message, so one
    that does not unpickle spoils no other.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._owner = os.getpid()
        self._stray: object = None
        self._bytes = bytearray()
        self._descriptors: list[int] = []
        self._sending = threading.Lock()  # threads of a test's fault tell of it

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Return the channel over an inherited descriptor of a stream socket."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """Return the socket's descriptor, for poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; descriptors that nobody took are closed too."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def end_strays(self, message: object) -> None:
        """Have a fork of this process that sends anything say this instead, and end.

        A test's child that runs on into the code of the rank would else speak for it.
        """
        self._stray = message

    def send(self, message: object, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message, waiting until the other end has room.

        Raises:
            ChannelClosed: the other end is gone.
        """
        is_stray = self._stray is not None and os.getpid() != self._owner
        if is_stray:
            message = self._stray
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        header = _HEADER.pack(len(data), len(descriptors))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            # in one piece, so that the other end wakes up once
            with self._sending:
                sent = self._socket.sendmsg([header, data], rights if descriptors else [])
                if sent < len(header) + len(data):
                    self._socket.sendall((header + data)[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed(str(error)) from error
        finally:
            if is_stray:
                os._exit(70)  # EX_SOFTWARE

    def receive(self, timeout: float | None = None) -> tuple[Any, tuple[int, ...]]:
        """Return the next message and its descriptors.

        Args:
            timeout: seconds to wait, or None to wait for ever.

        Raises:
            TimeoutError: no message came in time.
            ChannelClosed: the other end is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (complete := self._take()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            if not is_readable(self.fileno(), left):
                raise TimeoutError
            self._read()
        return complete

    def receive_all(self) -> list[tuple[Any, tuple[int, ...]]]:
        """Return the messages that have arrived, without waiting.

        Raises:
            ChannelClosed: the other end is gone and everything it sent has been returned.
        """
        messages = []
        try:
            while is_readable(self.fileno(), 0):
                self._read()
        except ChannelClosed:
            while (complete := self._take()) is not None:
                messages.append(complete)
            if not messages:
                raise
            return messages
        while (complete := self._take()) is not None:
            messages.append(complete)
        return messages

    def _read(self) -> None:
        room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * struct.calcsize("i"))
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError as error:
            raise ChannelClosed(str(error)) from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._descriptors.extend(received)
        if not data:
            raise ChannelClosed("end of stream")
        self._bytes += data

    def _take(self) -> tuple[Any, tuple[int, ...]] | None:
        if len(self._bytes) < _HEADER.size:
            return None
        length, count = _HEADER.unpack_from(self._bytes)
        end = _HEADER.size + length
        if len(self._bytes) < end:
            return None
        message = pickle.loads(memoryview(self._bytes)[_HEADER.size : end])
        del self._bytes[:end]
        taken = tuple(self._descriptors[:count])
        del self._descriptors[:count]
        return message, taken


def is_readable(fd: int, timeout: float | None) -> bool:
    """Return whether the descriptor has something to read within so many seconds."""
    poll = select.poll()  # not select(): that fails on descriptors of 1024 and above
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0, int(timeout * 1000 + 0.999))))


def channel_pair() -> tuple[Channel, socket.socket]:
    """Return our end as a channel and the other end as the socket to hand over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs
