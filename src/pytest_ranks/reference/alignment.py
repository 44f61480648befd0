"""A tokenizer and a model made to agree: rows of the embedding, special tokens."""

from __future__ import annotations

from typing import Any

from pytest_ranks.errors import BadInputError

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def align(
    model: Any, tokenizer: Any, *, multiple_of: int | None = None, resize: bool = True
) -> list[str]:
    """Make the model fit the tokenizer.

    The embedding and the head grow when the tokenizer has more tokens, and never shrink. Old rows
    keep their bits; new rows are drawn around the mean of the old ones, with 1e-9 of their
    covariance (transformers' `mean_resizing`), so that no new token is likelier than an old one;
    tied weights stay tied. A tokenizer without a padding token pads with its end-of-text token:
    that token is still trained, since padding is known by length and never by id.

    Args:
        model: one of transformers'.
        tokenizer: its tokenizer, or one made from it by adding tokens.
        multiple_of: also grow to a multiple of this (tensor cores like 8 and 64, sharding likes
            the number of ranks).
        resize: whether the embedding may grow at all. If not, the model is meant to have been
            trained with this very tokenizer, and one that is visibly another is refused.

    Returns:
        What was changed, for the log: nothing about the model changes silently.

    Raises:
        BadInputError: the tokenizer is not the model's: it has ids that the model has no row for
            or other special tokens, and `resize` is off.
    """
    if multiple_of is not None and (isinstance(multiple_of, bool) or multiple_of < 1):
        raise BadInputError(f"multiple_of={multiple_of!r} is not a whole number of at least 1.")
    if not resize:
        check_same_tokenizer(model, tokenizer)
    changes = _grow(model, tokenizer, multiple_of or 1, resize=resize)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        changes.append(f"padding token set to the end-of-text token {tokenizer.eos_token!r}")
    for name in SPECIAL_IDS:
        changes += _agree(model, name, getattr(tokenizer, name))
    return changes


def largest_token_id(tokenizer: Any) -> int:
    """Return the largest id that a tokenizer can give; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _grow(model: Any, tokenizer: Any, multiple_of: int, *, resize: bool) -> list[str]:
    """Give every token a row."""
    embedding = model.get_input_embeddings().weight
    rows = embedding.shape[0]
    needed = max(len(tokenizer), largest_token_id(tokenizer) + 1)
    if needed > rows and not resize:
        raise BadInputError(
            f"the tokenizer has ids up to {needed - 1}, the model has rows for 0 to {rows - 1}; "
            "use the tokenizer that the model was made for, or let the embedding grow."
        )
    wanted = -(-max(needed, rows) // multiple_of) * multiple_of
    if wanted == rows:
        return []
    # The mean of rows that have no values yet cannot be taken; they are filled later.
    model.resize_token_embeddings(wanted, mean_resizing=not embedding.is_meta)
    return [f"embedding grown from {rows} to {wanted} rows"]


def _agree(model: Any, name: str, value: int | None) -> list[str]:
    """Put a special token's id wherever trainers and `generate` look."""
    if value is None:
        return []
    changes = []
    config = model.config
    owners = {"config": config, "generation_config": getattr(model, "generation_config", None)}
    text_config = config.get_text_config()
    if text_config is not config:
        owners["config.get_text_config()"] = text_config
    for place, owner in owners.items():
        found = getattr(owner, name, None)
        if owner is None or found == value:
            continue
        if isinstance(found, list | tuple) and value in found:
            continue  # several tokens end a text, the tokenizer's among them
        setattr(owner, name, value)
        changes.append(f"{place}.{name} {found} -> {value}")
    return changes


def check_same_tokenizer(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose special tokens contradict those that the model was trained with.

    A model knows its tokenizer by nothing but ids. When its begin-of-text and its end-of-text ids
    both are other tokens there, the ids of all words are other ones too, and training starts from
    noise.

    Raises:
        BadInputError: both differ.
    """
    differing = []
    for name in ("bos_token_id", "eos_token_id"):
        known, given = getattr(model.config, name, None), getattr(tokenizer, name)
        known = known if isinstance(known, list | tuple) else [known]
        if given is not None and None not in known and given not in known:
            differing.append(f"{name} {known[0]} in the model, {given} in the tokenizer")
    if len(differing) == 2:
        raise BadInputError(
            f"the tokenizer is not the one that the model was trained with: {differing[0]}; "
            f"{differing[1]}. Use the tokenizer of the model's own folder."
        )
