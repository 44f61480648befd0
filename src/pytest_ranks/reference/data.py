"""Samples from a JSONL file that stays on the disk: one object a line, in one of a few formats."""

from __future__ import annotations

import json
import zlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.lines import LineFile
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.packing import checked_lengths, sample_number
from pytest_ranks.reference.records import (
    LARGEST_ID,
    Sample,
    check_sample,
    count_targets,
    format_of,
    other_format,
    read_record,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "LARGEST_ID",
    "JsonlDataset",
    "Sample",
    "Samples",
    "check_sample",
    "count_targets",
    "measure",
]


class Samples(Protocol):
    """What the trainer draws from: a list will do.

    If it has an attribute `lengths` (tokens of each sample), packing asks that and draws no sample
    before its turn; else a trainer that packs reads all samples once to learn their lengths.
    """

    def __len__(self) -> int:
        """Return how many samples there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return one sample."""
        ...


class JsonlDataset:
    """A JSONL file of samples: read and checked once, then drawn from where it lies.

    Each line is one of

    - `{"input_ids": [...], "labels": [...]}`: labels are unshifted (as long as the ids, equal to
      them where trained) and -100 where nothing is trained;
    - `{"text": "..."}`: all of it is trained;
    - `{"prompt": "...", "completion": "..."}`: the completion is trained;
    - `{"messages": [{"role": "...", "content": "..."}, ...]}`: all that the assistant says is.

    All lines of a file have one format; other fields are ignored. Text needs a tokenizer and ends with
    its end-of-text token, which is added where it is not there; the end of a conversation's turn is its
    chat template's business. What stays in memory is 20 bytes a sample; a draw reads its own line.
    """

    def __init__(self, path: str | Path, *, tokenizer: Any = None) -> None:
        """Read the file.

        Args:
            path: the file.
            tokenizer: makes ids from text; must go through pickle for loading processes.

        Raises:
            BadInputError: the file cannot be read, is empty, trains nothing, or has a line that is
                no sample; the text names the file and the line.
        """
        self.path = Path(path)
        self.data_format = "tokens"
        """A name of `records.FORMATS`."""
        self._tokenizer = tokenizer
        self._file = LineFile(self.path)
        self._starts = array("q")  # the byte at which a sample's line begins
        self._line_numbers = array("I")
        self._lengths = array("I")
        self._counted = array("I")
        self._largest_id = 0
        self._scan()
        if not self._starts:
            raise BadInputError(
                f'{self.path} holds no samples; expected one {{"input_ids": [...], '
                '"labels": [...]} a line.'
            )
        if not any(self._counted):
            raise BadInputError(
                f"{self.path} has no label to train on: all are {IGNORED}, "
                "or each sample's first; give labels equal to the ids where they are to be learnt."
            )

    def _scan(self) -> None:
        for number, start, line in self._file:
            if not line.strip():
                continue
            self._line_numbers.append(number)
            sample = self._parse(line, where=f"{self.path}, line {number}")
            self._starts.append(start)
            self._lengths.append(len(sample["input_ids"]))
            self._counted.append(count_targets(sample))
            self._largest_id = max(self._largest_id, *sample["input_ids"], *sample["labels"])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int, /) -> Sample:
        return self._parse(self._file.line(self._starts[index]), where=self.name(index))

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sample."""
        return self._lengths.tolist()

    @property
    def counted(self) -> list[int]:
        """For each sample the number of tokens that are trained."""
        return self._counted.tolist()

    def name(self, index: int) -> str:
        """Return what messages call a sample: its file and line."""
        return f"{self.path}, line {self._line_numbers[index]}"

    @property
    def largest_id(self) -> int:
        """The largest token id in the file; a model needs a larger vocabulary than this."""
        return self._largest_id

    @property
    def fingerprint(self) -> str:
        """What a run that resumes must find again: another for other bytes, or other token counts."""
        return f"{len(self)}-{zlib.crc32(self._lengths.tobytes(), self._file.checksum):08x}"

    def check_vocabulary(self, rows: int) -> None:
        """Refuse token ids that a model has no embedding for.

        Args:
            rows: of the embedding.

        Raises:
            BadInputError: there is one; the text names the first line that has one.
        """
        if self._largest_id < rows:
            return
        for index in range(len(self)):
            sample = self[index]
            for field, ids in (("input_ids", sample["input_ids"]), ("labels", sample["labels"])):
                place = next((place for place, token in enumerate(ids) if token >= rows), None)
                if place is not None:
                    raise BadInputError(
                        f"{self.name(index)}: {field}[{place}] is {ids[place]}, the model knows 0 "
                        f"to {rows - 1}; use the tokenizer that the model was made for."
                    )

    def check_positions(self, limit: int | None) -> None:
        """Refuse samples that are longer than a model counts positions.

        Args:
            limit: the most tokens of one document; None where there is no limit.

        Raises:
            BadInputError: there is one.
        """
        for index, length in enumerate(self._lengths):
            if limit is not None and length > limit:
                raise BadInputError(
                    f"{self.name(index)} has {length} tokens, more than the {limit} positions of "
                    "the model; shorten or leave out the sample, or raise max_position_embeddings "
                    "in the model's config.json if it can go further."
                )

    def _parse(self, line: str, *, where: str) -> Sample:
        try:
            found = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise BadInputError(
                f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a "
                "line."
            ) from error
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number too long, lists too deep, a key twice
            raise BadInputError(
                f"{where}: not JSON that can be read ({error}); expected one object a line."
            ) from error
        own = format_of(found)
        if not self._starts:
            self.data_format = own
        try:
            return read_record(found, self.data_format, tokenizer=self._tokenizer, where=where)
        except BadInputError as error:
            if own == self.data_format or not isinstance(found, dict):
                raise
            other = other_format(own, self.data_format, self._line_numbers[0])
            raise BadInputError(f"{error}{other}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's fields; of a key that is there twice, JSON's reader would drop the first."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return fields


def measure(samples: Samples, capacity: int) -> list[int]:
    """Return the lengths of all samples.

    Args:
        samples: asked for their `lengths`; read one by one if they have none.
        capacity: tokens that one row may hold.

    Raises:
        BadInputError: a sample is longer than that.
    """
    lengths: Sequence[int] | None = getattr(samples, "lengths", None)
    if lengths is None:
        lengths = [len(samples[index]["input_ids"]) for index in range(len(samples))]
    name = getattr(samples, "name", sample_number)
    return checked_lengths(lengths, capacity, name=name)
