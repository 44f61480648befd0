"""What a run reports: one JSON object a line, on disk as soon as the step is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self


class MetricsLog:
    """Append records to a JSONL file and flush each, so that a killed run keeps its history."""

    def __init__(self, path: Path | None, *, resumed_at: int | None = None) -> None:
        """Open the file.

        Args:
            path: the file; None writes nothing (every rank but the first, or no output folder).
            resumed_at: the step that the run continues from: later lines, which it will write
                again, are taken out. None starts the file anew.
        """
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(path, resumed_at) if resumed_at is not None else []
        rewritten = path.with_name(f".{path.name}.unfinished")
        rewritten.write_text("".join(kept), encoding="utf-8")
        rewritten.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have all records on the disk, so that a machine that stops does not lose them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the whole lines of the steps up to this one; a torn last line is left out."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
