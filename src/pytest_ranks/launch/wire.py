"""What controller, zygote and ranks say to each other, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.terminal.asides import Measure

if TYPE_CHECKING:
    from pytest_ranks.launch.kept import GroupState

# ---- to the zygote


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Import these modules before the first fork; what fails to import, the rank will meet."""

    modules: tuple[str, ...]
    sys_path: tuple[str, ...] | None = None
    working_directory: str | None = None
    environment: dict[str, str] | None = None
    coverage: Measure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """Become a pytest session like the controller's."""

    arguments: tuple[str, ...]
    directory: str
    sys_path: tuple[str, ...]
    options: dict[str, Any]
    worker_input: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Collect these test files, once, before the next fork."""

    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStore:
    """Serve rendezvous stores from a child of the zygote, over the channel that comes along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """How a rank in a fresh process comes to be what a fork of the zygote is.

    Attributes:
        prepare: what to import.
        configure: the pytest session to become, None for a rank that runs functions.
        files: to collect.
        environment: variables that the process starts with, beside the zygote's.
    """

    prepare: Prepare
    configure: Configure | None = None
    files: tuple[str, ...] = ()
    environment: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Fork one rank process, or start it afresh.

    With it come its channel, its output file, its stacks file and its start line's memory.

    Attributes:
        label: the controller's name for it.
        rank: its number.
        world_size: of how many.
        settle: what it needs where it is started afresh.
        fresh: start it afresh; else that is done only where a fork is not safe.
    """

    label: int
    rank: int
    world_size: int
    settle: Settle | None = None
    fresh: bool = False


# ---- from the zygote


@dataclass(frozen=True, slots=True, kw_only=True)
class Born:
    """The zygote exists, below its guardian; its pidfd comes along."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The zygote has ended, its guardian says: an exit code or -signal."""

    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """A rank process exists; its pidfd comes along.

    Attributes:
        label: the controller's name for it.
        pid: the process.
        native_threads: how many the zygote had.
        fresh: whether it is a process of its own and no fork.
    """

    label: int
    pid: int
    native_threads: int
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A rank process was reaped; `status` as from waitpid, reduced to an exit code or -signal."""

    label: int
    status: int


# ---- to a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """How the ranks of one run find each other.

    Attributes:
        run: number of the run, never used twice in a session.
        port: of the store made for this run alone, for what the test itself initialises.
        home_port: of the store that the rank keeps its one connection to.
        seconds: timeout of the process group.
        host: address of the machine that serves the stores.
        interface: of the network over which the ranks reach each other.
    """

    run: int
    port: int
    home_port: int
    seconds: float
    host: str = "127.0.0.1"
    interface: str = "lo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the rank of a run over several controllers is.

    Attributes:
        local_rank: its number among the run's ranks on its node.
        local_world_size: how many ranks of the run its node has.
        node: number of its node among those of the run.
        nodes: how many nodes the run is on.
    """

    local_rank: int
    local_world_size: int
    node: int
    nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The rank's place in one run."""

    rank: int
    world_size: int
    backend: str = "gloo"
    mesh: tuple[tuple[str, int], ...] = ()
    fidelity: str = "gloo"
    init: bool = True
    rank_variables: bool = True
    keep_group: bool = False
    fresh_group: bool = False
    is_detailed: bool = False
    rendezvous: Rendezvous | None = None
    environment: dict[str, str] | None = None
    shared_tmp_path: str | None = None
    place: Place | None = None
    device: str = ""

    @property
    def device_name(self) -> str:
        """What torch calls the rank's device; under an outer launcher its local rank says which."""
        if not self.device and self.backend == "nccl":
            return f"cuda:{self.local_rank}"
        return self.device or "cpu"

    @property
    def local_rank(self) -> int:
        """The rank's number on its machine."""
        return self.rank if self.place is None else self.place.local_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFunction:
    """Call a function on the rank.

    Attributes:
        world: the rank's place.
        target: `module:qualname`, or nothing when `by_value` holds the function.
        target_file: where the module lies, for modules that no import finds.
        by_value: the function as cloudpickle wrote it.
        arguments: pickled positional and keyword arguments.
        sys_path: entries to have on the path.
        modules: to import first.
    """

    world: World
    target: str | None
    target_file: str | None
    by_value: bytes | None
    arguments: bytes
    sys_path: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunItem:
    """Run one test item on the rank.

    Attributes:
        world: the rank's place.
        node_id: of the item.
        next_node_id: what this pool runs after it, None for nothing: all fixtures end.
        hold: keep the wide fixtures, since what this pool runs next is not known.
        base_temp: folder of this rank's temporary folders.
    """

    world: World
    node_id: str
    next_node_id: str | None
    hold: bool
    base_temp: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TearDown:
    """Run the teardowns of all fixtures that are still alive on the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Flush and leave."""


# ---- from a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The rank listens.

    The descriptor of its witness comes along, and those of its captured output, if there are any.
    """

    main_thread: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Playing:
    """This process plays several ranks from now on: the thread of each, by rank."""

    threads: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """The function returned; `value` is its pickled result."""

    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """Something raised on the rank, as text.

    Attributes:
        headline: one line.
        traceback: the text of it.
        at: CLOCK_MONOTONIC in seconds.
        place: the collective that it came out of, if it did.
        session_end: message and status of a `pytest.exit`, None for anything else.
    """

    headline: str
    traceback: str
    at: float
    place: str = ""
    session_end: tuple[str, int | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A fault that the test asked for happens now on the rank; it may be the rank's last word.

    Attributes:
        kind: name of the method of `faults` that the test called.
        call: the call as the test wrote it.
        place: where it struck.
    """

    kind: str
    call: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One report of one phase of an item.

    Attributes:
        when: setup, call or teardown.
        outcome: passed, failed or skipped.
        was_xfail: the reason of an expected failure, None where there was none.
        report: the report as pytest serialises it.
        at: CLOCK_MONOTONIC in seconds.
        place: the collective that the failure came out of, if it did.
        lost: names of attributes that could not travel.
    """

    when: str
    outcome: str
    was_xfail: str | None
    report: dict[str, Any]
    at: float
    place: str = ""
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OfRank:
    """What one of several ranks that a process plays says: a Phase, Finished or Raised."""

    rank: int
    message: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A warning that pytest recorded on the rank."""

    category: str
    text: str
    filename: str
    lineno: int
    when: str
    node_id: str
    location: tuple[str, int, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What a test left behind in a rank.

    Attributes:
        what: what it was before and is now, in words.
        restored: whether it could be put back.
    """

    what: str
    restored: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The rank is done with an item, or with its teardowns.

    Attributes:
        phases: the reports, in order, without those already sent.
        warnings: what was recorded.
        missing: why the item was not found, None where it was.
        sequences: name of each process group and how many operations it has issued, where torch tells.
        group: what was done on the kept groups, None where none was kept.
        errors: what failed outside of a phase.
        sections: what was captured of several ranks together, with titles.
        leaks: what the test left behind.
    """

    phases: tuple[Phase, ...] = ()
    warnings: tuple[Warned, ...] = ()
    missing: str | None = None
    sequences: tuple[tuple[str, int], ...] = ()
    group: GroupState | None = None
    errors: tuple[str, ...] = ()
    sections: tuple[tuple[str, str], ...] = ()
    leaks: tuple[Leak, ...] = ()
