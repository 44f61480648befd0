"""What a line of a data file may say, and how it becomes a sample: ids, and a label for each."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, TypedDict

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.loss import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGEST_ID = 2**31 - 1
"""What four bytes hold; no vocabulary comes near."""

LONGEST_SHOWN = 80
"""Characters of a value in a message."""

MOST_FIELDS_SHOWN = 8

FORMATS = {
    "tokens": ("input_ids", "labels"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields of each format. A line that has those of several is read as the first of them."""


class Sample(TypedDict):
    """One document: token ids, and for each the label that it is trained to be (or -100)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


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
    for field in FORMATS["tokens"]:
        if field not in sample:
            raise BadInputError(_missing(field, sample, where))
        if not hasattr(sample[field], "__len__"):
            raise BadInputError(
                f"{where}: {field!r} is {shown(sample[field])}; expected a list of whole numbers."
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


def format_of(record: Any) -> str:
    """Return the format whose fields a record has, or the first of whose fields it has some.

    A record with none of them is taken for "tokens", which then says what is missing.
    """
    found = set(record) if isinstance(record, dict) else set()
    for has in (found.issuperset, lambda fields: not found.isdisjoint(fields)):
        for name, fields in FORMATS.items():
            if has(fields):
                return name
    return "tokens"


def read_record(record: Any, data_format: str, *, tokenizer: Any, where: str) -> Sample:
    """Turn what a line holds into a sample.

    Args:
        record: the line, as JSON reads it.
        data_format: a name of `FORMATS`: the file's.
        tokenizer: makes ids from text; None where there is none.
        where: how messages call the line.

    Raises:
        BadInputError: it is no record of this format, or cannot be made into tokens.
    """
    if data_format == "tokens":
        sample = check_sample(record, where=where)
        return {
            "input_ids": token_ids(sample["input_ids"], (), where=f"{where}: input_ids"),
            "labels": token_ids(sample["labels"], (IGNORED,), where=f"{where}: labels"),
        }
    if not isinstance(record, dict):
        raise BadInputError(
            f"{where}: expected an object with {_named(data_format)}, "
            f"found {type(record).__name__}."
        )
    for field in FORMATS[data_format]:
        if field not in record:
            raise BadInputError(_missing(field, record, where))
    if tokenizer is None:
        raise BadInputError(
            f"{where}: {FORMATS[data_format][0]!r} needs a tokenizer, and the model folder has "
            "none; save one there, or give 'input_ids' and 'labels'."
        )
    sample = _readers()[data_format](record, tokenizer, where)
    _check_known(sample["input_ids"], tokenizer, f"{where}: {FORMATS[data_format][-1]!r}")
    return sample


def other_format(found: str, expected: str, first_line: int) -> str:
    """Return what to add to a message about a line of another format than the file's."""
    if found == expected:
        return ""
    return (
        f" The file's first sample (line {first_line}) has {_named(expected)}; "
        "a file holds one format."
    )


def token_ids(found: Sequence[Any], also: tuple[int, ...], *, where: str) -> array[int]:
    """Return the ids as four-byte integers, a tenth of what a list of them takes.

    Args:
        found: what should be ids.
        also: numbers that are allowed beside them.
        where: how messages call the list.

    Raises:
        BadInputError: one is no token id.
    """
    plain = isinstance(found, list) and set(map(type, found)) <= {int}
    if not plain or min(found, default=0) < 0 or max(found, default=0) > LARGEST_ID:
        for position, token in enumerate(found):
            if type(token) is not int or not (0 <= token <= LARGEST_ID or token in also):
                bound = f"least 0{' or -100' if also else ''}"
                if type(token) is int and token > LARGEST_ID:
                    bound = f"most {LARGEST_ID}"
                raise BadInputError(
                    f"{where}[{position}] is {shown(token)}; expected a token id: a whole number "
                    f"of at {bound}."
                )
    return array("i", found)


def checked_text(found: Any, *, where: str, empty: bool = False) -> str:
    """Return the text if it is one.

    Raises:
        BadInputError: it is something else, empty where it may not be, or has half a character.
    """
    if not isinstance(found, str):
        raise BadInputError(f"{where} is {shown(found)}; expected text.")
    if not found and not empty:
        raise BadInputError(f"{where} is empty; leave it out.")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"{where} has half a surrogate pair, {found[error.start]!r}, at character "
            f"{error.start}: no tokenizer takes it; correct what wrote it."
        ) from error
    return found


def shown(found: Any) -> str:
    """Return how messages show a value: its beginning, where it is long."""
    text = repr(found)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def _readers() -> dict[str, Callable[[dict[str, Any], Any, str], Sample]]:
    from pytest_ranks.reference.chat import read_messages

    return {
        "text": _read_text,
        "prompt_completion": _read_prompt,
        "messages": read_messages,
    }


def _read_text(record: dict[str, Any], tokenizer: Any, where: str) -> Sample:
    text = checked_text(record["text"], where=f"{where}: 'text'")
    ids = _ended(_encode(text, tokenizer), tokenizer)
    return {"input_ids": array("i", ids), "labels": array("i", ids)}


def _read_prompt(record: dict[str, Any], tokenizer: Any, where: str) -> Sample:
    """Read the two texts apart, as they are met when the model answers: no token spans both."""
    prompt = checked_text(record["prompt"], where=f"{where}: 'prompt'", empty=True)
    completion = checked_text(record["completion"], where=f"{where}: 'completion'")
    before = _encode(prompt, tokenizer)
    own_end = tokenizer.eos_token_id
    if before[-1:] == [own_end] != _encode(prompt, tokenizer, special=False)[-1:]:
        del before[-1]  # one that the tokenizer adds to every text: here the text goes on
    after = _ended(_encode(completion, tokenizer, special=False), tokenizer)
    return {
        "input_ids": array("i", before + after),
        "labels": array("i", [IGNORED] * len(before) + after),
    }


def _encode(text: str, tokenizer: Any, *, special: bool = True) -> list[int]:
    # verbose: the warning about model_max_length; whoever limits the length says so by line
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Return the ids with the end-of-text token, once, if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]


def _check_known(ids: Sequence[int], tokenizer: Any, where: str) -> None:
    """Refuse a text of which the tokenizer knows less than half.

    Raises:
        BadInputError: most of its tokens are the unknown one.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return  # stands for nothing unknown: GPT-2 names its end-of-text token here
    count = sum(token == unknown for token in ids)
    if 2 * count > len(ids):
        raise BadInputError(
            f"{where}: {count} of {len(ids)} tokens are {tokenizer.unk_token!r}, unknown to the "
            "tokenizer; use the one that the data was made for."
        )


def _missing(field: str, record: Any, where: str) -> str:
    names = [str(key) for key in record]
    found = ", ".join(map(shown, names[:MOST_FIELDS_SHOWN])) or "none"
    if len(names) > MOST_FIELDS_SHOWN:
        found += f" and {len(names) - MOST_FIELDS_SHOWN} more"
    near = did_you_mean(field, names)
    return f"{where}: the field {field!r} is missing; found {found}.{near}"


def _named(data_format: str) -> str:
    return " and ".join(map(repr, FORMATS[data_format]))
