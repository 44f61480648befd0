"""What a zygote, or a rank in a fresh process, imports before anything runs in it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING

from pytest_ranks.launch import coverage
from pytest_ranks.launch.group import let_tests_initialise
from pytest_ranks.launch.seeding import load_generators

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_ranks.launch.wire import Prepare


def prepare(request: Prepare) -> None:
    """Import modules, in the place and with the path of the controller."""
    coverage.stop_inherited()
    if request.environment is not None:
        os.environ.update(request.environment)
    if request.working_directory is not None:
        with contextlib.suppress(OSError):
            os.chdir(request.working_directory)
    if request.sys_path is not None:
        sys.path[:] = request.sys_path
    with keeping_all():
        for entry in request.modules:
            module, _, name = entry.partition(":")
            with contextlib.suppress(Exception):  # the rank will meet it where it can be reported
                found = importlib.import_module(module)
                if module == "torch":
                    let_tests_initialise()
                if name:  # packages that import on demand do so when the name is looked up
                    getattr(found, name)
        load_generators()


@contextlib.contextmanager
def keeping_all() -> Generator[None]:
    """Have the garbage collector leave alone, for ever, what comes to be inside.

    A collection in a rank would else walk, and so copy, every page that it shares with the zygote.
    And imports make next to no garbage: to look for it takes a fifth of the time of `import torch`.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
