"""The child: one process that plays one rank, told over its channel what to run."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pickle
import sys
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pytest_ranks import _compat
from pytest_ranks.launch import coverage
from pytest_ranks.launch.channel import Channel, ChannelClosed
from pytest_ranks.launch.deadline import collective_of, is_plumbing
from pytest_ranks.launch.fidelity.ladder import HOSTED
from pytest_ranks.launch.forensics.witness import Witness
from pytest_ranks.launch.group import (
    ProcessGroup,
    export_rank_variables,
)
from pytest_ranks.launch.processes import STACKS_SIGNAL, run_in_batches
from pytest_ranks.launch.rank_context import context_of, set_current
from pytest_ranks.launch.seeding import seed_everything
from pytest_ranks.launch.startline import StartLine
from pytest_ranks.launch.target import load, refuse_debugger
from pytest_ranks.launch.wire import (
    Finished,
    Leave,
    Playing,
    Raised,
    Ready,
    Returned,
    RunFunction,
    RunItem,
    TearDown,
    World,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.fidelity.host import Host


class ItemRunner(Protocol):
    """Runs pytest items inside a rank."""

    def prepare(self, output: int) -> tuple[int, ...]:
        """Get ready after the fork; returns descriptors of the captured output."""

    def run(self, request: RunItem, fail: Failing) -> Finished:
        """Run one item; `fail` is called with each report that did not pass, at once."""

    @property
    def sockets(self) -> frozenset[int]:
        """Inodes of the sockets that were open at the end of the last item."""

    def tear_down(self) -> Finished:
        """Run the teardowns of all live fixtures."""

    def connect(self, channel: Channel, release: Callable[[], None]) -> None:
        """Have the channel to ask the controller on, and what lets peers go after a failure."""

    @property
    def holds_peers(self) -> bool:
        """Whether peers go on waiting after a failure, since somebody may look at the rank."""


class Failing(Protocol):
    """Takes a message about a failure, sends it, and lets the peers go."""

    def __call__(self, message: object) -> None:
        """Send the message and cut the group's sockets."""


STRAY = (
    "a child process that the test forked ran on into the code of the rank; end it with os._exit()"
)


