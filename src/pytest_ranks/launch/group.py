"""The process group of one run, inside a rank: joined, dropped, and cut when a rank fails."""

from __future__ import annotations

import _thread
import contextlib
import functools
import gc
import logging
import os
import socket
import stat
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.launch import own_address
from pytest_ranks.launch.kept import GroupState, KeptGroups
from pytest_ranks.launch.resolver import looking_up_in_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import (  # type: ignore[attr-defined]
        PrefixStore,
        TCPStore,
    )
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_ranks.launch.wire import Rendezvous, World

LOOPBACK = "127.0.0.1"
# Cuts each reverse look-up of a connection to a test's own store from 5 seconds to 1 where the
# resolver is silent; connections to ours make none.
RESOLVER_OPTIONS = "timeout:1 attempts:1"

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_RANK",
    "SLURM_PROCID",
)
_EARLY = {
    # One thread a rank is the fastest on shared cores, makes sums repeatable, and leaves the
    # zygote one native thread, so that a fork is safe. It has to be set before torch is imported.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RES_OPTIONS": RESOLVER_OPTIONS,
    # Without it gloo resolves the host name: 5 seconds where that has no address.
    "GLOO_SOCKET_IFNAME": "lo",
    # A skipif on torch.cuda.is_available() at import would else initialise the driver.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool does not survive a fork
}


def early_variables() -> dict[str, str]:
    """Return the environment that a zygote and its ranks need before torch is imported."""
    return dict(_EARLY)


def scrub_rank_variables() -> None:
    """Forget what a launcher told this process about ranks."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


def export_rank_variables(world: World) -> None:
    """Tell user code its rank the way torchrun does.

    With the agent-store variable a plain `init_process_group()` joins the run's own store as a
    client on every rank (torch.distributed.rendezvous, `_torchelastic_use_agent_store`).
    """
    variables = _rank_variables(world)
    for name in RANK_VARIABLES:
        if name not in variables:
            os.environ.pop(name, None)
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _rank_variables(world: World) -> dict[str, str]:
    if not world.rank_variables:
        return {}
    rank, size, place = str(world.rank), str(world.world_size), world.place
    variables = {
        "RANK": rank,
        "LOCAL_RANK": str(world.local_rank),
        "ROLE_RANK": rank,
        "GROUP_RANK": str(place.node) if place is not None else "0",
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": str(place.local_world_size) if place is not None else size,
        "ROLE_WORLD_SIZE": size,
        "GROUP_WORLD_SIZE": str(place.nodes) if place is not None else "1",
    }
    if world.rendezvous is not None:
        variables |= {
            "GLOO_SOCKET_IFNAME": world.rendezvous.interface,
            "MASTER_ADDR": world.rendezvous.host,
            "MASTER_PORT": str(world.rendezvous.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }
    return variables


# The group that was initialised for the current run, until the test makes its own.
_ours: list[ProcessGroup] = []
# Where a plain `init_process_group()` of the current run meets, and in which process.
_meeting: list[tuple[ProcessGroup, Rendezvous, int]] = []


# What a test's own `init_process_group()` does where one process plays several ranks.
_instead: list[Callable[[], None]] = []


def initialise_by(join: Callable[[], None]) -> None:
    """Have every `init_process_group()` of a test in this process do this."""
    _instead[:] = [join]


def original_init() -> Callable[..., None]:
    """Return torch's own `init_process_group`."""
    import torch.distributed as dist

    found: Callable[..., None] = dist.init_process_group
    return getattr(found, "__wrapped__", found)


def is_of_the_run() -> bool:
    """Return whether the default group is the one that the run came with."""
    return bool(_ours)


