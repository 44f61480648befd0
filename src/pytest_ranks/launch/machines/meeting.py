"""How the ranks of a world find rank 0: through the store of torchrun's agent."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.reporting.failures import of_function
from pytest_ranks.launch.wire import Raised, Returned, RunFunction, World

if TYPE_CHECKING:
    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.machines.outer_world import OuterWorld

_STORE = "pytest_ranks.launch.machines.agent_store"
_ANSWER_SECONDS = 10.0


def publish_address(
    link: ZygoteLink, world: OuterWorld, port: int, token: str, seconds: float
) -> None:
    """Tell all ranks where rank 0 listens, and what to say there.

    Raises:
        UnavailableError: the store cannot be reached.
    """
    _ask_store(link, world, "publish", f"{port} {token}", seconds)


def look_up_address(link: ZygoteLink, world: OuterWorld, seconds: float) -> tuple[int, str]:
    """Return the port on which rank 0 listens, and what to say there.

    Raises:
        UnavailableError: the store cannot be reached, or rank 0 has not come in time.
    """
    found = _ask_store(link, world, "look_up", seconds)
    if found is None:
        raise UnavailableError(f"rank 0 did not come within {seconds:g} s (--ranks-join-timeout)")
    port, _, token = found.partition(" ")
    return int(port), token


def _ask_store(link: ZygoteLink, world: OuterWorld, name: str, *arguments: Any) -> Any:
    """Call a function of `agent_store` in a rank process, which has torch."""
    seconds = arguments[-1]
    key = f"pytest_ranks/{world.run}/rank0"
    request = RunFunction(
        world=World(rank=0, world_size=1, init=False, rank_variables=False),
        target=f"{_STORE}:{name}",
        target_file=None,
        by_value=None,
        arguments=pickle.dumps(((world.address, world.port, key, *arguments), {})),
    )
    ranks = Ranks(link, 1)
    try:
        runs, _ = ranks.run(
            lambda _: request,
            is_last=lambda message: isinstance(message, Returned | Raised),
            is_failure=lambda message: isinstance(message, Raised),
            timeout=seconds + _ANSWER_SECONDS,
        )
        failure = of_function(runs[0])
        if failure is None:
            ranks.leave()
            return pickle.loads(runs[0].messages[-1].value)
        ranks.kill()
    finally:
        ranks.forget()
    raise UnavailableError(
        f"the store of torchrun's agent at {world.address} port {world.port} does not answer: "
        f"{failure.headline}"
    )
