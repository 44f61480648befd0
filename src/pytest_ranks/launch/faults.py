"""Faults that a test injects into its own ranks: real deaths, real hangs, slow links.

The test makes the same call on every rank, and each rank acts on its own only. A fault that has
to strike inside a collective waits until the others of its group are in there.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.launch.injection import triggers
from pytest_ranks.launch.injection.injector import Injector
from pytest_ranks.launch.injection.slow_link import SlowLink
from pytest_ranks.launch.injection.traffic_control import ShapedInterface
from pytest_ranks.launch.rank_context import current_rank

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_ranks.launch.injection.triggers import AtStep

# A process that gets one of these goes on, or stops without an end.
NOT_DEADLY = frozenset(
    [
        "SIGCHLD",
        "SIGCLD",
        "SIGCONT",
        "SIGSTOP",
        "SIGTSTP",
        "SIGTTIN",
        "SIGTTOU",
        "SIGURG",
        "SIGWINCH",
    ]
)


class Faults:
    """Injects faults into the ranks of a test: the same call on all of them, in body or fixture.

    Collectives and optimizer steps are counted from the moment when this object is there. A fault
    that never happens before the test's body is over fails the test.
    """

    def __init__(self, injector: Injector) -> None:
        self._injector = injector

    def kill(
        self,
        rank: int,
        *,
        sig: str | signal.Signals = "SIGKILL",
        at: str | AtStep | None = None,
        after: float | None = None,
    ) -> None:
        """Send a signal to a rank's process; its mark says `expect_deaths=`.

        Args:
            rank: whose process.
            sig: the signal. A handler that the process has for it runs.
            at: "all_reduce#3", "#5" or `step(2)`; None: at once.
            after: seconds from now, in place of `at`.

        Raises:
            BadInputError: an argument cannot be used.
        """
        __tracebackhide__ = True
        number = _signal(sig)
        given = {"rank": rank} | ({} if number.name == "SIGKILL" else {"sig": number.name})
        self._injector.arm("kill", given, lambda: _send(number), at=at, after=after)

    def hang(
        self, rank: int, *, at: str | AtStep | None = None, after: float | None = None
    ) -> None:
        """Freeze a rank: none of its threads goes on, its connections stay open.

        The rank is ended when all others have finished; that is no failure.

        Args:
            rank: which one.
            at: "all_reduce#3", "#5" or `step(2)`; None: at once.
            after: seconds from now, in place of `at`.

        Raises:
            BadInputError: an argument cannot be used.
        """
        __tracebackhide__ = True
        self._injector.arm("hang", {"rank": rank}, _freeze, at=at, after=after)

    def delay(
        self,
        rank: int,
        seconds: float,
        *,
        at: str | AtStep | None = None,
        after: float | None = None,
    ) -> None:
        """Have a rank sleep before it goes on.

        Args:
            rank: which one.
            seconds: for how long.
            at: "all_reduce#3", "#5" or `step(2)`; None: at once.
            after: seconds from now, in place of `at`.

        Raises:
            BadInputError: an argument cannot be used.
        """
        __tracebackhide__ = True
        length = triggers.check_seconds("faults.delay", "seconds", seconds)
        given = {"rank": rank, "seconds": seconds}
        self._injector.arm("delay", given, lambda: time.sleep(length), at=at, after=after)

    def raise_(
        self,
        rank: int,
        exception: BaseException | type[BaseException],
        *,
        at: str | AtStep | None = None,
        after: float | None = None,
    ) -> None:
        """Raise an exception on a rank, out of the collective or step that it is about to make.

        Args:
            rank: which one.
            exception: what it raises.
            at: "all_reduce#3", "#5" or `step(2)`; None: at once.
            after: seconds from now, in place of `at`; a main thread that is blocked in a
                collective raises when it comes out.

        Raises:
            BadInputError: an argument cannot be used.
        """
        __tracebackhide__ = True
        is_class = isinstance(exception, type) and issubclass(exception, BaseException)
        if not is_class and not isinstance(exception, BaseException):
            raise BadInputError(
                f"faults.raise_(exception={exception!r}): expected an exception, such as "
                "RuntimeError('link down')."
            )

        def strike() -> None:
            __tracebackhide__ = True
            raise exception

        given = {"rank": rank, "exception": exception}
        self._injector.arm("raise_", given, strike, at=at, after=after)

    def drop_store(self, *, at: str | AtStep | None = None, after: float | None = None) -> None:
        """Take the stores of this run away: connections break, and nobody listens any more.

        Args:
            at: "all_reduce#3", "#5" or `step(2)`, on each rank; None: at once.
            after: seconds from now, in place of `at`.

        Raises:
            BadInputError: an argument cannot be used.
        """
        __tracebackhide__ = True
        self._injector.arm("drop_store", {}, self._injector.lose_store, at=at, after=after)

    def slow_network(
        self,
        *,
        bandwidth: float | None = None,
        latency: float = 0.0,
        interface: str | None = None,
        at: str | AtStep | None = None,
        after: float | None = None,
    ) -> None:
        """Have each collective take as long as a slower network would make it.

        See `pytest_ranks.launch.injection.slow_link` for the model.

        Args:
            bandwidth: bytes a second; None: as fast as it is.
            latency: seconds for each message.
            interface: of the cable between nodes that are network namespaces: the kernel's
                traffic control then slows that, and all that goes over it, in place of the model.
            at: "all_reduce#3", "#5" or `step(2)`, on each rank: from there on; None: at once.
            after: seconds from now, in place of `at`.

        Raises:
            BadInputError: an argument cannot be used.
            UnavailableError: there is no traffic control here.
        """
        __tracebackhide__ = True
        delay = triggers.check_seconds("faults.slow_network", "latency", latency)
        if bandwidth is None and delay == 0:
            raise BadInputError(
                "faults.slow_network(): expected a bandwidth in bytes a second, a latency in "
                "seconds, or both."
            )
        if bandwidth is not None and not (triggers.is_number(bandwidth) and bandwidth > 0):
            raise BadInputError(
                f"faults.slow_network(bandwidth={bandwidth!r}): expected bytes a second, above 0."
            )
        shown = {"bandwidth": bandwidth, "latency": latency, "interface": interface}
        given = {name: value for name, value in shown.items() if value}
        if interface is None:
            link = SlowLink(bandwidth=bandwidth or math.inf, latency=delay)
            strike = functools.partial(self._injector.slow, link)
        else:
            cable = ShapedInterface(interface)
            strike = functools.partial(
                self._injector.shape, cable, bandwidth=bandwidth, latency=delay
            )
        self._injector.arm("slow_network", given, strike, at=at, after=after)


@contextlib.contextmanager
def inject_faults() -> Generator[Faults]:
    """Inject faults into the rank that this process plays, until the block ends.

    For functions that `launch` runs; a test has the fixture `faults`.

    Raises:
        UnavailableError: this process plays no rank, or this torch lets nobody see collectives.
        AssertionError: the block ended without an error, and a fault never happened.
    """
    __tracebackhide__ = True
    injector = Injector(current_rank())
    injector.start()
    try:
        yield Faults(injector)
        if missed := injector.settle():
            raise AssertionError(missed)
    finally:
        injector.close()


class MissedFaults:
    """Fails a test that asked for faults which never happened: it verified nothing of them.

    A pytest plugin for the time of one test, so that the failure is the call's own.
    """

    def __init__(self, injector: Injector) -> None:
        self._injector = injector
        self._is_told = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None]:
        """Look once the test's body is over without an error."""
        try:
            yield
            self.tell()
        finally:
            self._is_told = True  # an error of the body's own says more
            self._injector.settle()

    def tell(self) -> None:
        """Fail where that was not told."""
        missed = self._injector.settle()
        if missed and not self._is_told:
            self._is_told = True
            pytest.fail(missed, pytrace=False)


def _signal(found: object) -> signal.Signals:
    """Return a signal that ends a process, unless that has a handler for it."""
    __tracebackhide__ = True
    names = [name for name in signal.Signals.__members__ if name not in NOT_DEADLY]
    name = found.name if isinstance(found, signal.Signals) else found
    if name in names:
        return signal.Signals[str(name)]
    if name in NOT_DEADLY:
        raise BadInputError(
            f"faults.kill(sig={name!r}): expected a signal that ends a process, such as 'SIGKILL' "
            "or 'SIGTERM'; faults.hang freezes one."
        )
    hint = did_you_mean(found, names) if isinstance(found, str) else ""
    raise BadInputError(
        f"faults.kill(sig={found!r}): expected a signal, such as 'SIGKILL' or 'SIGTERM'.{hint}"
    )


def _send(number: signal.Signals) -> None:
    """Send a signal to this process, in this thread where Python has it act in this one."""
    __tracebackhide__ = True
    if threading.current_thread() is threading.main_thread():
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


def _freeze() -> None:
    """Stop this process with all its threads."""
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