def let_tests_initialise() -> None:
    """Have a plain `init_process_group()` in a test replace the group that the run came with.

    torch refuses a second default group; a trainer that always makes its own would fail in a
    test for no fault of its own. And it meets under the same keys every time: after a destroy
    gloo may read the addresses of the group before ("connection refused"). Called once, right
    after torch was imported and before anything can import the name.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    original = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        if _instead:
            return _instead[0]()
        if _ours:
            _ours[0].drop()
        says_where = len(args) > 1 or kwargs.get("store") or kwargs.get("device_mesh")
        is_plain = not says_where and kwargs.get("init_method") in (None, "env://")
        if is_plain and (meeting := _meeting_of_run()) is not None:
            group, rendezvous = meeting
            kwargs["store"] = group.next_store(rendezvous)
            kwargs.pop("init_method", None)
            for name, variable in (("rank", "RANK"), ("world_size", "WORLD_SIZE")):
                if kwargs.get(name, -1) < 0:
                    kwargs[name] = int(os.environ[variable])
        url = args[1] if len(args) > 1 else kwargs.get("init_method")
        port = _meeting[0][1].port if _meeting and not kwargs.get("store") else None
        with own_address.serving_by_rank_zero(url, port):
            return original(*args, **kwargs)

    dist.init_process_group = init_process_group
    distributed_c10d.init_process_group = init_process_group
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("c10d-"):  # it repeats as a record of level DEBUG what is raised anyway
            # pytest 9.2 also listens to loggers that do not propagate, so only the level helps
            logging.getLogger(name).setLevel(logging.INFO)


def _meeting_of_run() -> tuple[ProcessGroup, Rendezvous] | None:
    """Return where the run meets, None for a child of the rank or a world of the test's own."""
    if not _meeting or _meeting[0][2] != os.getpid():
        return None
    group, rendezvous, _ = _meeting[0]
    names = ("TORCHELASTIC_USE_AGENT_STORE", "MASTER_PORT")
    is_told = [os.environ.get(name) for name in names] == ["True", str(rendezvous.port)]
    return (group, rendezvous) if is_told else None


