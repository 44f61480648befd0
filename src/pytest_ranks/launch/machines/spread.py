"""Ranks of which one is ours and the others belong to the controllers of other ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.machines.coordination import Prepare, Prepared, Retire, Run
from pytest_ranks.launch.machines.crew import RESULT_SECONDS, Crew
from pytest_ranks.launch.machines.hub import LOOPBACK
from pytest_ranks.launch.machines.interfaces import interface_towards
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.reporting.folding import ranks_text
from pytest_ranks.launch.wire import Injected, Place, RunItem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_ranks.launch.forensics.sight import Sight
    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.machines.hub import Hub
    from pytest_ranks.launch.outcome import ExpectedEnd
    from pytest_ranks.launch.run_watch import Peers

_LATE = ("deadline", "abandoned", "deadlock", "unready")


class SpreadRanks(Ranks):
    """The ranks of one pool: number 0 is forked here, the others each by another controller.

    Args:
        link: to the zygote of this controller.
        world_size: number of ranks.
        hub: the other controllers.

    Raises:
        UnavailableError: not so many ranks are left.
    """

    def __init__(self, link: ZygoteLink, world_size: int, *, hub: Hub) -> None:
        members = hub.reachable()[: world_size - 1]
        if len(members) < world_size - 1:
            raise UnavailableError(hub.too_few(world_size))
        self.world_size = world_size
        self.runs = 0
        self._hub = hub
        self._members = members
        self._pool = hub.next_number()
        self._own = Ranks(link, 1)
        self._ended: list[str] = []  # of the others
        for member in members:  # so that all are forked at the same time
            hub.send(member, Prepare(pool=self._pool))
        self._timeout = 0.0
        self._late: list[RankRun] = []  # of the last run, those that were stopped at its deadline
        nodes = {hub.hello.node, *(member.hello.node for member in members)}
        self._host = LOOPBACK if len(nodes) == 1 else hub.host()
        self._interface = "lo" if len(nodes) == 1 else own_interface(self._host)

    def native_threads(self) -> int:
        """Return how many threads our zygote had when its rank was forked."""
        return self._own.native_threads()

    def are_fresh(self) -> bool:
        """Return whether ours is a process of its own, and no fork of the zygote."""
        return self._own.are_fresh()

    def select(self, number: int) -> None:
        """Have all of them do the next runs: each world of a session has ranks of its own here."""
        assert number == self.world_size

    def look(self) -> dict[int, Sight]:
        """Return what our rank has issued."""
        return self._own.look()

    def ends(self) -> list[str]:
        """Return which ranks have ended, as far as that is known."""
        return [*self._own.ends(), *self._ended]

    def is_alive(self) -> bool:
        """Return whether all processes live, on all machines."""
        if not self._own.is_alive():
            return False
        for index, member in enumerate(self._members, start=1):
            question = Prepare(pool=self._pool)
            answer = self._hub.ask(member, question, Prepared, pool=self._pool)
            if answer is None or not answer.lives:
                what = "was lost" if answer is None else "ended"
                node = self._hub.label(member.hello.node)
                self._ended.append(f"rank {index} on node {node} {what}")
        return not self._ended

    def run(
        self,
        request: Callable[[int], object],
        *,
        is_last: Callable[[Any], bool],
        is_failure: Callable[[Any], bool],
        timeout: float,
        starts: bool = True,
        peers: Peers | None = None,  # noqa: ARG002 - there are no others
        expected_ends: Mapping[int, ExpectedEnd] | None = None,
        on_injected: Callable[[Injected], None] = lambda _: None,
    ) -> tuple[list[RankRun], bool]:
        """Send one request to every rank, and see to it that each is done, dead or stopped."""
        self.runs += 1
        crew = Crew(self._hub, self._members, on_injected)
        ends = expected_ends or {}
        self._hub.is_busy = True
        try:
            for index, member in enumerate(self._members, start=1):
                message = Run(
                    number=crew.number,
                    pool=self._pool,
                    request=self._placed(request(index), index),
                    seconds=timeout,
                    starts=starts,
                    rank=index,
                    ends=tuple((rank, end.text, tuple(end.statuses)) for rank, end in ends.items()),
                )
                self._hub.send(member, message)
            runs, timed_out = self._own.run(
                lambda _: self._placed(request(0), 0),
                is_last=is_last,
                is_failure=is_failure,
                timeout=timeout,
                starts=starts,
                peers=crew,
                expected_ends=ends,
                on_injected=on_injected,
            )
            runs += crew.gather(RESULT_SECONDS + (0 if timed_out else timeout))
        except BaseException:
            self.kill()
            raise
        finally:
            self._hub.is_busy = False
            crew.close()
        self._timeout = timeout
        self._late = [run for run in runs if run.stopped == "deadline" and run.where is not None]
        return runs, timed_out or any(run.stopped in _LATE for run in runs)

    def explain(self) -> list[str]:
        """Return where the ranks are, and which of them were lost."""
        by_node: dict[int, list[int]] = {self._hub.hello.node: [0]}
        lines = []
        for index, member in enumerate(self._members, start=1):
            by_node.setdefault(member.hello.node, []).append(index)
            if member.rank != index:
                lines.append(f"rank {index} of this test is rank {member.rank} of the world")
        if len(by_node) > 1:
            places = [
                f"{ranks_text(ranks)} ran on node {self._hub.label(node)}"
                for node, ranks in by_node.items()
            ]
            lines.append("; ".join(places))
        if self._hub.is_ending:
            lines.append("rank 0 was asked to end (SIGTERM) while the test ran")
        lost = [index for index, one in enumerate(self._members, start=1) if one.loss is not None]
        if lost and self._late:
            waits: dict[str, list[int]] = {}
            for run in self._late:
                waits.setdefault(str(run.where), []).append(run.rank)
            said = [f"{ranks_text(ranks)} waited in {where}" for where, ranks in waits.items()]
            lines.append(
                f"the deadline of {self._timeout:g} s passed without a word from "
                f"{ranks_text(lost)}: {'; '.join(said)}"
            )
        return lines

    def leave(self) -> None:
        """Ask the processes to flush and leave."""
        self._own.leave()
        self._retire()

    def have_left(self) -> bool:
        """Return whether our process has ended."""
        return self._own.have_left()

    def kill(self) -> None:
        """Kill our process; the others end theirs."""
        self._own.kill()
        self._retire()

    def forget(self) -> None:
        """Give back all descriptors."""
        self._own.forget()

    def _retire(self) -> None:
        for member in self._members:
            self._hub.send(member, Retire(pool=self._pool))

    def _placed(self, message: Any, index: int) -> Any:
        """Return a request with what is different for a rank on its machine."""
        if not isinstance(message, RunItem) or not self._members:
            return message
        hellos = [self._hub.hello, *(member.hello for member in self._members)]
        nodes = [hello.node for hello in hellos]
        known = list(dict.fromkeys(nodes))
        node = nodes[index]
        place = Place(
            local_rank=nodes[:index].count(node),
            local_world_size=nodes.count(node),
            node=known.index(node),
            nodes=len(known),
        )
        here = self._hub.hello.base_temp
        on_node = hellos[nodes.index(node)].base_temp  # one folder for the ranks of a machine
        shared = message.world.shared_tmp_path
        if shared is not None:
            shared = os.path.join(on_node, os.path.relpath(shared, here))
        rendezvous = message.world.rendezvous
        if rendezvous is not None:
            interface = "lo" if len(known) == 1 else "" if index else self._interface
            rendezvous = replace(rendezvous, host=self._host, interface=interface)
        return replace(
            message,
            world=replace(
                message.world, place=place, rendezvous=rendezvous, shared_tmp_path=shared
            ),
            base_temp=os.path.join(
                hellos[index].base_temp, os.path.relpath(message.base_temp, here)
            ),
        )


def own_interface(host: str) -> str:
    """Return the interface that gloo shall use: what the user says, else what leads to a host."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or interface_towards(host)
