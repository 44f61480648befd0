"""Messages between machines as JSON: data only, so that nothing that arrives can run.

Between our own processes on one machine pickle opens no door. A port on a network does, to
whoever reaches it; and to unpickle is to run what was sent.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields, is_dataclass
from typing import Any

from pytest_ranks.errors import BadInputError

# Dataclasses of the launch engine travel: they hold data, and making one does nothing.
_HOME = "pytest_ranks.launch."
_TYPE = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)\.([A-Z]\w*)")


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
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ImportError,
        RecursionError,
    ) as error:
        raise BadInputError(f"what arrived is no message of ours: {error!r}") from None


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(entry) for entry in value]}
    if isinstance(value, set | frozenset):
        return {"set": [_plain(entry) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(entry)] for key, entry in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    module = type(value).__module__
    if is_dataclass(value) and module.startswith(_HOME):
        state = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": f"{module.removeprefix(_HOME)}.{type(value).__name__}", "state": state}
    raise TypeError(f"{type(value).__qualname__} does not travel between machines")


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_rebuilt(entry) for entry in value["tuple"])
    if "set" in value:
        return frozenset(_rebuilt(entry) for entry in value["set"])
    if "dict" in value:
        return {_rebuilt(key): _rebuilt(entry) for key, entry in value["dict"]}
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    return _type_of(value["type"])(**{key: _rebuilt(e) for key, e in value["state"].items()})


def _type_of(name: str) -> Any:
    match = _TYPE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no message")
    kind = vars(importlib.import_module(_HOME + match[1]))[match[2]]
    if not (isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == _HOME + match[1]):
        raise TypeError(f"{name!r} is no message")
    return kind