class ProcessGroup:
    """The default process group of the runs of one rank process.

    One connection to the store lasts for the process (each costs a reverse DNS look-up); every
    run gets a prefix of its own on it, because gloo reads stale addresses under a used one.
    """

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._before: frozenset[int] = frozenset()
        self._mesh: tuple[object, DeviceMesh] | None = None
        self._kept = False
        self._initialised = 0
        self.kept = KeptGroups()

    def watch(self, sockets: frozenset[int]) -> None:
        """Note which sockets are open before the next run, so that none of them is ever cut.

        Args:
            sockets: their inodes.
        """
        if not self._kept:
            self._before = sockets

    def enter(self, world: World) -> None:
        """Get ready for a run: drop the last one's group unless it is kept; join none yet."""
        self._initialised = 0
        _meeting.clear()
        if world.rendezvous is not None and world.rank_variables:
            _meeting.append((self, world.rendezvous, os.getpid()))
        if world.fresh_group or not (self._kept and world.keep_group):
            self.drop()

    def join(self, world: World) -> None:
        """Initialise the default group for this run, unless a kept one is there."""
        import torch.distributed as dist

        rendezvous = world.rendezvous
        assert rendezvous is not None
        if dist.is_initialized():
            return
        if world.device_name != "cpu":
            import torch

            device = torch.device(world.device_name)
            if hasattr(module := getattr(torch, device.type), "set_device"):
                module.set_device(device)
        dist.init_process_group(
            world.backend,
            store=self.next_store(rendezvous),
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=rendezvous.seconds),
        )
        self._kept = world.keep_group
        _ours[:] = [self]

    def meet(self, world: World) -> None:
        """Wait until every rank of a run over several controllers has come this far.

        The ranks of one controller wait at their line; here nobody sees all of them but a store.
        """
        rendezvous = world.rendezvous
        assert rendezvous is not None
        store = self.store(world, "start")
        if store.add("arrived", 1) == world.world_size:
            store.set("all", "here")
        store.wait(["all"], timedelta(seconds=rendezvous.seconds))

    def store(self, world: World, name: str) -> PrefixStore:
        """Return a place of this name that all ranks of the run have in common."""
        import torch.distributed as dist

        rendezvous = world.rendezvous
        assert rendezvous is not None
        prefix = f"pytest_ranks/{rendezvous.run}/{name}"
        return dist.PrefixStore(prefix, self._home(rendezvous))  # type: ignore[attr-defined]

    def next_store(self, rendezvous: Rendezvous) -> PrefixStore:
        """Return the store of the process under a prefix that was never used.

        A new connection would cost a reverse DNS look-up; under a used prefix gloo may read the
        addresses of the group before ("connection refused").
        """
        import torch.distributed as dist

        prefix = f"pytest_ranks/{rendezvous.run}/{self._initialised}"
        self._initialised += 1
        return dist.PrefixStore(prefix, self._home(rendezvous))  # type: ignore[attr-defined]

    def _home(self, rendezvous: Rendezvous) -> TCPStore:
        """Return the connection that the process keeps, made at the first call."""
        if self._store is None:
            import torch.distributed as dist

            is_near = rendezvous.host == LOOPBACK
            with looking_up_in_files() if is_near else contextlib.nullcontext():
                self._store = dist.TCPStore(  # type: ignore[attr-defined]
                    rendezvous.host,
                    rendezvous.home_port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=rendezvous.seconds),
                )
            self.watch(frozenset(_open_sockets().values()))
        return self._store

    def mesh(self, world: World) -> DeviceMesh | None:
        """Return the mesh of the run, made at the first call on all ranks."""
        if not world.mesh:
            return None
        if self._mesh is None or self._mesh[0] != world.mesh:
            from torch.distributed.device_mesh import init_device_mesh

            names, sizes = zip(*world.mesh, strict=True)
            kind = world.device_name.partition(":")[0]
            self._mesh = world.mesh, init_device_mesh(kind, sizes, mesh_dim_names=names)
        return self._mesh[1]

    def sequences(self) -> tuple[tuple[str, int], ...]:
        """Return each group's name and how many operations it has issued, where torch tells."""
        counts = ((one, _compat.sequence_number(one)) for one in _compat.all_process_groups())
        return tuple((one.group_name, count) for one, count in counts if count is not None)

    def state(self) -> GroupState | None:
        """Return what was done on the kept groups, None where the test destroyed them."""
        return self.kept.state()

    def drop(self) -> None:
        """Leave the default group and all others without waiting for gloo's threads.

        gloo's destructor waits 10 ms for each rank; a thread that holds the last references
        pays that while the next run goes on.
        """
        self._kept = False
        self._mesh = None
        self.kept.forget()
        _ours.clear()
        dist = sys.modules.get("torch.distributed")
        if dist is None or not dist.is_available() or not dist.is_initialized():
            return
        held: list[Any] = [dist.group.WORLD, *_compat.all_process_groups()]
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        # Not a `threading.Thread`, whose start waits until it runs.
        _thread.start_new_thread(held.clear, ())
        del held

    def cut(self, store_ports: tuple[int, ...]) -> None:
        """Shut down the connected gloo sockets, so that peers blocked on this rank go on at once.

        Destroying the group frees nobody while one reference to it survives, and a traceback
        always holds one. Left alone: listening sockets (gloo aborts the process when one of its
        own is shut), the store's connections, what was open before the group, and sockets that
        are Python objects, which are the test's.
        """
        ours = {one.fileno() for one in gc.get_objects() if isinstance(one, socket.socket)}
        for fd, inode in _open_sockets().items():
            if fd in ours or inode in self._before:
                continue
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as end:
                if end.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    continue
                if end.getpeername()[1] in store_ports:
                    continue
                end.shutdown(socket.SHUT_RDWR)


def _open_sockets() -> dict[int, int]:
    """Return descriptor and inode of each open socket; a descriptor's number is used again."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found
