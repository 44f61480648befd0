"""Ranks for the items of one session: the zygote, the pools, the stores, and a run on them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_ranks import _compat
from pytest_ranks.errors import UnavailableError
from pytest_ranks.hardware.probes import probe
from pytest_ranks.hardware.requirements import BACKEND_DEVICES
from pytest_ranks.launch import deaths, kept
from pytest_ranks.launch.device_ranks import DeviceRanks
from pytest_ranks.launch.devices import DeviceDesk, DevicesUnavailable
from pytest_ranks.launch.fidelity import unfold
from pytest_ranks.launch.fidelity.ladder import HOSTED
from pytest_ranks.launch.forensics.explanation import explain
from pytest_ranks.launch.forensics.unawaited import is_uneven, unawaited
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.pools import MakeRanks, Pool, PoolKey, Pools
from pytest_ranks.launch.reporting.wide_teardowns import errors_of
from pytest_ranks.launch.requests import ItemRequest, is_alone, world_of
from pytest_ranks.launch.start import start_zygote
from pytest_ranks.launch.start_watch import StartOverdue
from pytest_ranks.launch.wire import (
    Finished,
    Injected,
    Phase,
    Raised,
    Rendezvous,
    RunItem,
    TearDown,
)
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from pytest_ranks.hardware.found import Hardware
    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.rank_run import RankRun
    from pytest_ranks.launch.spec import RankSpec

# The group's own timeout lies behind ours, so that ours reports first, with all stacks.
BEHIND_DEADLINE = 30.0
TEARDOWN_SECONDS = 5.0
MOST_STARTS = 3  # a zygote that ends again and again is not started for ever


@dataclass(slots=True, kw_only=True)
class ItemRun:
    """What the ranks made of an item.

    Attributes:
        pool: the ranks that it ran on.
        runs: what each of them did.
        notes: on how the ranks were started, where that may matter to a death.
        explanations: what was found out about a failure.
        unawaited: who left a collective behind, where all are done; nothing where nobody did.
        remarks: title and text of what the reader of the report should know about the ranks.
    """

    pool: Pool
    runs: list[RankRun]
    notes: list[str] = field(default_factory=list)
    explanations: list[str] = field(default_factory=list)
    unawaited: str = ""
    remarks: list[tuple[str, str]] = field(default_factory=list)


class RankService:
    """Starts what the items of a session need, runs them there, and ends it all.

    Args:
        session: whose items these are.
        hardware: returns what this machine has.
        make_ranks: forks the ranks of a pool.
    """

    def __init__(
        self,
        session: pytest.Session,
        *,
        hardware: Callable[[], Hardware] = probe,
        make_ranks: MakeRanks = Ranks,
    ) -> None:
        self._session = session
        # an outer launcher has dealt the devices of its world out itself
        self._devices = DeviceRanks(DeviceDesk(hardware)) if make_ranks is Ranks else None
        self._make_ranks = make_ranks
        self._link: ZygoteLink | None = None
        self._pools: Pools | None = None
        self._files: tuple[str, ...] = ()
        self._starts = 0
        self._hopeless = ""  # why no zygote is started any more
        self._settings = settings(session.config)

    # ---- life

    def start(self) -> None:
        """Start the zygote, as a fork of this session where that is safe.

        Raises:
            UnavailableError: one before has hung until its time was up.
        """
        if self._link is not None:
            return
        if self._hopeless:
            raise UnavailableError(self._hopeless)
        self._starts += 1
        self._link = start_zygote(self._session, fresh=self._starts > 1)
        self._pools = Pools(self._link, self._make_ranks, max_uses=self._settings.max_uses)

    @property
    def link(self) -> ZygoteLink:
        """The zygote's link, started where that was not done."""
        if self._link is None:
            self.collect(self._files)
        assert self._link is not None
        return self._link

    def collect(self, files: tuple[str, ...]) -> None:
        """Have the zygote collect these files, once.

        Raises:
            UnavailableError: the zygote ended.
        """
        self._files = files
        self.start()
        assert self._link is not None
        self._link.collect(files)

    def end(self) -> None:
        """End all ranks and the zygote."""
        if self._pools is not None and self._link is not None:
            if self._devices is not None:
                self._devices.drain(self._pools.retire)
            self._pools.close()
            self._link.close()
        self._pools = self._link = None

    def recover(self, error: UnavailableError) -> None:
        """Have the next item begin anew, a few times, after an item got no ranks.

        Where the zygote hangs before it can fork any, all later items are told so at once: what
        it hangs in is the import of the same files again.
        """
        if isinstance(error, DevicesUnavailable):
            return
        if isinstance(error, StartOverdue):
            self._hopeless = (
                "not run: the ranks could not start for an earlier test, within "
                f"{self._settings.join_timeout:g} s (--ranks-join-timeout); its report says "
                "what they were doing"
            )
        if self._hopeless or self._starts < MOST_STARTS:
            self.end()

    # ---- one item

    def take(self, spec: RankSpec, key: PoolKey, *, owner: str) -> Pool:
        """Return ranks for an item, warm ones if there are any.

        Args:
            spec: the ranks that the item asks for.
            key: the shape of its pool.
            owner: the item's node id.

        Raises:
            DevicesUnavailable: there are too few devices, or others kept them too long.
            UnavailableError: there is no zygote to fork them from.
        """
        if self._pools is None:
            self.collect(self._files)
        assert self._pools is not None
        if self._has_devices(spec):
            assert self._devices is not None
            return self._devices.take(
                self.link, spec.backend, spec.processes, owner=owner, discard=self._pools.kill
            )
        return self._pools.take(key, fresh=is_alone(spec))

    def warm(self, spec: RankSpec) -> None:
        """Start what the next item needs while this one is at work, where that takes long."""
        if self._devices is not None and self._has_devices(spec):
            self._devices.warm(self.link, spec.processes)

    def _has_devices(self, spec: RankSpec) -> bool:
        return self._devices is not None and spec.backend in BACKEND_DEVICES

    def give_back(self, pool: Pool) -> None:
        """Keep ranks that did not run anything."""
        if self._pools is None:
            return
        if pool.devices is None:
            self._pools.give_back(pool)
            return
        self._pools.retire(pool)
        self.check_in(pool)

    def check_in(self, pool: Pool) -> str | None:
        """Give the devices of ranks back that were ended; return who still holds their memory."""
        return None if self._devices is None else self._devices.check_in(pool)

    def run(self, request: ItemRequest, pool: Pool) -> ItemRun:
        """Run an item on these ranks and watch it to its end.

        Raises:
            UnavailableError: the zygote ended.
        """
        assert self._link is not None
        assert self._pools is not None
        pool.last_node_id = request.node_id
        number = self._pools.next_number()
        folder = _compat.base_temp(self._session.config) / "ranks"
        shared = folder / f"shared{number}"
        port = self._link.open_store()
        seconds = self._link.attendant.lift(request.seconds + BEHIND_DEADLINE)
        rendezvous = Rendezvous(run=number, port=port, home_port=pool.home_port, seconds=seconds)

        def message(rank: int) -> RunItem:
            world = world_of(request, pool, rank, rendezvous, shared)
            return RunItem(
                world=world,
                node_id=request.node_id,
                next_node_id=request.following,
                hold=request.hold,
                base_temp=str(folder / f"{pool.home_port}" / f"rank{rank}"),
            )

        try:
            runs, _ = pool.ranks.run(
                message,
                is_last=is_last,
                is_failure=is_failure,
                timeout=request.seconds,
                expected_ends=deaths.expected_ends(request.spec),
                on_injected=lambda fault: self._lose_stores(fault, (port, pool.home_port)),
            )
        except BaseException:
            self._pools.kill(pool)
            self._link.close_store(port)
            self.check_in(pool)
            raise
        is_used = any(not isinstance(said, Finished) for run in runs for said in run.messages)
        self._link.close_store(port, is_used=is_used)
        return self._item_run(pool, runs, request.spec)

    def _lose_stores(self, fault: Injected, ports: tuple[int, ...]) -> None:
        """Take stores away from ranks whose test asked for that."""
        assert self._link is not None
        if fault.kind == "drop_store":
            for port in ports:
                self._link.close_store(port)

    def settle(
        self, request: ItemRequest, done: ItemRun, *, is_clean: bool, is_dirty: bool = False
    ) -> list[str]:
        """Keep the pool where that is safe, else end it; return what its last teardowns raised.

        Args:
            request: the item.
            done: what the ranks made of it.
            is_clean: whether it left the ranks as a test that passed does.
            is_dirty: whether it left behind what cannot be put back.
        """
        assert self._pools is not None
        pool, key = done.pool, request.key
        if not all(run.done for run in done.runs):
            self._pools.kill(pool)
            self._replace(request, is_needed=not is_alone(request.spec))
            return []
        reason = self._why_unclean(key, done)
        may_serve = (is_clean and not (reason and key.has_fixtures)) or (
            self._settings.reuse_after_failure and not key.has_fixtures
        )
        is_injected = any(isinstance(said, Injected) for run in done.runs for said in run.messages)
        if may_serve and not (is_injected or is_dirty) and not is_alone(request.spec):
            pool.group_is_clean = reason is None and is_clean
            if reason is not None and is_clean:
                text = f"not proven clean, so the next test gets a fresh one: {reason}"
                done.remarks.append(("Kept process group", text))
            is_worn = self._pools.is_worn(pool)
            self._pools.give_back(pool)
            self._replace(request, is_needed=is_worn)
            return []
        errors = self._tear_down(pool) if key.scope is not None else []
        self._pools.retire(pool)
        self._replace(request, is_needed=not is_alone(request.spec))
        return errors

    def _why_unclean(self, key: PoolKey, done: ItemRun) -> str | None:
        """Return why the group of these ranks must not be used again, None where it may, or is not."""
        if key.scope is None or key.fidelity in HOSTED:
            return None
        messages = [message for run in done.runs for message in run.messages]
        if any(isinstance(message, Phase) for message in messages):
            return "a rank did not pass, and may have cut its connections"
        states = [one.group for one in messages if isinstance(one, Finished)]
        return kept.why_unclean(states, has_fixtures=key.has_fixtures)

    def _replace(self, request: ItemRequest, *, is_needed: bool) -> None:
        """Start ranks in the place of retired ones while the controller reports."""
        if is_needed and not request.is_last and self._make_ranks is Ranks:
            assert self._pools is not None
            with contextlib.suppress(UnavailableError):  # the next item meets it again
                self._pools.replace(request.key)

    def _item_run(self, pool: Pool, runs: list[RankRun], spec: RankSpec) -> ItemRun:
        remarks = [("Idle ranks", pool.replaces)] if pool.replaces else []
        pool.replaces = ""
        return ItemRun(
            pool=pool,
            runs=unfold.unfold(runs, spec),
            notes=self._notes(pool),
            explanations=[*pool.ranks.explain(), *unfold.explanations(runs, spec), *explain(runs)],
            unawaited=unawaited(pool.ranks.look()) if is_uneven(runs) else "",
            remarks=remarks,
        )

    def _notes(self, pool: Pool) -> list[str]:
        assert self._link is not None
        notes = []
        if self._link.how == "fresh":
            notes.append(
                "note: the ranks collected in a process of their own, because this one had "
                "threads or torch before collection, so a fork was not safe"
            )
        if pool.ranks.are_fresh() and pool.devices is None:
            threads = pool.ranks.native_threads()
            notes.append(
                "note: each rank was started afresh, because the process that they are forked "
                f"from had {threads} native threads, so a fork was not safe"
            )
        return notes

    # ---- teardowns of wide fixtures

    def tear_down_idle(self) -> list[tuple[str, list[str]]]:
        """Run the teardowns that idle ranks still owe.

        Returns:
            For each pool where some failed: the node id of its last item, and what failed.
        """
        failed = []
        for key, pool in self._pools.idle() if self._pools is not None else ():
            if key.scope is not None and pool.ranks.is_alive():
                errors = self._tear_down(pool)
                if errors:
                    failed.append((pool.last_node_id, errors))
        return failed

    def _tear_down(self, pool: Pool) -> list[str]:
        """Run the teardowns of all live fixtures on a pool, bounded in time."""
        runs, _ = pool.ranks.run(
            lambda _: TearDown(),
            is_last=lambda message: isinstance(message, Finished | Raised),
            is_failure=lambda message: isinstance(message, Raised),
            timeout=TEARDOWN_SECONDS,
            starts=False,
        )
        return errors_of(runs, seconds=TEARDOWN_SECONDS)


def is_last(message: object) -> bool:
    """Return whether a rank says nothing after this about what it was asked to run."""
    return isinstance(message, Finished | Raised)


def is_failure(carried: object) -> bool:
    """Return whether a rank says that it failed, so that its peers need not go on."""
    message = unfold.reporter(carried)
    if isinstance(message, Phase):
        return message.outcome == "failed"
    return isinstance(message, Raised) or (
        isinstance(message, Finished) and message.missing is not None
    )
