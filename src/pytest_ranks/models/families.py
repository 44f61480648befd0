"""Tiny models: any causal language model family of transformers at under a million parameters."""

from __future__ import annotations

import functools
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytest_ranks.errors import BadInputError, UnavailableError, did_you_mean
from pytest_ranks.models.overrides import SPECIAL_IDS, check_token_ids, own_names, scale_of
from pytest_ranks.models.particulars import NOT_ALONE
from pytest_ranks.models.shrink import pattern_config, tiny_config
from pytest_ranks.models.tokenizers import EOS_ID, VOCAB_SIZE, byte_tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel

PARAMETER_BUDGET = 1_000_000


def causal_lm_families() -> tuple[str, ...]:
    """Return the causal language model families of the installed transformers, by model type."""
    _need_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a causal language model of a family, tiny, on CPU, in float32, in train mode.

    Needs no network: the config is the family's default config with every size made small by what
    its fields mean, and the tokenizer is made in code. The global random state is left as it was.

    Args:
        family: a model type of transformers, one of `causal_lm_families()`.
        seed: of the weights; the same seed gives the same bits.
        **overrides: config fields (`num_hidden_layers=4`, `tie_word_embeddings=True`).

    Returns:
        The transformers model, with `.tokenizer` (byte-level, see `byte_tokenizer`) and
        `.save(directory)`, which writes what `from_pretrained` loads.

    Raises:
        BadInputError: unknown family or override, or values that make no valid model.
        UnavailableError: transformers, or a package that the family needs, is not installed.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise BadInputError(f"seed is {seed!r}: expected an integer from 0 to 2**64 - 1")
    config_class = _config_class(family)
    tokenizer = byte_tokenizer(
        vocab_size=overrides.get("vocab_size", VOCAB_SIZE),
        pad_equals_eos=overrides.get("pad_token_id") == EOS_ID,
    )
    check_token_ids(overrides, tokenizer)
    config = _config(family, config_class, overrides, pad_id=tokenizer.pad_token_id)
    model = _build(family, config, overrides, seed=seed)
    _name_tokens(model, tokenizer)
    _check_model(family, model, overrides)
    model.tokenizer = tokenizer
    model.save = functools.partial(save, model, config=_loadable(model, config))
    return model.train()


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    config: PretrainedConfig | None = None,
) -> Path:
    """Write a tiny model and its tokenizer as `from_pretrained` reads them.

    Args:
        model: what `tiny_model` returned.
        directory: is made if it does not exist.
        config: written in place of the model's own, where only a composite config can be loaded.

    Returns:
        The directory.
    """
    path = Path(directory)
    model.save_pretrained(path)
    if config is not None:
        config.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def _loadable(model: PreTrainedModel, config: PretrainedConfig) -> PretrainedConfig | None:
    """Return the composite config where AutoModelForCausalLM does not know its text part alone.

    So it is with mllama and emu3: the model is built from `text_config`, and saves that.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return None if type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING else config


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"tiny models need transformers ({error}): pip install 'pytest-ranks[models]'"
        ) from error


def _config_class(family: str) -> type[PretrainedConfig]:
    families = causal_lm_families()
    if not isinstance(family, str) or family not in families:
        near = did_you_mean(family.lower(), families) if isinstance(family, str) else ""
        raise BadInputError(
            f"family is {family!r}: expected a causal language model type of transformers.{near} "
            f"pytest_ranks.models.causal_lm_families() lists all {len(families)}"
        )
    if family in NOT_ALONE:
        raise UnavailableError(
            f"{family!r} is no text model that stands alone: {NOT_ALONE[family]}"
        )
    from transformers import CONFIG_MAPPING

    config_class: type[PretrainedConfig] = CONFIG_MAPPING[family]
    return config_class


def _config(
    family: str,
    config_class: type[PretrainedConfig],
    overrides: dict[str, Any],
    *,
    pad_id: int,
) -> PretrainedConfig:
    """Return the tiny config with the user's overrides in it."""
    try:
        own = own_names(family, config_class, overrides)
        pattern = pattern_config(config_class, own)
        scale, layers = scale_of(family, own, pattern)
        config = tiny_config(pattern, scale=scale, pad_id=pad_id, overrides=own, layers=layers)
    except BadInputError:
        raise
    except Exception as error:
        raise _refusal(family, overrides, error) from error
    if "tie_word_embeddings" in own:  # some families obey it without declaring it
        config.tie_word_embeddings = own["tie_word_embeddings"]
    return config


def _build(family: str, config: PretrainedConfig, overrides: dict[str, Any], *, seed: int) -> Any:
    """Build the model; its weights depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    attention = {k: v for k, v in overrides.items() if k == "attn_implementation"}
    with own_random_state(seed), torch.device("cpu"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
        except Exception as error:
            raise _refusal(family, overrides, error) from error


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, numpy and Python for a while, then put them back.

    `torch.manual_seed` would also reseed every device, so the CPU's generator is seeded by itself.
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _refusal(family: str, overrides: dict[str, Any], error: Exception) -> Exception:
    """Say why a family was not built: a missing package, the user's values, or transformers."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return UnavailableError(f"{family!r} cannot be built here: {reason}")
    if overrides:
        given = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        return BadInputError(f"{family!r} cannot be built with {given}: {reason}")
    from transformers import __version__

    return UnavailableError(
        f"{family!r} of transformers {__version__} cannot be built as a tiny model: {reason}"
    )


def _check_model(family: str, model: Any, overrides: dict[str, Any]) -> None:
    """Refuse a model that is not what was promised or asked for."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters >= PARAMETER_BUDGET and not overrides:  # what a user asked for may be big
        raise UnavailableError(
            f"{family!r} keeps {parameters} parameters, more than {PARAMETER_BUDGET}: one of its "
            f"config fields is not known as a size; override it"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    if overrides.get("tie_word_embeddings", tied) != tied:
        raise BadInputError(
            f"tie_word_embeddings={not tied} has no effect on {family!r}: "
            f"its embeddings are {'always' if tied else 'never'} tied"
        )


def _name_tokens(model: Any, tokenizer: Any) -> None:
    """Give the model the tokenizer's special ids wherever trainers and `generate` look."""
    for name in SPECIAL_IDS:
        setattr(model.config, name, getattr(tokenizer, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
