"""What a rank writes, made visible when it is written: buffers of Python and of C."""

from __future__ import annotations

import contextlib
import ctypes
import sys

from pytest_ranks import _compat_terminal

_LIBRARY = ctypes.CDLL(None)
_LINES = 1  # _IOLBF of glibc's and musl's stdio.h


def write_by_lines() -> None:
    """Have Python and C hand on each line at once, as they do on a terminal."""
    for stream in (sys.__stdout__, sys.__stderr__):
        _compat_terminal.by_lines(stream)
    with contextlib.suppress(ValueError):  # a C library that names it otherwise
        stdout = ctypes.c_void_p.in_dll(_LIBRARY, "stdout")
        _LIBRARY.setvbuf(stdout, None, _LINES, 0)


def flush_everything() -> None:
    """Hand on what is left in the buffers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _LIBRARY.fflush(None)
