"""Tokenised samples from a JSONL file: one object a line, with `input_ids` and `labels`."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.packing import checked_lengths, sample_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


LARGEST_ID = 2**31 - 1
"""What four bytes hold; no vocabulary comes near."""


class Sample(TypedDict):
    """One document: token ids, and for each the label that it is trained to be (or -100)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


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
    """A JSONL file of tokenised samples, read and checked at once.

    Each line is `{"input_ids": [...], "labels": [...]}`; labels are unshifted (as long as the ids,
    equal to them where trained) and -100 where nothing is trained; other fields are ignored.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file.

        Raises:
            BadInputError: the file cannot be read, is empty, trains nothing, or has a line that is
                no sample; the text names the file and the line.
        """
        self.path = Path(path)
        self._samples: list[Sample] = []
        self._line_numbers: list[int] = []
        for number, line in enumerate(_lines(self.path), start=1):
            if line.strip():
                self._samples.append(_parse(line, where=f"{self.path}, line {number}"))
                self._line_numbers.append(number)
        if not self._samples:
            raise BadInputError(
                f'{self.path} holds no samples; expected one {{"input_ids": [...], '
                '"labels": [...]} a line.'
            )
        self.lengths = [len(sample["input_ids"]) for sample in self._samples]
        self.counted = [count_targets(sample) for sample in self._samples]
        """For each sample the number of tokens that are trained."""
        if not any(self.counted):
            raise BadInputError(
                f"{self.path} has no label to train on: all are {IGNORED}, "
                "or each sample's first; give labels equal to the ids where they are to be learnt."
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self._samples[index]

    def name(self, index: int) -> str:
        """Return what messages call a sample: its file and line."""
        return f"{self.path}, line {self._line_numbers[index]}"

    @property
    def largest_id(self) -> int:
        """The largest token id in the file; a model needs a larger vocabulary than this."""
        return max(max(*sample["input_ids"], *sample["labels"]) for sample in self._samples)


def count_targets(sample: Sample) -> int:
    """Count a sample's trained tokens: the first label has no prediction, so it never counts."""
    return sum(label != IGNORED for label in list(sample["labels"])[1:])


def check_sample(sample: Any, *, where: str) -> Sample:
    """Return the sample if it is one.

    Args:
        sample: what was found.
        where: how messages call it ("data.jsonl, line 3").

    Raises:
        BadInputError: it is no mapping, lacks a field, is empty, or has labels of another length.
    """
    if not hasattr(sample, "keys"):
        raise BadInputError(
            f"{where}: expected an object with 'input_ids' and 'labels', "
            f"found {type(sample).__name__}."
        )
    for field in ("input_ids", "labels"):
        if field not in sample:
            found = ", ".join(repr(str(key)) for key in sample) or "none"
            raise BadInputError(f"{where}: the field {field!r} is missing; found {found}.")
        if not hasattr(sample[field], "__len__"):
            raise BadInputError(
                f"{where}: {field!r} is {sample[field]!r}; expected a list of whole numbers."
            )
    ids, labels = sample["input_ids"], sample["labels"]
    if len(ids) == 0:
        raise BadInputError(f"{where}: 'input_ids' is empty; leave the sample out.")
    if len(ids) != len(labels):
        raise BadInputError(
            f"{where}: {len(ids)} input_ids and {len(labels)} labels; expected as many labels as "
            "ids (unshifted, -100 where nothing is trained)."
        )
    return sample  # type: ignore[no-any-return]


def measure(samples: Samples, capacity: int) -> list[int]:
    """Return the lengths of all samples.

    Args:
        samples: asked for their `lengths`; read one by one if they have none.
        capacity: tokens that one row may hold.

    Raises:
        BadInputError: a sample is longer than that.
    """
    lengths = getattr(samples, "lengths", None)
    if lengths is None:
        lengths = [len(samples[index]["input_ids"]) for index in range(len(samples))]
    name = getattr(samples, "name", sample_number)
    return checked_lengths(lengths, capacity, name=name)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines one by one: the text of a large file need not be in memory."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text ({error.reason}).") from error


def _parse(line: str, *, where: str) -> Sample:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a line."
        ) from error
    sample = check_sample(found, where=where)
    return {
        "input_ids": _token_ids(sample["input_ids"], (), where=f"{where}: input_ids"),
        "labels": _token_ids(sample["labels"], (IGNORED,), where=f"{where}: labels"),
    }


def _token_ids(found: Sequence[Any], also: tuple[int, ...], *, where: str) -> Sequence[int]:
    """Return the ids as four-byte integers, a tenth of what a list of them takes."""
    for position, token in enumerate(found):
        if type(token) is not int or not (0 <= token <= LARGEST_ID or token in also):
            further = " or -100" if also else ""
            raise BadInputError(
                f"{where}[{position}] is {token!r}; expected a token id: a whole number of at "
                f"least 0{further}."
            )
    return array("i", found)
