"""Traits of Accelerate and transformers: singletons, and what was registered."""

from __future__ import annotations

import sys
from typing import Any

from pytest_ranks import _compat_state
from pytest_ranks.launch.hygiene.trait import Trait, tell_mapping


def traits() -> tuple[Trait, ...]:
    """Return the traits; a library that is not loaded has nothing to tell."""
    registries = _Registries()
    return (
        Trait(
            name="singletons of Accelerate",
            read=_read_states,
            write=_write_states,
            is_told=False,
        ),
        Trait(
            name="registries of transformers",
            read=registries.read,
            write=registries.write,
            tell=registries.tell,
            is_inherited=True,
        ),
    )


def _read_states() -> dict[tuple[str, Any], Any]:
    return {
        (name, key): value
        for name, state in _compat_state.accelerate_states().items()
        for key, value in state.items()
    }


def _write_states(before: dict[tuple[str, Any], Any]) -> None:
    for name, state in _compat_state.accelerate_states().items():
        state.clear()
        state.update({key: value for (owner, key), value in before.items() if owner == name})


class _Registries:
    """What tests registered; what a module registers when it is imported stays.

    Its second import would not register it again.
    """

    def __init__(self) -> None:
        self._modules = frozenset(sys.modules)
        self._raw: list[list[Any]] = []
        self._found: dict[str, dict[Any, Any]] = {}

    def read(self) -> dict[str, dict[Any, Any]]:
        """Return the entries that come from modules of before the test."""
        registries = _compat_state.transformers_registries()
        raw = [[*entries, *entries.values()] for entries in registries.values()]
        if raw != self._raw:
            self._raw = raw
            self._found = {}
            for name, entries in registries.items():
                known = {key: value for key, value in entries.items() if self._is_known(value)}
                if known:  # a registry that is not loaded yet is an empty one
                    self._found[name] = known
        return self._found

    def write(self, before: dict[str, dict[Any, Any]]) -> None:
        """Remove what was added, put back what was replaced or removed."""
        now = self.read()
        for name, entries in _compat_state.transformers_registries().items():
            was = before.get(name, {})
            for key in now.get(name, {}):
                if key not in was:
                    del entries[key]
            entries.update(was)

    def tell(
        self, before: dict[str, dict[Any, Any]], after: dict[str, dict[Any, Any]]
    ) -> list[str]:
        """Return what was added or changed."""
        return [
            line
            for name, entries in after.items()
            for line in tell_mapping(name)(before.get(name, {}), entries)
        ]

    def _is_known(self, value: Any) -> bool:
        parts = value if isinstance(value, tuple) else (value,)
        return all(getattr(one, "__module__", None) in self._modules for one in parts if one)
