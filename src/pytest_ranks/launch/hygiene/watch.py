"""One rank's state between tests: taken once, compared after each test, put back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.hygiene import interpreter, libraries, torch_traits
from pytest_ranks.launch.hygiene.descriptors import Descriptors
from pytest_ranks.launch.hygiene.living import Children, Threads
from pytest_ranks.launch.hygiene.trait import is_same
from pytest_ranks.launch.wire import Leak

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from pytest_ranks.launch.hygiene.trait import Things, Trait


@dataclass(slots=True, kw_only=True)
class _Wide:
    """What a live fixture wider than a test has set up.

    Attributes:
        fixture: the definition, by identity.
        name: for texts.
        values: trait -> its value before the fixture.
        things: number of the kind of things -> what the fixture made.
    """

    fixture: object
    name: str
    values: dict[int, Any] = field(default_factory=dict)
    things: dict[int, set[Hashable]] = field(default_factory=dict)


class Inherited:
    """What forks of this process share: the traits, and the values of those with many parts.

    To look at a part for the first time costs a fork a page; hundreds of them cost more than the
    rest of its start.
    """

    def __init__(self) -> None:
        self.traits: tuple[Trait, ...] = (
            *interpreter.traits(),
            *torch_traits.traits(),
            *libraries.traits(),
        )
        self.values = {
            number: _take(trait) for number, trait in enumerate(self.traits) if trait.is_inherited
        }


class StateWatch:
    """The state of a rank process, compared with what it was before the test.

    Life cycle: made in a fresh rank; `begin`, a test, `end`, for each test. What a fixture wider
    than the test changes belongs to the state as long as that fixture lives.

    Args:
        passing: descriptors that are open now and about to be closed.
        inherited: what was noted before this process was forked.
    """

    def __init__(
        self, passing: Collection[int] = (), *, inherited: Inherited | None = None
    ) -> None:
        noted = Inherited() if inherited is None else inherited
        self._traits = noted.traits
        self._descriptors = Descriptors(passing)
        self._kinds: tuple[Things, ...] = (Threads(), Children(), self._descriptors)
        self._baseline = [
            noted.values[number] if number in noted.values else _take(trait)
            for number, trait in enumerate(self._traits)
        ]
        self._versions = [trait.version and trait.version() for trait in self._traits]
        self._before: list[set[Hashable]] = [set() for _ in self._kinds]
        self._started: dict[int, Any] = {}  # trait -> its value when the test began
        self._has_device = False
        self._wide: list[_Wide] = []
        self._owed: list[dict[Hashable, str]] = [{} for _ in self._kinds]
        self._ended: dict[int, str] = {}  # trait -> whose teardown should have put it back
        self._setups: list[tuple[int, list[Any], list[set[Hashable]]]] = []

    # ---- a test

    def begin(self, *, has_device: bool = False) -> None:
        """Note what is there before a test; what was set for this run is no leak of it.

        Args:
            has_device: whether the rank has a device, so that its use is no leak.
        """
        self._has_device = has_device
        for number, trait in enumerate(self._traits):
            if trait.version is not None and (now := trait.version()) != self._versions[number]:
                self._versions[number] = now
                self._baseline[number] = _take(trait)
            if trait.is_set_by_runs:
                self._started[number] = trait.read()
        self._descriptors.begin()
        self._before = [set(kind.read()) for kind in self._kinds]

    def end(self) -> tuple[Leak, ...]:
        """Put back what a test has changed; return what that was."""
        leaks = self._values()
        for number, kind in enumerate(self._kinds):
            owed, now = self._owed[number], set(kind.read())
            for left, whose in (
                (now - self._before[number] - set(owed), ""),
                (now & set(owed), _from_fixtures(owed.values())),
            ):
                if not left or not (found := kind.remaining(left)):
                    continue
                texts = kind.describe(found)
                is_gone = kind.end(found)
                leaks += [Leak(what=text + whose, restored=is_gone) for text in texts]
            owed.clear()
        self._ended.clear()
        self._started.clear()
        leaks += [Leak(what=text, restored=False) for text in self._descriptors.lost()]
        return tuple(leaks)

    def _values(self) -> list[Leak]:
        leaks: list[Leak] = []
        for number, trait in enumerate(self._traits):
            now, before = trait.read(), self._baseline[number]
            if is_same(before, now):
                continue
            started, texts = self._started.get(number, before), list[str]()
            is_told = trait.is_told and not (self._has_device and trait.name == torch_traits.CUDA)
            if is_told and not is_same(started, now):
                texts = list(trait.describe(started, now))  # before `now` is changed back
            is_restored = self._restore(trait, before)
            whose = _from_fixtures([self._ended[number]] if number in self._ended else ())
            leaks += [Leak(what=text + whose, restored=is_restored) for text in texts]
        return leaks

    def _restore(self, trait: Trait, before: Any) -> bool:
        if not trait.is_told and before:
            return True  # a wide fixture goes on using it
        if trait.write is None:
            return False
        try:
            trait.write(before)
        except Exception:
            return False
        return is_same(before, trait.read())

    @property
    def sockets(self) -> frozenset[int]:
        """Inodes of the sockets that were open at the end of the last test."""
        return self._descriptors.sockets

    # ---- fixtures wider than a test

    def before_wide(self) -> None:
        """Note the state before a wide fixture is set up."""
        values = [trait.read() for trait in self._traits]
        self._setups.append((len(self._wide), values, [set(kind.read()) for kind in self._kinds]))

    def after_wide(self, fixture: object, name: str) -> None:
        """Have what a wide fixture changed belong to the state."""
        start, values, things = self._setups.pop()
        one = _Wide(fixture=fixture, name=name)
        inside = self._wide[start:]  # fixtures that it has set up itself
        for number, trait in enumerate(self._traits):
            if not is_same(values[number], trait.read()):
                one.values[number] = self._baseline[number]
                self._baseline[number] = _take(trait)
                self._started.pop(number, None)
        for number, kind in enumerate(self._kinds):
            made = set(kind.read()) - things[number]
            for other in inside:
                made -= other.things.get(number, set())
            if made:
                one.things[number] = made
                self._before[number] |= made
        if one.values or one.things:
            self._wide.append(one)

    def end_wide(self, fixture: object) -> None:
        """Expect what was before a wide fixture, now that its teardown has run."""
        found = next((one for one in self._wide if one.fixture is fixture), None)
        if found is None:
            return
        above = self._wide[self._wide.index(found) + 1 :]
        self._wide.remove(found)
        for number, value in found.values.items():
            self._ended[number] = found.name
            heir = next((one for one in above if number in one.values), None)
            if heir is not None:  # another fixture changed it later and still lives
                heir.values[number] = value
            else:
                self._baseline[number] = value
                self._started.pop(number, None)
        for number, made in found.things.items():
            self._owed[number] |= dict.fromkeys(made, found.name)


def _take(trait: Trait) -> Any:
    return trait.read() if trait.take is None else trait.take()


def _from_fixtures(names: Collection[str]) -> str:
    return f" (from the {', '.join(sorted(set(names)))})" if names else ""
