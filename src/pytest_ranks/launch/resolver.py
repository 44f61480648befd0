"""The C library's look-up of host names, kept off the network while a rank meets its store.

c10d looks up a name for each address that it connects to or accepts. No such name is ever used, but
`::ffff:127.0.0.1` is in no /etc/hosts, so that the question goes to a name server: a stall of
seconds where that one is silent.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

SWITCH = Path("/etc/nsswitch.conf")


def look_up_in_files() -> bool:
    """Look names up in /etc/hosts alone, from now on; return whether this C library can."""
    return _configure(b"files")


@contextlib.contextmanager
def looking_up_in_files() -> Generator[None]:
    """Look names up in /etc/hosts alone, inside; unchanged where that could not be taken back."""
    line = _line_of_hosts()
    if line is None or not look_up_in_files():
        yield
        return
    try:
        yield
    finally:
        _configure(line)


def _line_of_hosts() -> bytes | None:
    """Return where this machine looks host names up, None where its C library decides."""
    with contextlib.suppress(OSError):
        for line in SWITCH.read_bytes().splitlines():
            name, _, rest = line.partition(b"#")[0].partition(b":")
            if name.strip() == b"hosts" and rest.strip():
                return rest.strip()
    return None


def _configure(line: bytes) -> bool:
    try:
        configure = ctypes.CDLL(None)["__nss_configure_lookup"]  # nss.h of glibc; musl has none
    except AttributeError:
        return False
    return int(configure(b"hosts", line)) == 0
