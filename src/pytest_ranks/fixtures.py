"""Every fixture that this plugin offers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from transformers import PreTrainedModel

    from pytest_ranks.launch.faults import Faults
    from pytest_ranks.launch.functions import Launcher
    from pytest_ranks.launch.rank_context import RankContext


@pytest.fixture
def rank() -> RankContext:
    """The rank that runs this test: index, world_size, device, mesh, gather(), barrier()."""
    from pytest_ranks.errors import UnavailableError
    from pytest_ranks.launch.rank_context import current_rank

    with contextlib.suppress(UnavailableError):
        return current_rank()
    # outside of an except clause, so that the report is this sentence alone
    pytest.fail(
        "the fixture 'rank' needs a mark that says how many ranks: @pytest.mark.ranks(2).",
        pytrace=False,
    )


@pytest.fixture
def ranks_fidelity() -> str:
    """How real the ranks of this test are. Override it to choose, with `params=` for several."""
    from pytest_ranks.launch.rank_context import current_rank

    return current_rank().fidelity


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Generator[Faults]:
    """Inject faults into the ranks of this test: real deaths, hangs, delays, slow networks.

    `faults.kill(rank=1, at="all_reduce#3")`; also `hang`, `delay`, `raise_`, `drop_store`,
    `slow_network`. The test makes the same call on every rank.
    """
    from pytest_ranks.errors import UnavailableError
    from pytest_ranks.launch.rank_context import current_rank

    context = None
    with contextlib.suppress(UnavailableError):
        context = current_rank()
    if context is None:
        pytest.fail(
            "the fixture 'faults' needs a mark that says how many ranks: @pytest.mark.ranks(2).",
            pytrace=False,
        )
    from pytest_ranks.launch.faults import Faults, MissedFaults
    from pytest_ranks.launch.injection.injector import Injector

    injector = Injector(context)
    injector.start()
    missed = MissedFaults(injector)
    request.config.pluginmanager.register(missed)
    yield Faults(injector)
    request.config.pluginmanager.unregister(missed)
    injector.close()
    missed.tell()


@pytest.fixture(scope="session")
def launch(pytestconfig: pytest.Config) -> Generator[Launcher]:
    """Run functions and scripts on ranks from an ordinary test.

    `launch(function, world_size=2, args=(3,))` returns the results by rank;
    `launch.script(["train.py", "--steps", "3"], world_size=2)` runs torchrun.
    """
    from pytest_ranks.hardware.requirements import PackageNeed, unmet
    from pytest_ranks.launch.functions import Launcher
    from pytest_ranks.options import settings

    reason = unmet(PackageNeed(name="torch"))
    if reason is not None:
        pytest.skip(reason)
    chosen = settings(pytestconfig)
    launcher = Launcher(
        max_world_size=chosen.max_world_size, said_by=chosen.source("max_world_size")
    )
    yield launcher
    launcher.close()


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
