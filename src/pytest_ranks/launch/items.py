"""Test items on ranks, seen from the controller: a pytest plugin registered when needed.

An item with the mark `ranks` stays an ordinary item here: its protocol and reruns are pytest's.
Its setup runs all of it on the ranks, setup, call and teardown; a wrapper around
`pytest_runtest_makereport` then puts what they made of each phase in the place of ours.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import _compat, _compat_terminal, marks, options
from pytest_ranks.errors import RankFailure, RankTimeout, UnavailableError
from pytest_ranks.launch import deaths, interrupts, scopes, tokens
from pytest_ranks.launch.fidelity import unfold
from pytest_ranks.launch.forensics.rerun import explain_again
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.pools import MakeRanks, Pool, PoolKey
from pytest_ranks.launch.reporting import leftovers, reports, subtests
from pytest_ranks.launch.reporting.item_record import record_of, record_without_ranks
from pytest_ranks.launch.reporting.warned import forward_warnings, warn
from pytest_ranks.launch.requests import ItemRequest, is_alone
from pytest_ranks.launch.service import RankService
from pytest_ranks.launch.start import harvest_of
from pytest_ranks.launch.terminal import debug
from pytest_ranks.report.records import ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.reporting.reports import ItemOutcome
    from pytest_ranks.launch.spec import RankSpec

OUTCOME_KEY = pytest.StashKey["ItemOutcome"]()
# pytest-timeout ends the controller's wait, or the whole session; ours has to be earlier.
BEFORE_PYTEST_TIMEOUT = 0.8


class RankItems:
    """Runs the items of one session that ask for ranks.

    Args:
        session: whose items they are.
        make_ranks: forks the ranks of a pool.
    """

    def __init__(self, session: pytest.Session, *, make_ranks: MakeRanks = Ranks) -> None:
        self._session = session
        self._config = session.config
        self._service = RankService(
            session, hardware=lambda: marks.hardware(session.config), make_ranks=make_ranks
        )
        self._order: list[tuple[str, PoolKey]] = []
        self._index: dict[str, int] = {}
        self._next: pytest.Item | None = None
        self._early: Pool | UnavailableError | None = None
        self._session_end: tuple[str, int | None] | None = None
        self._has_report = options.settings(session.config).report is not None
        self._owner = os.getpid()

    # ---- life

    @property
    def link(self) -> ZygoteLink:
        """The link to the zygote."""
        return self._service.link

    def start(self) -> None:
        """Start the zygote before collection."""
        self._service.start()

    def take_over(self, items: list[pytest.Item]) -> None:
        """Have these items run on ranks."""
        shared = scopes.shared_scopes(items)
        tokens.share(self._config, self._tokens_of)
        for item in items:
            spec = _spec_of(item)
            key = PoolKey(
                world_size=spec.processes,
                backend=spec.backend,
                scope=shared[item.nodeid],
                fidelity=f"{spec.fidelity} {spec.simulated}".strip(),
            )
            self._index[item.nodeid] = len(self._order)
            self._order.append((item.nodeid, key))
            self._empty(item)
        with contextlib.suppress(UnavailableError):  # the first item meets it again
            self._service.collect(tuple(dict.fromkeys(str(item.path) for item in items)))

    def _empty(self, item: pytest.Item) -> None:
        vars(item).update(
            setup=lambda: self._set_up(item),
            runtest=lambda: _raise(item, "call"),
            teardown=lambda: None,  # its report is written over; pytest would fold what is raised
        )

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """After the last item run the teardowns that ranks still owe."""
        harvest = harvest_of(self._config)
        try:
            result = yield
        except KeyboardInterrupt:
            harvest.take_in()
            raise  # whoever pressed Ctrl-C does not want to wait
        except BaseException:
            self._tear_down_idle()
            harvest.take_in()
            raise
        self._tear_down_idle()
        harvest.take_in()
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """End everything, however the session ended."""
        if os.getpid() == self._owner:
            self._service.end()
            harvest_of(self._config).close()

    # ---- one item

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Remember what runs next in this session; have ranks before pytest-timeout's clock starts."""
        self._next = nextitem
        is_ours = item.nodeid in self._index
        if is_ours and _compat.timeout_of(item) is not None:
            try:
                self._early = self._take(item)
            except UnavailableError as error:
                self._early = error
        try:
            with _compat_terminal.listening_quickly() if is_ours else contextlib.nullcontext():
                result = yield
        finally:
            if isinstance(self._early, Pool):  # the item did not run
                self._service.give_back(self._early)
            self._early = None
        if self._session_end is not None:
            text, status = self._session_end
            pytest.exit(text, returncode=status)
        return result

    def _set_up(self, item: pytest.Item) -> None:
        """Stand in for the item's setup: run all of it, since its report comes first."""
        __tracebackhide__ = True
        decided = self._on_ranks(item)
        item.stash[OUTCOME_KEY] = decided
        self._session_end = decided.session_end
        _raise(item, "setup")

    def _on_ranks(self, item: pytest.Item) -> ItemOutcome:
        request = self._request(item)
        try:
            early, self._early = self._early, None
            if isinstance(early, UnavailableError):
                raise early
            pool = early or self._take(item)
            self._warm_next()
            debug.note_world(self._config, request.spec.processes)
            start = time.monotonic()
            with interrupts.naming(item.nodeid, request.spec.world_size):
                done = self._service.run(request, pool)
        except UnavailableError as error:
            self._service.recover(error)
            raise pytest.fail.Exception(f"{item.nodeid}: {error}", pytrace=False) from None
        seconds = time.monotonic() - start
        has_processes = request.spec.processes == request.spec.world_size
        forward_warnings(self._config, done.runs, has_processes=has_processes)
        subtests.note(item, done.runs)
        if options.settings(self._config).collective_debug == "on_failure":
            allowed = _compat.timeout_of(item)
            done.explanations += explain_again(self._service, request, done, allowed=allowed)
        context = reports.Context(
            timeout=request.seconds,
            world_size=request.spec.world_size,
            seconds=seconds,
            notes=done.notes,
            explanations=done.explanations,
            unawaited=done.unawaited,
            fidelity=request.spec.fidelity,
            played=unfold.played(request.spec),
            expected_ends=deaths.expected_ends(request.spec),
        )
        decided = reports.decide(item, done.runs, context)
        is_strict = options.settings(self._config).strict_hygiene
        decided = leftovers.judge(item, decided, done.runs, is_strict=is_strict)
        is_dirty = leftovers.is_dirty(done.runs) or unfold.is_spent(item, request.spec)
        errors = self._service.settle(request, done, is_clean=decided.is_clean, is_dirty=is_dirty)
        decided.sections.extend(done.remarks)
        if errors:
            decided.fail_teardown(item, errors)
        if debug.has_quit(done.runs):
            if decided.session_end is not None:  # from a breakpoint: the item has no outcome
                pytest.exit(debug.QUIT)
            decided.session_end = (debug.QUIT, None)
        if self._has_report:
            decided.record = record_of(item, request.spec, decided, done)
        if (held := self._service.check_in(done.pool)) is not None:
            warn(item, held)
        return decided

    def _take(self, item: pytest.Item) -> Pool:
        return self._service.take(_spec_of(item), self._key_of(item), owner=item.nodeid)

    def _warm_next(self) -> None:
        if self._next is not None and self._next.nodeid in self._index:
            self._service.warm(_spec_of(self._next))

    def _request(self, item: pytest.Item) -> ItemRequest:
        spec, key = _spec_of(item), self._key_of(item)
        following, hold = (None, False) if is_alone(spec) else self._next_of(item, key)
        return ItemRequest(
            node_id=item.nodeid,
            spec=spec,
            key=key,
            seconds=self._seconds(item, spec),
            following=following,
            hold=hold,
            is_last=self._is_last_of(item, key),
            is_detailed=options.settings(self._config).collective_debug == "always",
        )

    def _is_last_of(self, item: pytest.Item, key: PoolKey) -> bool:
        """Return whether no later item needs ranks of this shape, as far as that is known."""
        if hasattr(self._config, "workerinput"):
            return self._next is None
        start = self._index[item.nodeid] + 1
        return all(other != key for _, other in itertools.islice(self._order, start, None))

    def _tokens_of(self, item: pytest.Item) -> int:
        return tokens.needed(_spec_of(item)) if item.nodeid in self._index else 0

    def _key_of(self, item: pytest.Item) -> PoolKey:
        return self._order[self._index[item.nodeid]][1]

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

    def _seconds(self, item: pytest.Item, spec: RankSpec) -> float:
        if debug.chosen_rank(self._config) is not None:
            return debug.LIFTED_SECONDS
        seconds = spec.timeout or options.settings(self._config).timeout
        theirs = _compat.timeout_of(item)
        return seconds if theirs is None else min(seconds, theirs * BEFORE_PYTEST_TIMEOUT)

    # ---- reports

    def _tear_down_idle(self) -> None:
        for node_id, errors in self._service.tear_down_idle():
            self._report_late(node_id, errors)

    def _report_late(self, node_id: str, errors: list[str]) -> None:
        """Report a wide teardown that failed after its last test's report was out."""
        item = next(item for item in self._session.items if item.nodeid == node_id)
        report = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr="\n".join(errors),
            when="teardown",
        )
        if self._has_report:
            setattr(report, ATTRIBUTE, record_without_ranks(_spec_of(item), report, "error"))
        item.ihook.pytest_runtest_logreport(report=report)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the ranks' outcome in the place of the controller's."""
        report = yield
        decided = item.stash.get(OUTCOME_KEY, None)
        if decided is not None:
            decided.place(report)
            if call.when == "setup":
                subtests.log(item)
            if call.when == "teardown":
                del item.stash[OUTCOME_KEY]  # a rerun may be skipped before it comes to its ranks
        elif self._has_report and item.nodeid in self._index and not report.passed:
            setattr(report, ATTRIBUTE, record_without_ranks(_spec_of(item), report, "not_run"))
        return report


def _raise(item: pytest.Item, when: str) -> None:
    """Raise what the ranks made of a phase, for those who look at the call and not at the report."""
    __tracebackhide__ = True
    found = item.stash[OUTCOME_KEY].of(when)
    if found.outcome == "failed":
        decided = item.stash[OUTCOME_KEY]
        kind = RankTimeout if decided.verdict == "timed_out" else RankFailure
        root = decided.failures[0].rank if decided.failures else 0
        raise kind(found.text, rank=root, world_size=len(decided.results))
    if found.outcome == "skipped":
        if found.was_xfail is not None:
            pytest.xfail(found.was_xfail)
        pytest.skip(found.text)


def _spec_of(item: pytest.Item) -> RankSpec:
    spec = marks.read(item).spec
    assert spec is not None
    return spec
