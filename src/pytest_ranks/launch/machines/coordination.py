"""What the controllers of a world over several machines say to each other, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Injected, RunItem, TearDown

# ---- from a follower: the pytest of a rank other than 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a rank says of itself once it has collected.

    Attributes:
        token: proves that it was started together with rank 0.
        rank: its number in the world.
        node: number of its machine.
        node_name: what that is called.
        versions: what has to be the same on all ranks: a name and a text each.
        ids: node ids of the tests on ranks that it collected, before any selection.
        errors: what it could not collect, one line each.
        base_temp: its temporary folder.
    """

    token: str
    rank: int
    node: int
    node_name: str
    versions: dict[str, str] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    base_temp: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to `Ping`: CLOCK_MONOTONIC in seconds, which differs between machines."""

    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The answer to `Prepare`: whether the pool's rank process, old or new, lives."""

    pool: int
    lives: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the rank did in a run."""

    number: int
    run: RankRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the rank told of a fault while the run goes on."""

    number: int
    fault: Injected


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """This pytest ends of its own accord; `reason` says why."""

    reason: str


# ---- from rank 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Asks for the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Fork the rank process of a new pool; tell whether that of an old one lives."""

    pool: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Run something on the rank process of a pool.

    Attributes:
        number: of the run, never used twice.
        pool: whose rank process.
        request: for the rank.
        seconds: deadline from the moment all ranks have started.
        starts: whether the rank says that it has started.
        rank: its number in the run.
        ends: rank, text and statuses of the ends that are declared and then required.
    """

    number: int
    pool: int
    request: RunItem | TearDown
    seconds: float
    starts: bool
    rank: int
    ends: tuple[tuple[int, str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """End the rank process of a pool."""

    pool: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The session is over, with this exit status on every rank."""

    status: int


# ---- both ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A rank of the run failed; the others get a short grace."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A rank of the run has finished it: who still waits for it waits for nothing."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """The answer to `End`."""
