"""Checkpoint files: whole or not there, proven whole when they are read, pruned, found again."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Collection

MAGIC = b"\nsha256:"
TRAILER = len(MAGIC) + 64
"""Bytes behind the archive that torch writes, which its reader finds in spite of them: the checksum of
all bytes before. torch reads archives without looking at their own checksums, so that a flipped bit
in a weight would be trained on."""

BEST = "checkpoint-best.pt"

log = logging.getLogger("pytest_ranks.reference")


class DigestWriter(io.BufferedWriter):
    """A file that adds up the checksum of what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        """Write, and count it in."""
        self.digest.update(data)
        return super().write(data)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that is there as a whole or not at all, whenever the machine stops.

    It is written under another name, flushed to the disk, renamed, and the folder flushed too.

    Raises:
        OSError: the disk is full or fails; what was written until then is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with DigestWriter(unfinished) as file:
            torch.save(state, file)
            file.write(MAGIC + file.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise _disk_error(error, path) from error
    unfinished.replace(path)
    sync_folder(path.parent)


def _disk_error(error: BaseException, path: Path) -> BaseException:
    """Return the disk's own error, of which torch's writer makes a RuntimeError about its position."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    if found is None:
        return error
    return OSError(found.errno, found.strerror or str(found), str(path))


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk: a file that was renamed is under its new name for good."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's bytes; None if they are what was written.

    A file without a checksum at its end is not judged here: its reader will say.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER))
        trailer = file.read()
        if not trailer.startswith(MAGIC):
            return None
        file.seek(0)
        digest, left = hashlib.sha256(), size - TRAILER
        while left:
            part = file.read(min(left, 1 << 20))
            digest.update(part)
            left -= len(part)
    if trailer == MAGIC + digest.hexdigest().encode():
        return None
    return "its bytes are not those that were written: the checksum differs"


def checkpoint_path(out_dir: Path, step: int) -> Path:
    """Return the file of the checkpoint after so many steps."""
    return out_dir / f"checkpoint-{step}.pt"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps that a folder has checkpoints of, in order."""
    found = (re.fullmatch(r"checkpoint-(\d+)\.pt", file.name) for file in folder.iterdir())
    return sorted(int(match.group(1)) for match in found if match)


def find_checkpoint(given: Path) -> Path:
    """Return the file itself, or the newest whole checkpoint in a folder.

    Newer ones that are damaged are skipped, and that is logged as a warning.

    Raises:
        BadInputError: the folder has none.
    """
    from pytest_ranks.reference.checkpoint import read_checkpoint

    if not given.is_dir():
        return given
    steps = saved_steps(given)
    for step in reversed(steps):
        path = checkpoint_path(given, step)
        try:
            read_checkpoint(path, mapped=True)
        except BadInputError as error:
            log.warning("skipped a checkpoint: %s", error)
        else:
            return path
    if steps:
        raise BadInputError(
            f"the folder {given} has {len(steps)} checkpoints, and none can be read; "
            "start without resume_from."
        )
    raise BadInputError(f"the folder {given} has no checkpoint-<step>.pt to resume from.")


def point_to_best(folder: Path, step: int) -> None:
    """Let `checkpoint-best.pt` be the checkpoint of a step: a link, replaced at once."""
    target = checkpoint_path(folder, step)
    if not target.exists():
        return
    link = folder / f".{BEST}.unfinished"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / BEST)


def prune(folder: Path, *, newest: int, keep: int, protected: Collection[int]) -> None:
    """Delete old checkpoints.

    Args:
        folder: where they are.
        newest: the step whose checkpoint has just been written; later ones, which an earlier run may
            have left, count for nothing and stay.
        keep: how many to keep, the newest one included.
        protected: steps whose checkpoints stay whatever their age.
    """
    steps = [step for step in saved_steps(folder) if step <= newest]
    for step in steps[:-keep]:
        if step not in protected:
            checkpoint_path(folder, step).unlink()
