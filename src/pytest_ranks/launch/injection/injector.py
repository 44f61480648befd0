"""What makes faults strike inside a rank: it counts, waits for the peers, tells the controller."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.injection import triggers
from pytest_ranks.launch.injection.collective_calls import (
    POINT_TO_POINT,
    WAITING,
    Collectives,
    Issued,
)
from pytest_ranks.launch.injection.triggers import AfterSeconds, AtCollective, AtStep, Trigger
from pytest_ranks.launch.wire import Injected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_ranks.launch.injection.slow_link import SlowLink
    from pytest_ranks.launch.injection.traffic_control import ShapedInterface
    from pytest_ranks.launch.rank_context import RankContext

# A peer that waits elsewhere never comes: then the fault strikes without it.
PEERS_SECONDS = 10.0
LOSS_SECONDS = 10.0
POLL_SECONDS = 0.001
# Nobody else uses it; its handler is Python's, so what it does happens in the main thread.
MAIN_SIGNAL = signal.SIGRTMAX - 5
IN_MAIN = ("delay", "raise_")


@dataclass(slots=True, eq=False, kw_only=True)
class Fault:
    """One fault of this rank.

    Attributes:
        call: how the test wrote it.
        kind: name of the method.
        trigger: when it strikes, None for at once.
        strike: does it.
        has_struck: whether it has.
    """

    call: str
    kind: str
    trigger: Trigger | None
    strike: Callable[[], None]
    has_struck: bool = False

    @property
    def waits(self) -> bool:
        """Whether it strikes a collective only when the peers are in there."""
        return self.kind in ("kill", "hang")


class Injector:
    """Holds the faults of the rank that this process plays, and lets them strike.

    Args:
        context: the rank.

    Raises:
        BadInputError: it has no process of its own.
    """

    def __init__(self, context: RankContext) -> None:
        __tracebackhide__ = True
        if context._tell is None:
            raise BadInputError(
                f"faults: found ranks of fidelity {context.fidelity!r}, expected ranks with a "
                "process each: faults hit processes."
            )
        self._context = context
        self._tell = context._tell
        self._faults: list[Fault] = []
        self._lock = threading.RLock()  # a signal handler may come while it is held
        self._is_over = False
        self._store: Any = None  # where ranks tell that they are in a collective
        self._links: list[SlowLink] = []
        self._steps = {"before": 0, "after": 0}
        self._collectives = Collectives(self._around)
        self._undo = contextlib.ExitStack()
        self._for_main: list[Callable[[], None]] = []

    # ---- life

    def start(self) -> None:
        """Begin to count collectives and optimizer steps.

        Raises:
            UnavailableError: this torch lets nobody see collectives.
        """
        from torch.optim.optimizer import (
            register_optimizer_step_post_hook,
            register_optimizer_step_pre_hook,
        )

        self._collectives.start()
        self._undo.callback(self._collectives.stop)
        before = register_optimizer_step_pre_hook(lambda *_: self._count_step("before"))
        after = register_optimizer_step_post_hook(lambda *_: self._count_step("after"))
        self._undo.callback(before.remove)
        self._undo.callback(after.remove)
        handler = signal.signal(MAIN_SIGNAL, self._act_in_main)
        self._undo.callback(signal.signal, MAIN_SIGNAL, handler)

    def settle(self) -> str:
        """Let no fault strike any more; return what those did that never struck, or nothing."""
        with self._lock:
            self._is_over = True
        rank = f"rank {self._context.index}"
        lines = [
            f"{fault.call} never happened: {self._shortfall(rank, fault.trigger)}"
            for fault in self._faults
            if not fault.has_struck
        ]
        if any(not link.slowed for link in self._links):
            lines.append(f"faults.slow_network slowed nothing: {rank} issued no collective since")
        return "\n".join(lines)

    def close(self) -> None:
        """Leave this process as it was."""
        self.settle()
        self._undo.close()

    # ---- arming

    def arm(
        self,
        kind: str,
        given: Mapping[str, object],
        strike: Callable[[], None],
        *,
        at: object,
        after: object,
    ) -> None:
        """Have a fault strike on the rank that it names, on every rank where it names none.

        Args:
            kind: name of the method that the test called.
            given: its arguments, without the trigger.
            strike: what happens then.
            at: the trigger.
            after: seconds in place of it.

        Raises:
            BadInputError: there is no such rank, or the trigger cannot be read.
        """
        __tracebackhide__ = True
        rank, size = given.get("rank", self._context.index), self._context.world_size
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < size:
            raise BadInputError(
                f"faults.{kind}(rank={rank!r}): expected a rank from 0 to {size - 1}, since the "
                f"world has {size}."
            )
        trigger = triggers.parse(f"faults.{kind}", at, after)
        whens = {"at": at, "after": after}
        shown = {**given} | {name: value for name, value in whens.items() if value is not None}
        arguments = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        fault = Fault(call=f"faults.{kind}({arguments})", kind=kind, trigger=trigger, strike=strike)
        if fault.waits and isinstance(trigger, AtCollective) and size > 1 and self._store is None:
            # on every rank: each tells there that it is in a collective
            self._store = self._context._group.store(self._context._world, "faults")
        if rank != self._context.index:
            return
        self._faults.append(fault)
        if trigger is None:
            self._strike(fault, "at once")
        elif isinstance(trigger, AfterSeconds):
            timer = threading.Timer(trigger.seconds, self._strike_late, (fault,))
            timer.daemon = True
            timer.start()
            self._undo.callback(timer.cancel)

    def slow(self, link: SlowLink) -> None:
        """Have collectives go over a slower link from now on."""
        self._links.append(link)

    def shape(self, cable: ShapedInterface, *, bandwidth: float | None, latency: float) -> None:
        """Have an interface of this node send slowly, until the test is over; once for a node.

        Raises:
            UnavailableError: the kernel refuses.
        """
        __tracebackhide__ = True
        if self._context.local_rank == 0:
            cable.shape(bandwidth=bandwidth, latency=latency)
            self._undo.callback(cable.restore)

    def lose_store(self) -> None:
        """Wait until the stores of this run are gone, which the controller takes away."""
        __tracebackhide__ = True
        context = self._context
        store = context._group.store(context._world, "faults")
        end = time.monotonic() + LOSS_SECONDS
        with contextlib.suppress(RuntimeError):  # the connection is broken
            while time.monotonic() < end:
                store.add("here", 0)
                time.sleep(POLL_SECONDS)
            raise TimeoutError(f"the store of this run still answers after {LOSS_SECONDS:g} s")

    # ---- striking

    def _strike(self, fault: Fault, place: str) -> None:
        """Have a fault happen, once."""
        __tracebackhide__ = True
        if self._begin(fault, place):
            fault.strike()

    def _begin(self, fault: Fault, place: str) -> bool:
        """Tell the controller that a fault happens; return whether it still may."""
        with self._lock:
            if fault.has_struck or self._is_over:
                return False
            fault.has_struck = True
            self._tell(Injected(kind=fault.kind, call=fault.call, place=place))
        return True

    def _strike_late(self, fault: Fault) -> None:
        """Have a fault happen that a timer has called for."""
        place = "when its time had come"
        if fault.kind not in IN_MAIN:
            self._strike(fault, place)
            return
        # told from here: the main thread may be in the middle of a message of its own
        if not self._begin(fault, place):
            return
        self._for_main.append(fault.strike)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, MAIN_SIGNAL)

    def _act_in_main(self, number: int, frame: object) -> None:
        __tracebackhide__ = True
        del number, frame
        while self._for_main:
            self._for_main.pop(0)()

    def _around(self, issued: Issued, issue: Callable[[], Any]) -> Any:
        __tracebackhide__ = True
        for fault in self._faults:
            trigger = fault.trigger
            if isinstance(trigger, AtCollective) and _is_hit(trigger, issued):
                if fault.waits:
                    self._await_peers(issued)
                self._strike(fault, f"at {issued}")
        if issued.name in WAITING:
            self._tell_peers(issued)
        result = self._links[-1].slow(issued, issue) if self._links else issue()
        if issued.name not in WAITING:
            self._tell_peers(issued)
        return result

    def _await_peers(self, issued: Issued) -> None:
        """Wait until the others of the group are in this collective."""
        if self._store is None or issued.name in POINT_TO_POINT:
            return
        end = time.monotonic() + PEERS_SECONDS
        with contextlib.suppress(RuntimeError):  # the store is gone
            while self._store.add(_key(issued), 0) < issued.group_size - 1:
                if time.monotonic() > end:
                    return
                time.sleep(POLL_SECONDS)

    def _tell_peers(self, issued: Issued) -> None:
        if self._store is not None and issued.name not in POINT_TO_POINT:
            with contextlib.suppress(RuntimeError):
                self._store.add(_key(issued), 1)

    def _count_step(self, when: str) -> None:
        __tracebackhide__ = True
        self._steps[when] += 1
        for fault in self._faults:
            trigger = fault.trigger
            is_its = isinstance(trigger, AtStep) and trigger.when == when
            if is_its and trigger.number == self._steps[when]:  # type: ignore[union-attr]
                self._strike(fault, f"{when} optimizer step {self._steps[when]}")

    def _shortfall(self, rank: str, trigger: Trigger | None) -> str:
        if isinstance(trigger, AtCollective):
            return f"{rank} {trigger.describe_shortfall(self._collectives.counts)}"
        if isinstance(trigger, AtStep):
            steps = self._steps[trigger.when]
            return f"{rank} made {steps} optimizer step{'' if steps == 1 else 's'}"
        return "the test was over before"


def _is_hit(trigger: AtCollective, issued: Issued) -> bool:
    number = issued.number if trigger.name == issued.name else issued.total
    return trigger.name in ("", issued.name) and number == trigger.number


def _key(issued: Issued) -> str:
    return f"{issued.group}/{issued.group_number}"
