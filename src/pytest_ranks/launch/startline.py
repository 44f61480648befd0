"""The line at which the ranks of a run wait for each other, in memory that they share.

A rank that failed while another still joined would cut the connections that the other makes, so
no work starts before all have joined. Messages over the controller would cost two wake-ups a
rank; a barrier of the C library in shared memory costs one, and none for the last.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time

# sizeof(pthread_barrier_t) is 32 on the 64-bit systems of glibc and musl; twice that, to be safe.
_BARRIER = 64
_TIME = struct.Struct("d")
_PROCESS_SHARED = 1  # PTHREAD_PROCESS_SHARED, pthread.h


class StartLine:
    """A barrier of N processes, and the time at which each of them arrived.

    Args:
        memory: descriptor of the memory that they share, which stays the caller's.
        world_size: how many ranks there is room for.
        place: this rank's place in the line.
    """

    def __init__(self, memory: int, world_size: int, *, place: int = 0) -> None:
        self._place = place
        self._world_size = world_size
        self._memory = mmap.mmap(memory, _BARRIER + _TIME.size * world_size)
        self._library = ctypes.CDLL(None)

    @classmethod
    def create(cls, world_size: int) -> tuple[StartLine, int]:
        """Return a line for so many ranks, and the descriptor of its memory to hand over."""
        memory = os.memfd_create("pytest-ranks-start")
        os.ftruncate(memory, _BARRIER + _TIME.size * world_size)
        line = cls(memory, world_size)
        line._begin()
        return line, memory

    def resize(self, world_size: int) -> None:
        """Have so many ranks meet here from now on; called while no rank is at work.

        Args:
            world_size: at most as many as the line was made for.
        """
        self._library.pthread_barrier_destroy(self._barrier())
        self._world_size = world_size
        self._begin()

    def clear(self) -> None:
        """Forget who arrived; called before a run, while no rank is at work."""
        for rank in range(self._world_size):
            _TIME.pack_into(self._memory, _BARRIER + rank * _TIME.size, 0.0)

    def cross(self) -> None:
        """Say that this rank has arrived, and wait until all have."""
        _TIME.pack_into(self._memory, _BARRIER + self._place * _TIME.size, time.monotonic())
        self._library.pthread_barrier_wait(self._barrier())

    def all_arrived(self) -> float | None:
        """Return the CLOCK_MONOTONIC seconds at which the last rank arrived, None before that."""
        size = _TIME.size * self._world_size
        found = struct.unpack(f"{self._world_size}d", self._memory[_BARRIER : _BARRIER + size])
        return max(found) if all(found) else None

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()

    def _begin(self) -> None:
        attributes = ctypes.create_string_buffer(_BARRIER)
        self._library.pthread_barrierattr_init(attributes)
        self._library.pthread_barrierattr_setpshared(attributes, _PROCESS_SHARED)
        count = self._world_size
        failed = self._library.pthread_barrier_init(self._barrier(), attributes, count)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def _barrier(self) -> ctypes.c_void_p:
        first = ctypes.c_char.from_buffer(self._memory)
        address = ctypes.addressof(first)
        del first  # or the memory could not be closed
        return ctypes.c_void_p(address)
