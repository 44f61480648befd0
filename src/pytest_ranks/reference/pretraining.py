"""Pretraining blocks: documents strung together and cut into samples of equal length."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.data import check_sample
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.packing import checked_lengths, sample_number
from pytest_ranks.reference.records import count_targets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_ranks.reference.data import Samples
    from pytest_ranks.reference.records import Sample

LAST = ("partial", "drop", "pad")


class Blocks:
    """Documents, one behind the other, as samples of `length` tokens each.

    Block i holds the stream's tokens from `i * (length - overlap)` on. A block is one sample: its tokens
    see all before them in it, also those of an earlier document, and a document's first token is
    trained from the end of the one before, as its own labels say. A block's first token is never
    trained, so that one token in `length` has no turn; with `overlap=1` each block begins with the last
    token of the one before, and every token but the stream's first is trained exactly once.

    Where documents must not see each other, `isolated` cuts each one by itself: blocks hold one document
    or a piece of it, the last piece is shorter, and rows are filled by packing (`pack_length`).

    No document stays in memory, only where each begins; a draw reads those that it needs.
    """

    def __init__(
        self,
        documents: Samples,
        length: int,
        *,
        last: str = "partial",
        overlap: int = 0,
        isolated: bool = False,
        pad_id: int = 0,
    ) -> None:
        """Measure the documents.

        Args:
            documents: samples; asked for their `lengths`, read one by one if they have none.
            length: tokens of a block, at least 2.
            last: what is left behind the last whole block is a shorter one ("partial"), is filled with
                padding that is not trained ("pad") or is left out ("drop", see `dropped`). The pieces
                of isolated documents are treated alike, each document's last.
            overlap: tokens that a block repeats from the one before: 0 or 1.
            isolated: whether a block holds tokens of one document only.
            pad_id: the token that fills a block.

        Raises:
            BadInputError: an argument cannot be used, or there is no block.
        """
        if last not in LAST:
            raise BadInputError(
                f"last={last!r}: expected one of {', '.join(map(repr, LAST))}."
                f"{did_you_mean(str(last), LAST)}"
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise BadInputError(
                f"length={length!r}: expected a whole number of at least 2; a block's first token is "
                "not trained."
            )
        if overlap not in (0, 1):
            raise BadInputError(f"overlap={overlap!r}: expected 0 or 1.")
        self.documents = documents
        self.length = length
        self._stride = length - overlap
        self._overlap = overlap
        self._last = last
        self._pad_id = pad_id
        lengths = _measure(documents)
        self._begins = array("q", accumulate(lengths, initial=0))  # of documents; then the end
        self.dropped = 0
        """Tokens that no block holds."""
        self._starts = array("q")  # of blocks, in the stream
        self._ends = array("q")
        total = self._begins[-1]
        pieces = zip(self._begins, self._begins[1:], strict=False) if isolated else [(0, total)]
        for first, behind in pieces:
            self._cut(first, behind)
        if not self._starts:
            raise BadInputError(
                f"{total} tokens in {len(lengths)} documents make no block of {length} with "
                f"last={last!r}; give more documents, shorter blocks or last='partial'."
            )

    def _cut(self, first: int, behind: int) -> None:
        """Cut a part of the stream into blocks; what is only the overlap of the last one is no block."""
        start = first
        while behind - start > (self._overlap if start > first else 0):
            end = min(start + self.length, behind)
            if end - start < self.length and self._last == "drop":
                self.dropped += end - start - (self._overlap if start > first else 0)
                return
            self._starts.append(start)
            self._ends.append(end)
            start += self._stride

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int, /) -> Sample:
        ids, labels = array("i"), array("i")
        for document, first, behind in self._pieces(index):
            sample = check_sample(self.documents[document], where=self._name(document))
            ids.extend(sample["input_ids"][first:behind])
            labels.extend(sample["labels"][first:behind])
        if self._last == "pad":
            missing = self.length - len(ids)
            ids.extend([self._pad_id] * missing)
            labels.extend([IGNORED] * missing)
        return {"input_ids": ids, "labels": labels}

    @property
    def lengths(self) -> list[int]:
        """The tokens of each block."""
        if self._last == "pad":
            return [self.length] * len(self)
        return [end - start for start, end in zip(self._starts, self._ends, strict=True)]

    @property
    def counted(self) -> list[int]:
        """For each block the number of tokens that are trained; reads all documents."""
        return [count_targets(self[index]) for index in range(len(self))]

    @property
    def fingerprint(self) -> str:
        """What a run that resumes must find again: another for other documents or blocks."""
        own = getattr(self.documents, "fingerprint", self._begins[-1])
        return f"{own}-{self.length}-{self._stride}-{self._last}-{len(self)}"

    def name(self, index: int) -> str:
        """Return what messages call a block: its documents."""
        documents = [document for document, _, _ in self._pieces(index)]
        names = [self._name(document) for document in (documents[0], documents[-1])]
        return f"block {index} ({' to '.join(dict.fromkeys(names))})"

    def _pieces(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents that a block has tokens of, each with its first and last place + 1."""
        start, end = self._starts[index], self._ends[index]
        document = bisect_right(self._begins, start) - 1
        while start < end:
            begin, behind = self._begins[document], min(self._begins[document + 1], end)
            if behind > start:
                yield document, start - begin, behind - begin
            start, document = behind, document + 1

    def _name(self, document: int) -> str:
        name: str = getattr(self.documents, "name", sample_number)(document)
        return name


def _measure(documents: Samples) -> list[int]:
    lengths = getattr(documents, "lengths", None)
    if lengths is None:
        lengths = [len(documents[index]["input_ids"]) for index in range(len(documents))]
    return checked_lengths(lengths, None, name=getattr(documents, "name", sample_number))
