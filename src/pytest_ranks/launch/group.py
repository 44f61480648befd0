"""The process group of one run, inside a rank: joined, dropped, and cut when a rank fails."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import random
import socket
import stat
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat

if TYPE_CHECKING:
    from torch.distributed import (  # type: ignore[attr-defined]
        PrefixStore,
        TCPStore,
    )
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_ranks.launch.messages import Rendezvous, World

LOOPBACK = "127.0.0.1"
# Cuts each reverse look-up of a store connection from 5 seconds to 1 where the resolver is silent.
RESOLVER_OPTIONS = "timeout:1 attempts:1"
SEED = 0

_VARIABLES = (
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
    for name in _VARIABLES:
        os.environ.pop(name, None)


def export_rank_variables(world: World) -> None:
    """Tell user code its rank the way torchrun does.

    With the agent-store variable a plain `init_process_group()` joins the run's own store as a
    client on every rank (torch.distributed.rendezvous, `_torchelastic_use_agent_store`).
    """
    scrub_rank_variables()
    if not world.rank_variables:
        return
    rank, size, place = str(world.rank), str(world.world_size), world.place
    os.environ |= {
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
        os.environ |= {
            "GLOO_SOCKET_IFNAME": world.rendezvous.interface,
            "MASTER_ADDR": world.rendezvous.host,
            "MASTER_PORT": str(world.rendezvous.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }


def seed_everything() -> None:
    """Seed Python's, numpy's and torch's generators, those that are loaded."""
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(SEED)


# The group that was initialised for the current run, until the test makes its own.
_ours: list[ProcessGroup] = []
# Port of the run's store -> the connection to it and how often a group was initialised there.
_initialised: dict[str, tuple[TCPStore, int]] = {}


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
        if _ours:
            _ours[0].drop()
        says_where = len(args) > 1 or kwargs.get("init_method") or kwargs.get("store")
        if not says_where and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            kwargs["store"] = _next_store()
            kwargs.pop("init_method", None)
            kwargs.setdefault("rank", int(os.environ["RANK"]))
            kwargs.setdefault("world_size", int(os.environ["WORLD_SIZE"]))
        return original(*args, **kwargs)

    dist.init_process_group = init_process_group
    distributed_c10d.init_process_group = init_process_group
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("c10d-"):  # it repeats as a record of level DEBUG what is raised anyway
            # pytest 9.2 also listens to loggers that do not propagate, so only the level helps
            logging.getLogger(name).setLevel(logging.INFO)


def _next_store() -> PrefixStore:
    """Return the run's own store under a prefix that was not used in this run."""
    import torch.distributed as dist

    port = os.environ["MASTER_PORT"]
    if port not in _initialised:
        _initialised.clear()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(port), is_master=False, wait_for_workers=False
        )
        _initialised[port] = (store, 0)
    store, count = _initialised[port]
    _initialised[port] = (store, count + 1)
    return dist.PrefixStore(f"initialisation{count}", store)  # type: ignore[attr-defined]


class ProcessGroup:
    """The default process group of the runs of one rank process.

    One connection to the store lasts for the process (each costs a reverse DNS look-up); every
    run gets a prefix of its own on it, because gloo reads stale addresses under a used one.
    """

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._before: set[int] = set()
        self._mesh: DeviceMesh | None = None
        self._kept = False

    def watch(self) -> None:
        """Note which sockets are open before the run, so that none of them is ever cut."""
        if not self._kept:
            self._before = _open_sockets()

    def join(self, world: World) -> None:
        """Initialise the default group for this run, unless a kept one is there."""
        import torch.distributed as dist

        rendezvous = world.rendezvous
        assert rendezvous is not None
        if self._kept and dist.is_initialized():
            return
        if dist.is_initialized():
            self.drop()
        if self._store is None:
            self._store = self._connect(rendezvous)
        if world.backend == "nccl":
            import torch

            torch.cuda.set_device(world.local_rank)
        prefix = f"pytest_ranks/{rendezvous.run}"
        dist.init_process_group(
            world.backend,
            store=dist.PrefixStore(prefix, self._store),  # type: ignore[attr-defined]
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=rendezvous.seconds),
        )
        self._kept = world.keep_group
        _ours[:] = [self]

    def meet(self, world: World) -> None:
        """Wait until every rank of a run over several controllers has come this far.

        The ranks of one controller wait for its word; here nobody hears all of them but a store.
        """
        import torch.distributed as dist

        rendezvous = world.rendezvous
        assert rendezvous is not None
        if self._store is None:
            self._store = self._connect(rendezvous)
        name = f"pytest_ranks/{rendezvous.run}/start"
        store = dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]
        if store.add("arrived", 1) == world.world_size:
            store.set("all", "here")
        store.wait(["all"], timedelta(seconds=rendezvous.seconds))

    def _connect(self, rendezvous: Rendezvous) -> TCPStore:
        import torch.distributed as dist

        store = dist.TCPStore(  # type: ignore[attr-defined]
            rendezvous.host,
            rendezvous.home_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=rendezvous.seconds),
        )
        self.watch()
        return store

    def mesh(self, world: World) -> DeviceMesh | None:
        """Return the mesh of the run, made at the first call on all ranks."""
        if not world.mesh:
            return None
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            names, sizes = zip(*world.mesh, strict=True)
            kind = "cuda" if world.backend == "nccl" else "cpu"
            self._mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
        return self._mesh

    def sequence(self) -> int | None:
        """Return how many collectives the group has issued, None where torch does not tell."""
        import torch.distributed as dist

        group = dist.group.WORLD if dist.is_initialized() else None
        return None if group is None else _compat.sequence_number(group)

    def drop(self) -> None:
        """Leave the default group and all others without waiting for gloo's threads.

        gloo's destructor waits 10 ms for each rank; a thread that holds the last references
        pays that while the next run goes on.
        """
        self._kept = False
        self._mesh = None
        _ours.clear()
        dist = sys.modules.get("torch.distributed")
        if dist is None or not dist.is_available() or not dist.is_initialized():
            return
        held: list[Any] = [dist.group.WORLD, *_compat.all_process_groups()]
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        threading.Thread(target=held.clear, name="pytest-ranks-drop", daemon=True).start()
        del held

    def cut(self, store_ports: tuple[int, ...]) -> None:
        """Shut down the connected gloo sockets, so that peers blocked on this rank go on at once.

        Destroying the group frees nobody while one reference to it survives, and a traceback
        always holds one. Left alone: listening sockets (gloo aborts the process when one of its
        own is shut), the store's connections, what was open before the group, and sockets that
        are Python objects, which are the test's.
        """
        ours = {
            one.fileno() for one in gc.get_objects() if isinstance(one, socket.socket)
        } | self._before
        for fd in _open_sockets() - ours:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as end:
                if end.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    continue
                if end.getpeername()[1] in store_ports:
                    continue
                end.shutdown(socket.SHUT_RDWR)


def _open_sockets() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found
