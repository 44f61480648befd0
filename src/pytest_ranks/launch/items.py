"""Test items on ranks, seen from the controller: a pytest plugin registered when needed.

An item with the mark `ranks` stays an ordinary item here: its protocol, reruns and durations are
pytest's. Its setup is empty, its `runtest` runs it on the ranks, and a wrapper around
`pytest_runtest_makereport` puts their outcome in the place of ours.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import _compat, marks, options
from pytest_ranks.errors import RankFailure, UnavailableError
from pytest_ranks.launch import reports, scopes
from pytest_ranks.launch.pools import Pool, PoolKey, Pools
from pytest_ranks.launch.start import start_zygote
from pytest_ranks.launch.warned import forward_warnings
from pytest_ranks.launch.wire import (
    Finished,
    Phase,
    Raised,
    Rendezvous,
    RunItem,
    TearDown,
    World,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.pool import RankRun
    from pytest_ranks.launch.reports import ItemOutcome
    from pytest_ranks.launch.spec import RankSpec

OUTCOME_KEY = pytest.StashKey["ItemOutcome"]()
# The group's own timeout lies behind ours, so that ours reports first, with all stacks.
BEHIND_DEADLINE = 30.0
# pytest-timeout ends the controller's wait, or the whole session; ours has to be earlier.
BEFORE_PYTEST_TIMEOUT = 0.8
TEARDOWN_SECONDS = 5.0
MOST_STARTS = 3  # a zygote that ends again and again is not started for ever


class RankItems:
    """Runs the items of one session that ask for ranks."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._config = session.config
        self._link: ZygoteLink | None = None
        self._pools: Pools | None = None
        self._order: list[tuple[str, PoolKey]] = []
        self._index: dict[str, int] = {}
        self._next: pytest.Item | None = None
        self._early: Pool | None = None
        self._files: tuple[str, ...] = ()
        self._starts = 0
        self._owner = os.getpid()

    # ---- life

    def start(self) -> None:
        """Start the zygote, as a fork of this session where that is safe."""
        if self._link is not None:
            return
        self._starts += 1
        self._link = start_zygote(self._session, fresh=self._starts > 1)
        self._pools = Pools(self._link)

    def take_over(self, items: list[pytest.Item]) -> None:
        """Have these items run on ranks."""
        shared = scopes.shared_scopes(items)
        for item in items:
            spec = marks.read(item).spec
            assert spec is not None
            key = PoolKey(
                world_size=spec.world_size, backend=spec.backend, scope=shared[item.nodeid]
            )
            self._index[item.nodeid] = len(self._order)
            self._order.append((item.nodeid, key))
            self._empty(item)
        self._files = tuple(dict.fromkeys(str(item.path) for item in items))
        with contextlib.suppress(UnavailableError):  # the first item meets it again
            self._begin()

    def _begin(self) -> None:
        self.start()
        assert self._link is not None
        self._link.collect(self._files)

    def _empty(self, item: pytest.Item) -> None:
        vars(item).update(
            setup=lambda: None,
            runtest=lambda: self._run(item),
            teardown=lambda: None,
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """After the last item run the teardowns that ranks still owe."""
        try:
            result = yield
        except KeyboardInterrupt:
            raise  # whoever pressed Ctrl-C does not want to wait
        except BaseException:
            self._tear_down_idle()
            raise
        self._tear_down_idle()
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """End everything, however the session ended."""
        if os.getpid() == self._owner:
            self._end()

    def _end(self) -> None:
        if self._pools is not None and self._link is not None:
            self._pools.close()
            self._link.close()
        self._pools = self._link = None

    # ---- one item

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Remember what runs next in this session; have ranks before pytest-timeout's clock starts."""
        self._next = nextitem
        if item.nodeid in self._index and _compat.timeout_of(item) is not None:
            with contextlib.suppress(UnavailableError):  # the item meets it again
                self._early = self._take(item)
        try:
            return (yield)
        finally:
            if self._early is not None and self._pools is not None:  # the item did not run
                self._pools.give_back(self._order[self._index[item.nodeid]][1], self._early)
            self._early = None

    def _run(self, item: pytest.Item) -> None:
        """Stand in for the item's `runtest`."""
        __tracebackhide__ = True
        decided = self._on_ranks(item)
        item.stash[OUTCOME_KEY] = decided
        if decided.when == "teardown" or decided.verdict in ("passed", "xpassed"):
            return
        if decided.verdict == "skipped":
            pytest.skip(decided.text)
        if decided.verdict == "xfailed":
            pytest.xfail(decided.was_xfail or "")
        raise RankFailure(decided.text, rank=0, world_size=0)

    def _on_ranks(self, item: pytest.Item) -> ItemOutcome:
        spec = marks.read(item).spec
        assert spec is not None
        seconds = self._seconds(item, spec)
        key = self._order[self._index[item.nodeid]][1]
        try:
            pool, self._early = self._early or self._take(item), None
            pool.last_node_id = item.nodeid
            runs = self._watch(item, spec, key, pool, seconds)
        except UnavailableError as error:
            if self._starts < MOST_STARTS:
                self._end()  # the next item begins anew
            pytest.fail(f"{item.nodeid}: {error}", pytrace=False)
        forward_warnings(self._config, runs)
        decided = reports.decide(item, runs, timeout=seconds, note=self._note(pool))
        self._settle(key, pool, runs, decided, isolate=_is_alone(spec))
        return decided

    def _take(self, item: pytest.Item) -> Pool:
        spec = marks.read(item).spec
        assert spec is not None
        if self._pools is None:
            self._begin()
        assert self._pools is not None
        key = self._order[self._index[item.nodeid]][1]
        return self._pools.take(key, fresh=_is_alone(spec))

    def _watch(
        self, item: pytest.Item, spec: RankSpec, key: PoolKey, pool: Pool, seconds: float
    ) -> list[RankRun]:
        assert self._link is not None
        assert self._pools is not None
        number = self._pools.next_number()
        folder = _compat.base_temp(self._config) / "ranks"
        shared = folder / f"shared{number}"
        shared.mkdir(parents=True)
        port = self._link.open_store()
        rendezvous = Rendezvous(
            run=number,
            port=port,
            home_port=pool.home_port,
            seconds=seconds + BEHIND_DEADLINE,
        )

        following, hold = (None, False) if _is_alone(spec) else self._next_of(item, key)

        def request(rank: int) -> RunItem:
            world = World(
                rank=rank,
                world_size=spec.world_size,
                backend=spec.backend,
                mesh=spec.mesh,
                keep_group=key.scope is not None and not _is_alone(spec),
                rendezvous=rendezvous,
                shared_tmp_path=str(shared),
            )
            return RunItem(
                world=world,
                node_id=item.nodeid,
                next_node_id=following,
                hold=hold,
                base_temp=str(folder / f"{pool.home_port}" / f"rank{rank}"),
            )

        try:
            runs, _ = pool.ranks.run(
                request, is_last=_is_last, is_failure=_is_failure, timeout=seconds
            )
        except BaseException:
            self._pools.kill(pool)
            raise
        finally:
            self._link.close_store(port)
        return runs

    def _next_of(self, item: pytest.Item, key: PoolKey) -> tuple[str | None, bool]:
        """Return what this item's pool runs next, and whether to keep fixtures not knowing that.

        An xdist worker learns its items one by one: it keeps wide fixtures until its last item,
        and ranks end what an item does not share before they run it.
        """
        if key.scope is None:
            return None, False
        if hasattr(self._config, "workerinput"):
            return None, self._next is not None
        start = self._index[item.nodeid] + 1
        return next((name for name, other in self._order[start:] if other == key), None), False

    def _settle(
        self,
        key: PoolKey,
        pool: Pool,
        runs: list[RankRun],
        decided: ItemOutcome,
        *,
        isolate: bool,
    ) -> None:
        """Keep the pool where that is safe, else end it."""
        assert self._pools is not None
        if not all(run.done for run in runs):
            self._pools.kill(pool)
            return
        sequences = {
            message.sequence
            for run in runs
            for message in run.messages
            if isinstance(message, Finished)
        }
        is_cut = any(isinstance(message, Phase) for run in runs for message in run.messages)
        is_kept_clean = key.scope is None or (len(sequences) == 1 and not is_cut)
        if decided.is_clean and is_kept_clean and not isolate:
            self._pools.give_back(key, pool)
            return
        if key.scope is not None:
            errors = self._tear_down(pool)
            decided.sections.extend(("Teardown of wide fixtures", error) for error in errors)
        self._pools.retire(pool)

    # ---- teardowns of wide fixtures

    def _tear_down(self, pool: Pool) -> list[str]:
        """Run the teardowns of all live fixtures on a pool, bounded in time."""
        runs, timed_out = pool.ranks.run(
            lambda _: TearDown(),
            is_last=lambda message: isinstance(message, Finished | Raised),
            is_failure=lambda message: isinstance(message, Raised),
            timeout=TEARDOWN_SECONDS,
            starts=False,
        )
        errors = [
            f"rank {run.rank}: {error}"
            for run in runs
            for message in run.messages
            if isinstance(message, Finished)
            for error in message.errors
        ]
        if timed_out:
            errors.append(f"not over after {TEARDOWN_SECONDS:g} s")
        return errors

    def _tear_down_idle(self) -> None:
        if self._pools is None:
            return
        for key, pool in self._pools.idle():
            if key.scope is None or not pool.ranks.is_alive():
                continue
            errors = self._tear_down(pool)
            if errors:
                self._report_late(pool, errors)

    def _report_late(self, pool: Pool, errors: list[str]) -> None:
        """Report a wide teardown that failed after its last test's report was out."""
        items = {item.nodeid: item for item in self._session.items}
        item = items[pool.last_node_id]
        text = "\n".join(errors)
        report = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=text,
            when="teardown",
        )
        item.ihook.pytest_runtest_logreport(report=report)

    # ---- reports

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the ranks' outcome in the place of the controller's."""
        report = yield
        if call.when == "setup" and OUTCOME_KEY in item.stash:
            del item.stash[OUTCOME_KEY]  # of the run that a rerun repeats
        decided = item.stash.get(OUTCOME_KEY, None)
        if decided is not None and call.when in ("call", "teardown"):
            _place(report, decided)
        return report

    def _seconds(self, item: pytest.Item, spec: RankSpec) -> float:
        seconds = spec.timeout or options.settings(self._config).timeout
        theirs = _compat.timeout_of(item)
        return seconds if theirs is None else min(seconds, theirs * BEFORE_PYTEST_TIMEOUT)

    def _note(self, pool: Pool) -> str:
        assert self._link is not None
        notes = []
        if self._link.how == "fresh":
            notes.append(
                "note: the ranks collected in a process of their own, because this one had "
                "threads or torch before collection, so a fork was not safe"
            )
        if (threads := pool.ranks.native_threads()) > 1:
            notes.append(
                f"note: the process that ranks are forked from had {threads} native threads"
            )
        return "\n".join(notes)


def _is_alone(spec: RankSpec) -> bool:
    """Return whether an item gets ranks of its own: a CUDA context is not handed to another test."""
    return spec.isolate or spec.backend != "gloo"


def _is_last(message: object) -> bool:
    return isinstance(message, Finished | Raised)


def _is_failure(message: object) -> bool:
    if isinstance(message, Phase):
        return message.outcome == "failed"
    return isinstance(message, Raised) or (
        isinstance(message, Finished) and message.missing is not None
    )


def _place(report: pytest.TestReport, decided: ItemOutcome) -> None:
    """Write the outcome over a report of the controller's."""
    is_its_phase = report.when == decided.when or (
        report.when == "call" and decided.when == "setup"
    )
    if report.when == "call":
        report.sections = [*decided.sections]
        report.user_properties.extend(decided.properties)
    if not is_its_phase:
        return
    report.when = decided.when  # type: ignore[assignment]
    report.longrepr = decided.longrepr
    if decided.was_xfail is not None:
        report.wasxfail = decided.was_xfail
    elif hasattr(report, "wasxfail"):
        del report.wasxfail
    outcomes = {"passed": "passed", "xpassed": "passed", "skipped": "skipped", "xfailed": "skipped"}
    report.outcome = outcomes.get(decided.verdict, "failed")  # type: ignore[assignment]
