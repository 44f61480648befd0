"""What hygiene looks at: traits, which have a value, and things, which are there or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

LONGEST = 60  # characters of one value in a text


def show(value: object) -> str:
    """Return a value as short text; functions by their name."""
    name = getattr(value, "__qualname__", None)
    try:
        text = str(name) if isinstance(name, str) else repr(value)
    except Exception:
        text = f"a {type(value).__qualname__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """One value of the process that a test can leave changed.

    Attributes:
        name: what it is called in a text.
        read: returns it; must not raise.
        take: returns it in a form that a later change does not reach, where `read` does not.
        version: changes when more of it came to be, which is then taken anew before a test.
        is_set_by_runs: whether joining a run changes it before the test begins.
        write: puts it back exactly, None where nothing can.
        tell: what changed, as text, made from the values before and after.
        is_told: whether a change is a leak; else it is what a test is free to use, reset silently
            unless a wide fixture uses it.
        is_inherited: whether it has many parts, and a fork has it from the process it comes from.
    """

    name: str
    read: Callable[[], Any]
    take: Callable[[], Any] | None = None
    version: Callable[[], object] | None = None
    is_set_by_runs: bool = False
    write: Callable[[Any], object] | None = None
    tell: Callable[[Any, Any], Sequence[str]] | None = None
    is_told: bool = True
    is_inherited: bool = False

    def describe(self, before: Any, after: Any) -> Sequence[str]:
        """Return what changed, as text."""
        if self.tell is not None:
            return self.tell(before, after)
        return [f"{self.name} {show(after)} (was {show(before)})"]


class Names:
    """Functions by module and name, which spies replace and forget to put back."""

    def __init__(self, places: Iterable[tuple[Any, str]]) -> None:
        self._places = list(places)
        self._folders = [(vars(module), name) for module, name in self._places]

    def trait(self, *, is_inherited: bool = False) -> Trait:
        """Return what stands under the names as one trait.

        Args:
            is_inherited: whether a fork has it from the process it comes from.
        """
        return Trait(
            name="functions",
            read=self._read,
            write=self._write,
            tell=self._tell,
            is_inherited=is_inherited,
        )

    def _read(self) -> list[Any]:
        return [folder.get(name) for folder, name in self._folders]

    def _write(self, before: list[Any]) -> None:
        for (module, name), was in zip(self._places, before, strict=True):
            if vars(module).get(name) is not was:
                setattr(module, name, was)

    def _tell(self, before: list[Any], after: list[Any]) -> list[str]:
        return [
            f"{module.__name__}.{name} was replaced by {show(now)}"
            for (module, name), was, now in zip(self._places, before, after, strict=True)
            if was is not now
        ]


class Things(Protocol):
    """What can be left alive in the process, each known by a key that is never used twice."""

    def read(self) -> Mapping[Hashable, Any]:
        """Return what is there, quickly."""

    def remaining(self, keys: set[Hashable]) -> Mapping[Hashable, Any]:
        """Return what of this is still there once garbage is collected and a moment has passed."""

    def describe(self, found: Mapping[Hashable, Any]) -> list[str]:
        """Return what is there, as text."""

    def end(self, found: Mapping[Hashable, Any]) -> bool:
        """End it all; returns whether that was possible."""


def tell_mapping(name: str) -> Callable[[Mapping[Any, Any], Mapping[Any, Any]], list[str]]:
    """Return what tells how a mapping changed: `environment A='1' (was unset)`."""

    def tell(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> list[str]:
        lines = []
        for key in [*before, *(key for key in after if key not in before)]:
            if key in before and key in after and is_same(before[key], after[key]):
                continue
            now = f"{key}={show(after[key])}" if key in after else f"{key} unset"
            lines.append(f"{name} {now} (was {show(before[key]) if key in before else 'unset'})")
        return lines

    return tell


def tell_sequence(name: str) -> Callable[[Sequence[Any], Sequence[Any]], list[str]]:
    """Return what tells how a sequence changed: `sys.path has '/x' (new)`."""

    def tell(before: Sequence[Any], after: Sequence[Any]) -> list[str]:
        lines = [f"{name} has {show(one)} (new)" for one in after if one not in before]
        lines += [f"{name} lacks {show(one)}" for one in before if one not in after]
        return [*dict.fromkeys(lines)] or [f"{name} is in another order"]

    return tell


def is_same(before: Any, after: Any) -> bool:
    """Return whether two values are the same, as far as they can be compared."""
    if before is after:
        return True
    try:
        return bool(before == after)
    except Exception:
        return False
