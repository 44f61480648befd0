"""The function that a request to a rank names, found in its module, its file, or in the request."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError

if TYPE_CHECKING:
    from pytest_ranks.launch.wire import RunFunction

NO_DEBUGGER = (
    "breakpoint() on rank {rank}: a function of the launch fixture has no terminal; the debugger "
    "works in a test with @pytest.mark.ranks, run with --ranks-debug={rank}"
)


def refuse_debugger(rank: int) -> None:
    """Have a debugger that would read from this process's empty standard input say so instead."""
    import pdb

    original = pdb.Pdb.set_trace

    def set_trace(self: pdb.Pdb, *args: Any, **keywords: Any) -> Any:
        if self.stdin is sys.stdin:  # one over a socket has a terminal of its own
            raise UnavailableError(NO_DEBUGGER.format(rank=rank))
        return original(self, *args, **keywords)

    pdb.Pdb.set_trace = set_trace  # type: ignore[assignment]


def load(request: RunFunction) -> Any:
    """Return the function to call.

    Raises:
        ImportError: there is no such module.
        AttributeError: it has no such function.
    """
    if request.by_value is not None:
        return pickle.loads(request.by_value)
    assert request.target is not None
    module_name, _, qualname = request.target.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
    except ModuleNotFoundError:
        # a test module under --import-mode=importlib, or a script: no import finds it by name
        if request.target_file is None:
            raise
        spec = importlib.util.spec_from_file_location(module_name, request.target_file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found = module
    for name in qualname.split("."):
        found = getattr(found, name)
    return found
