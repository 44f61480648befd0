"""Traits of the Python process: environment, folder, signals, logging, hooks and limits."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import gc
import locale
import logging
import operator
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_state
from pytest_ranks.launch.group import RANK_VARIABLES
from pytest_ranks.launch.hygiene.trait import (
    Names,
    Trait,
    show,
    tell_mapping,
    tell_sequence,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Each run sets the first ones anew, and pytest the last.
_VOLATILE = {
    name.encode()
    for name in (*RANK_VARIABLES, *_compat_state.COMPILER_VARIABLES, "PYTEST_CURRENT_TEST")
}
_SIGNALS = [
    number
    for number in signal.Signals
    if number < signal.SIGRTMIN and number not in (signal.SIGKILL, signal.SIGSTOP)
]
_CHILD = _SIGNALS.index(signal.SIGCHLD)
_LIMITS = {
    name: getattr(resource, name)
    for name in ("RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_STACK", "RLIMIT_FSIZE", "RLIMIT_CORE")
}
# What tests replace by hand and forget.
_FUNCTIONS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (builtins, ("open", "print", "input", "__import__")),
    (time, ("time", "sleep", "monotonic", "perf_counter")),
    (os, ("_exit", "getpid", "kill", "fork", "system", "replace", "remove")),
    (sys, ("unraisablehook", "displayhook", "breakpointhook", "exit")),
    (threading, ("excepthook",)),
    (socket, ("socket", "create_connection")),
    (warnings, ("showwarning", "warn")),
)
_OF_A_LOGGER = operator.attrgetter("level", "disabled", "propagate", "handlers")


def traits() -> tuple[Trait, ...]:
    """Return the traits, quick ones to read all of them."""
    return (
        *_of_the_process(),
        *_of_python(),
        *_of_logging(),
        Names((module, name) for module, names in _FUNCTIONS for name in names).trait(),
    )


def _of_the_process() -> tuple[Trait, ...]:
    return (
        Trait(
            name="environment",
            read=_read_environment,
            is_set_by_runs=True,
            write=_write_environment,
            tell=lambda before, after: tell_mapping("environment")(_text(before), _text(after)),
        ),
        Trait(name="working directory", read=_read_directory, write=_write_directory),
        Trait(name="umask", read=_read_umask, write=os.umask),
        Trait(
            name="signal",
            read=_read_signals,
            write=_write_signals,
            tell=lambda before, after: [
                f"signal {number.name} is handled by {_handler(now)} (was {_handler(was)})"
                for number, was, now in zip(_SIGNALS, before, after, strict=True)
                if was != now
            ],
        ),
        Trait(
            name="blocked signals",
            read=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            write=lambda before: signal.pthread_sigmask(signal.SIG_SETMASK, before),
        ),
        Trait(
            name="interval timer",
            read=lambda: signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0),
            write=lambda _: signal.setitimer(signal.ITIMER_REAL, 0),
            tell=lambda _, __: ["an interval timer still runs"],
        ),
        Trait(
            name="resource limit",
            read=lambda: {name: resource.getrlimit(key) for name, key in _LIMITS.items()},
            write=_write_limits,
            tell=tell_mapping("resource limit"),
        ),
        Trait(
            name="CPU affinity",
            read=lambda: os.sched_getaffinity(0),
            write=lambda before: os.sched_setaffinity(0, before),
        ),
    )


def _of_python() -> tuple[Trait, ...]:
    return (
        _list_trait("sys.path", lambda: sys.path),
        _list_trait("sys.argv", lambda: sys.argv),
        _attribute(sys, "stdin"),
        _attribute(sys, "stdout"),
        _attribute(sys, "stderr"),
        _attribute(tempfile, "tempdir"),
        dataclasses.replace(
            _attribute(sys, "excepthook"),
            is_set_by_runs=True,
            tell=_tell_excepthook,
        ),
        Trait(name="recursion limit", read=sys.getrecursionlimit, write=sys.setrecursionlimit),
        Trait(name="trace function", read=sys.gettrace, write=sys.settrace),
        Trait(name="profile function", read=sys.getprofile, write=sys.setprofile),
        Trait(
            name="locale",
            read=lambda: locale.setlocale(locale.LC_ALL),
            write=lambda before: locale.setlocale(locale.LC_ALL, before),
        ),
        Trait(
            name="default timeout of sockets",
            read=socket.getdefaulttimeout,
            write=socket.setdefaulttimeout,
        ),
        Trait(
            name="garbage collection enabled:",
            read=gc.isenabled,
            write=lambda before: gc.enable() if before else gc.disable(),
        ),
        Trait(
            name="thresholds of garbage collection",
            read=gc.get_threshold,
            write=lambda before: gc.set_threshold(*before),
        ),
        Trait(
            name="warning filters",
            read=lambda: tuple(warnings.filters),
            write=_write_filters,
            tell=tell_sequence("warnings.filters"),
        ),
        Trait(name="start method of multiprocessing", read=_read_method, write=_write_method),
    )


def _of_logging() -> tuple[Trait, ...]:
    manager, loggers = logging.root.manager, _Loggers()
    return (
        Trait(name="logging.disable", read=lambda: manager.disable, write=logging.disable),
        Trait(
            name="logger",
            read=loggers.read,
            take=loggers.take,
            version=lambda: len(manager.loggerDict),
            write=loggers.write,
            tell=loggers.tell,
        ),
    )


def _attribute(module: Any, name: str) -> Trait:
    return Trait(
        name=f"{module.__name__}.{name}",
        read=lambda: getattr(module, name, None),
        write=lambda before: setattr(module, name, before),
    )


def _list_trait(name: str, current: Callable[[], list[Any]]) -> Trait:
    def write(before: tuple[Any, ...]) -> None:
        current()[:] = before

    return Trait(name=name, read=lambda: tuple(current()), write=write, tell=tell_sequence(name))


# ---- environment and folder


def _read_environment() -> dict[bytes, bytes]:
    found = _compat_state.environment()
    for name in _VOLATILE & found.keys():
        del found[name]
    return found


def _write_environment(before: dict[bytes, bytes]) -> None:
    now = _read_environment()
    for name in {*before, *now}:
        if now.get(name) != before.get(name):
            if name in before:
                os.environb[name] = before[name]
            else:
                del os.environb[name]
            if name == b"TZ":
                time.tzset()


def _text(environment: dict[bytes, bytes]) -> dict[str, str]:
    return {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}


def _read_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "one that was removed"


def _write_directory(before: str) -> None:
    with contextlib.suppress(OSError):  # the test removed it: the next one will say so
        os.chdir(before)


def _read_umask() -> int:
    now = os.umask(0o077)  # there is no other quick way to read it
    os.umask(now)
    return now


# ---- signals and limits


def _read_signals() -> list[Any]:
    found = _compat_state.signal_handlers(_SIGNALS)
    if _is_of(found[_CHILD], "torch.utils.data"):  # set once for the process, with a flag
        found[_CHILD] = int(signal.SIG_DFL)
    return found


def _write_signals(before: list[Any]) -> None:
    for number, was, now in zip(_SIGNALS, before, _read_signals(), strict=True):
        if was != now:
            signal.signal(number, was)  # raises for None, a handler in C: not put back


def _handler(handler: Any) -> str:
    return signal.Handlers(handler).name if isinstance(handler, int) else show(handler)


def _write_limits(before: dict[str, tuple[int, int]]) -> None:
    for name, limits in before.items():
        if resource.getrlimit(_LIMITS[name]) != limits:
            resource.setrlimit(_LIMITS[name], limits)


# ---- Python


def _tell_excepthook(before: Any, after: Any) -> list[str]:
    if _is_of(after, "torch.distributed"):  # with each group: it prints the rank
        return []
    return [f"sys.excepthook was replaced by {show(after)} (was {show(before)})"]


def _is_of(function: Any, package: str) -> bool:
    return str(getattr(function, "__module__", "")).startswith(f"{package}.")


def _write_filters(before: tuple[Any, ...]) -> None:
    warnings.filters[:] = before  # type: ignore[index]
    with warnings.catch_warnings():  # has the filters read anew
        pass


def _read_method() -> str | None:
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None:
        return None
    method: str | None = multiprocessing.get_start_method(allow_none=True)
    # whoever uses multiprocessing fixes the default one
    return None if method == multiprocessing.get_all_start_methods()[0] else method


def _write_method(before: str | None) -> None:
    sys.modules["multiprocessing"].set_start_method(before, force=True)


# ---- logging


class _Loggers:
    """All loggers that existed before the test; one made in a test is the test's alone."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._known: list[logging.Logger] = []

    def take(self) -> list[Any]:
        """Return the state of all loggers, with copies of their lists of handlers."""
        known = logging.root.manager.loggerDict
        found = {
            name: one
            for name, one in known.items()
            if isinstance(one, logging.Logger) and name != _compat_state.TRACE_LOGGER
        }
        self._names = ["root", *found]
        self._known = [logging.root, *found.values()]
        return [(*state[:3], list(state[3])) for state in self.read()]

    def read(self) -> list[Any]:
        """Return the state of the loggers that are known."""
        return list(map(_OF_A_LOGGER, self._known))

    def write(self, before: list[Any]) -> None:
        """Put level, handlers and the rest back."""
        for one, was, now in zip(self._known, before, self.read(), strict=True):
            if was != now:
                one.setLevel(was[0])
                one.disabled, one.propagate = was[1:3]
                for handler in now[3]:
                    if handler not in was[3]:
                        handler.close()
                one.handlers[:] = was[3]

    def tell(self, before: list[Any], after: list[Any]) -> list[str]:
        """Return what changed, as text."""
        lines = []
        for name, was, now in zip(self._names, before, after, strict=True):
            if was[0] != now[0]:
                level, old = map(logging.getLevelName, (now[0], was[0]))
                lines.append(f"logger {name!r} has level {level} (was {old})")
            for what, new, old in zip(("disabled", "propagate"), now[1:3], was[1:3], strict=True):
                if new != old:
                    lines.append(f"logger {name!r} has {what} {new} (was {old})")
            if was[3] != now[3]:
                lines += tell_sequence(f"logger {name!r}")(was[3], now[3])
        return lines
