"""One run at a time in a folder: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process; whatever ends the process lets go of it.

    The lock is the folder's own (flock), so that no file is left behind. Where the file system has no
    such locks, as some that are shared over a network, nothing is held and nothing refused.

    Raises:
        BadInputError: a run that is still going on holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInputError(
                f"--out-dir={folder} is in use by a run that is still going on; wait for it to end, "
                "or choose another folder."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
