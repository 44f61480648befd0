"""A check is one property that every correct subject has; the registry finds checks by name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_ranks.conformance.runner import Bench
    from pytest_ranks.conformance.subject import Capabilities

PARTS = ("Claim", "Why it matters", "Likely causes", "Reference")
"""The parts of a check's docstring; docs pages and `--ranks-list-checks` are made from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run a subject.

    Attributes:
        strategy: "single", "ddp" or "fsdp2".
        world_size: its ranks.
    """

    strategy: str
    world_size: int

    def __str__(self) -> str:
        return "single" if self.strategy == "single" else f"{self.strategy}-{self.world_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim of a suite.

    Attributes:
        suite: such as "loss".
        claim: such as "token_weights".
        run: the function; it raises a `Finding`.
        requires: capabilities such as "clip" or "precision:bf16".
        worlds: the world sizes it is run at, of those that the subject declares.
        strategies: the strategies it says something about.
        since: the release it came in.
    """

    suite: str
    claim: str
    run: Callable[[Bench], None]
    requires: tuple[str, ...]
    worlds: tuple[int, ...]
    strategies: tuple[str, ...]
    since: str

    @property
    def id(self) -> str:
        """`suite.claim`."""
        return f"{self.suite}.{self.claim}"

    def part(self, name: str) -> str:
        """Return one of the parts of its docstring, as one line."""
        text = inspect.getdoc(self.run) or ""
        for block in text.split("\n\n"):
            head, _, rest = block.partition(":")
            if head.strip() == name:
                return " ".join(rest.split())
        return ""

    def settings(self, capabilities: Capabilities) -> tuple[Setting, ...]:
        """Return the settings that it is judged in for a subject: its strategies x its world sizes."""
        return tuple(
            Setting(strategy=strategy, world_size=size)
            for strategy in self.strategies
            if strategy in capabilities.strategies
            for size in sorted(capabilities.world_sizes)
            if size in self.worlds and (size == 1 or strategy != "single")
        )

    def unmet(self, capabilities: Capabilities) -> str:
        """Return why a check is not applicable to what a subject declares; empty when it is."""
        missing = [name for name in self.requires if not capabilities.has(name)]
        if SPIED in missing:
            return f"launch={capabilities.launch!r}: the spies are not in the processes that the subject starts"
        if missing:
            return f"the subject does not declare {missing[0]}"
        if not self.settings(capabilities):
            kinds = f"{' or '.join(self.strategies)} on " if len(self.strategies) < 3 else ""
            sizes = " or ".join(map(str, self.worlds))
            return f"it needs {kinds}{sizes} ranks, which the subject does not declare"
        return ""


SPIED = "launch:ranks"
"""The requirement of claims that are read from what the spies see, not from parameters."""

_REGISTRY: dict[str, Check] = {}


def check(
    *,
    requires: Sequence[str] = (),
    worlds: Sequence[int] = (1, 2, 4),
    strategies: Sequence[str] = ("single", "ddp", "fsdp2"),
    since: str = "0.1",
) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Register a function `check_<claim>` of a module `checks/<suite>.py`.

    Args:
        requires: capabilities without which the claim is not applicable.
        worlds: world sizes that it is run at.
        strategies: strategies that it says something about.
        since: the release it came in.
    """

    def register(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
        suite = function.__module__.rpartition(".")[2]
        claim = function.__name__.removeprefix("check_")
        entry = Check(
            suite=suite,
            claim=claim,
            run=function,
            requires=tuple(requires),
            worlds=tuple(worlds),
            strategies=tuple(strategies),
            since=since,
        )
        _REGISTRY[entry.id] = entry
        return function

    return register


@cache
def all_checks() -> dict[str, Check]:
    """Return every check by id, in the order of the suites' files."""
    from pytest_ranks.conformance import checks

    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    order = ("subject",)
    return dict(
        sorted(_REGISTRY.items(), key=lambda item: (item[1].suite not in order, item[1].suite))
    )


def suites() -> tuple[str, ...]:
    """Return the names of the suites."""
    return tuple(dict.fromkeys(entry.suite for entry in all_checks().values()))


def select(names: Iterable[str] | None) -> tuple[Check, ...]:
    """Return the checks of the named suites and check ids; all of them for None.

    Raises:
        BadInputError: for a name that is neither.
    """
    known = all_checks()
    if names is None:
        return tuple(known.values())
    chosen: dict[str, Check] = {}
    for name in names:
        found = {key: entry for key, entry in known.items() if name in (key, entry.suite)}
        if not found:
            everything = [*suites(), *known]
            raise BadInputError(
                f"{name!r} names no suite and no check.{did_you_mean(name, everything)} "
                "List them: pytest --ranks-list-checks"
            )
        chosen.update(found)
    return tuple(chosen.values())


def valid_expectations(expected: Iterable[str]) -> None:
    """Refuse expected failures that name no check.

    Raises:
        BadInputError: naming the nearest id.
    """
    known = all_checks()
    for name in expected:
        if name.partition("[")[0] not in known:
            raise BadInputError(
                f"expected_failures names no check {name!r}.{did_you_mean(name, known)} "
                "List them: pytest --ranks-list-checks"
            )