class Rank:
    """One rank process, from its fork to its end."""

    def __init__(
        self,
        channel: Channel,
        output: int,
        stacks: int,
        line: StartLine,
        items: ItemRunner | None,
    ) -> None:
        self._channel = channel
        self._output = output
        self._stacks = stacks
        self._line = line
        self._items = items
        self._group = ProcessGroup()
        self._witness = Witness()
        self._cut = self._held = False
        self._host: Host | None = None
        self._world = World(rank=0, world_size=1)

    def serve(self) -> None:
        """Answer requests until told to leave; never returns."""
        run_in_batches()
        self._channel.end_strays(Raised(headline=STRAY, traceback=STRAY, at=0.0))
        with contextlib.suppress(ChannelClosed):
            captured: tuple[int, ...] = ()
            if self._items is not None:
                captured = self._items.prepare(self._output)
                self._items.connect(self._channel, self._release)
            ends = (self._witness.start(), *captured)
            self._channel.send(Ready(main_thread=threading.main_thread().ident or 0), ends)
            for fd in ends:
                os.close(fd)
            while True:
                request, _ = self._channel.receive()
                if isinstance(request, Leave):
                    break
                try:
                    self._answer(request)
                except BaseException as error:
                    if isinstance(error, ChannelClosed):
                        raise
                    self._fail(raised(error))
        leave()

    def _answer(self, request: object) -> None:
        if isinstance(request, TearDown):
            assert self._items is not None
            torn_down = self._items.tear_down()
            coverage.save()
            self._channel.send(torn_down)
            return
        assert isinstance(request, RunFunction | RunItem)
        self._register_stacks()
        self._witness.since = time.time_ns()
        self._cut = self._held = False
        self._enter(request.world)
        self._line.cross()
        if isinstance(request, RunFunction):
            value = self._call(request)
            coverage.save()
            self._channel.send(Returned(value=value))
            return
        assert self._items is not None
        finished = self._items.run(request, self._fail)
        if self._held:
            self._release()
        finished = replace(finished, sequences=self._group.sequences())
        if request.world.keep_group:
            finished = replace(finished, group=self._group.state())
        coverage.save()
        # The group stays until the next run: a peer may still be in its last collective.
        self._channel.send(finished)
        self._group.watch(self._items.sockets)

    def _enter(self, world: World) -> None:
        self._world = world
        if world.environment:
            os.environ.update(world.environment)
        export_rank_variables(world)
        if world.is_detailed:
            _compat.compare_collectives()
        self._group.enter(world)
        if world.fidelity == "simulated":
            importlib.import_module("pytest_ranks.launch.fidelity.simulated").install(world.backend)
        if world.fidelity in HOSTED:
            self._take_host().join(world)
        elif world.init and world.rank_variables:
            self._group.join(world)
        seed_everything()
        if world.fidelity in HOSTED:
            self._begin_to_play(world)
            return
        set_current(context_of(world, self._group, tell=self._channel.send))
        if world.mesh:
            self._group.mesh(world)
        if world.keep_group:
            self._group.kept.begin()
        if world.place is not None:
            self._group.meet(world)

    def _begin_to_play(self, world: World) -> None:
        threads = self._take_host().begin(world)
        if threads:
            self._channel.send(Playing(threads=threads))

    def _take_host(self) -> Host:
        if self._host is None:
            from pytest_ranks.launch.fidelity.host import Host

            self._host = Host()
        return self._host

    def _call(self, request: RunFunction) -> bytes:
        for entry in request.sys_path:
            if entry not in sys.path:
                sys.path.append(entry)
        for module in request.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        function = load(request)
        refuse_debugger(request.world.rank)
        arguments, keywords = pickle.loads(request.arguments)
        result = function(*arguments, **keywords)
        try:
            return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TypeError(
                f"the result of rank {request.world.rank} cannot be pickled: "
                f"{type(result).__qualname__} ({error})"
            ) from error

    def _fail(self, message: object) -> None:
        """Send a failure before anything else happens, then let the peers go."""
        if isinstance(message, Raised):  # the last thing that this rank says
            coverage.save()
        self._channel.send(message)
        self._held = self._items is not None and self._items.holds_peers
        if not self._held:
            self._release()

    def _release(self) -> None:
        """Let the peers go that wait for this rank."""
        if not self._cut and self._world.fidelity not in HOSTED:
            self._cut = True
            rendezvous = self._world.rendezvous
            ports = (rendezvous.port, rendezvous.home_port) if rendezvous is not None else ()
            self._group.cut(ports)

    def _register_stacks(self) -> None:
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        faulthandler.enable(file=self._stacks, all_threads=True)


def leave(code: int = 0) -> None:
    """Flush and end this process without interpreter teardown: gloo's threads may abort that."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def raised(error: BaseException) -> Raised:
    """Return an exception as text, with the time at which it was caught."""
    at = time.monotonic()
    try:
        own = error.__traceback__
        while own is not None and is_plumbing(own.tb_frame.f_code.co_filename):
            own = own.tb_next  # the reader wants the frames of the function
        lines = traceback.format_exception(type(error), error, own or error.__traceback__)
        headline = "".join(traceback.format_exception_only(type(error), error)).strip()
    except Exception:  # an exception whose __str__ raises
        lines, headline = traceback.format_tb(error.__traceback__), type(error).__qualname__
    end = _compat.session_end_of(error)
    return Raised(
        headline=headline if end is None else f"called pytest.exit: {end[0]}",
        traceback="".join(lines),
        at=at,
        place=collective_of(error),
        session_end=end,
    )
