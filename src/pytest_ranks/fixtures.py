"""Every fixture that this plugin offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny model of any causal language model family, offline and seeded.

    `tiny_model("qwen3", seed=1, num_hidden_layers=3)` is a transformers model on CPU with
    `.tokenizer` and `.save(directory)`; see `pytest_ranks.models.tiny_model`.
    """
    from pytest_ranks.hardware.requirements import PackageNeed, unmet

    for package in ("torch", "transformers"):
        reason = unmet(PackageNeed(name=package))
        if reason is not None:
            pytest.skip(reason)
    from pytest_ranks.models.families import tiny_model as build

    return build
