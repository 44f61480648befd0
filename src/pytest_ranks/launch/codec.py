"""Messages between machines as JSON: data only, so that nothing that arrives can run.

Between our own processes on one machine pickle opens no door. A port on a network does, to
whoever reaches it; and to unpickle is to run what was sent.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch import coordination, deadline, messages, pool, sight

# The modules whose dataclasses travel.
_MODULES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (coordination, deadline, messages, pool, sight)
}


def encode(message: object) -> bytes:
    """Return a message as JSON; tuples stay tuples, and dataclasses of ours stay themselves."""
    return json.dumps(_plain(message), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """Return the message that `encode` wrote.

    Raises:
        BadInputError: it is no such message.
    """
    try:
        return _rebuilt(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInputError(f"what arrived is no message of ours: {error!r}") from None


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(entry) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(entry)] for key, entry in value.items()]}
    module = type(value).__module__.rpartition(".")[2]
    if is_dataclass(value) and module in _MODULES:
        state = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": f"{module}.{type(value).__name__}", "state": state}
    raise TypeError(f"{type(value).__qualname__} does not travel between machines")


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_rebuilt(entry) for entry in value["tuple"])
    if "dict" in value:
        return {_rebuilt(key): _rebuilt(entry) for key, entry in value["dict"]}
    module, _, name = value["type"].partition(".")
    kind = vars(_MODULES[module])[name]
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise TypeError(f"{name} is no message")
    return kind(**{key: _rebuilt(entry) for key, entry in value["state"].items()})
