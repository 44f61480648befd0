"""Every fixture that this plugin offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from pytest_ranks.launch.rank import RankContext


@pytest.fixture
def rank() -> RankContext:
    """The rank that runs this test: index, world_size, device, mesh, gather(), barrier()."""
    from pytest_ranks.errors import UnavailableError
    from pytest_ranks.launch.rank import current_rank

    try:
        return current_rank()
    except UnavailableError:
        pytest.fail(
            "the fixture 'rank' needs a mark that says how many ranks: @pytest.mark.ranks(2).",
            pytrace=False,
        )


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
