"""The world that a launcher put this process into: torchrun's or srun's, read from its variables."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

# srun tells no port. Below 32768, where Linux begins to hand ports out by itself.
_FIRST_PORT = 20000
_PORTS = 10000
_PRIME = 1009  # so that jobs with neighbouring numbers have ports apart, and so have their steps


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterWorld:
    """Where this process stands among those that a launcher started.

    Attributes:
        launcher: "torchrun" or "srun".
        rank: number of this process.
        size: number of processes.
        node: number of this machine.
        nodes: number of machines.
        node_name: what this machine is called.
        address: of the machine of rank 0.
        port: there: of the store of torchrun's agent, or free for rank 0 to listen on.
        has_store: whether the agent's store is there.
        run: what all processes of this start have in common, and no other start has.
    """

    launcher: str
    rank: int
    size: int
    node: int
    nodes: int
    node_name: str
    address: str
    port: int
    has_store: bool
    run: str

    def __str__(self) -> str:
        """Return the place as the header says it."""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"attached to a world of {self.size} on {nodes}, this is rank {self.rank}"


def read_world(environ: Mapping[str, str]) -> OuterWorld | None:
    """Return the world that the variables tell of, None where there is none of at least 2 ranks.

    Raises:
        BadInputError: the variables contradict each other or cannot be read.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        world = _of_torchrun(environ)
    elif "SLURM_STEP_ID" in environ or "SLURM_STEP_NUM_TASKS" in environ:
        world = _of_srun(environ)  # a batch script has the job's variables, but no step's
    else:
        return None
    if not 0 <= world.rank < world.size:
        raise BadInputError(
            f"{world.launcher} says that this is rank {world.rank} of {world.size}: expected a "
            f"rank from 0 to {world.size - 1}."
        )
    return world if world.size > 1 else None


def _of_torchrun(environ: Mapping[str, str]) -> OuterWorld:
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return OuterWorld(
        launcher="torchrun",
        rank=_number(environ, "RANK"),
        size=_number(environ, "WORLD_SIZE"),
        node=_number(environ, "GROUP_RANK", 0),
        nodes=_number(environ, "GROUP_WORLD_SIZE", 1),
        node_name=socket.gethostname(),
        address=_text(environ, "MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT"),
        has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        run=f"{environ['TORCHELASTIC_RUN_ID']}/{restart}",
    )


def _of_srun(environ: Mapping[str, str]) -> OuterWorld:
    hosts = first_hosts(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
    job = environ.get("SLURM_JOB_ID", "0")
    step = environ.get("SLURM_STEP_ID", "0")
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environ else "SLURM_NNODES"
    if not hosts and "MASTER_ADDR" not in environ:
        raise BadInputError(
            "srun started this process, but SLURM_JOB_NODELIST names no host: expected it, or "
            "MASTER_ADDR, to know where rank 0 is."
        )
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, step)]
    derived = _FIRST_PORT + (numbers[0] * _PRIME + numbers[1]) % _PORTS
    return OuterWorld(
        launcher="srun",
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, size),
        node=_number(environ, "SLURM_NODEID", 0),
        nodes=_number(environ, nodes, max(1, len(hosts))),
        node_name=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        address=environ.get("MASTER_ADDR") or hosts[0],
        port=_number(environ, "MASTER_PORT", derived),
        has_store=False,
        run=f"{job}.{step}",
    )


def first_hosts(text: str) -> list[str]:
    """Return the hosts of a Slurm node list: `node[08-10,12],login` and the like."""
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand(entry.strip())
    return hosts


def _expand(entry: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", entry)
    if match is None:
        return [entry] if entry else []
    numbers: list[str] = []
    for part in match[1].split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise BadInputError(
                f"the node list {entry!r} cannot be read: expected numbers and ranges in brackets, "
                "as in 'node[01-04,7]'."
            )
        numbers += [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
    before, after = entry[: match.start()], entry[match.end() :]
    return [host for number in numbers for host in _expand(f"{before}{number}{after}")]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    found = environ.get(name)
    if found is None and default is not None:
        return default
    if found is None or not found.isdecimal():
        shown = "nothing" if found is None else repr(found)
        raise BadInputError(
            f"{name} is {shown}: expected a whole number, as torchrun and srun set it. "
            "--ranks-attach=never runs the tests as on one machine."
        )
    return int(found)


def _text(environ: Mapping[str, str], name: str) -> str:
    found = environ.get(name)
    if not found:
        raise BadInputError(
            f"{name} is not set: expected the address of rank 0, as torchrun sets it. "
            "--ranks-attach=never runs the tests as on one machine."
        )
    return found
