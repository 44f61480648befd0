"""One session over two nodes with a cable between them: network namespaces that the tests make.

The ranks of a test run as root inside the namespaces, so a test can cut its own cable.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from attached_sessions import PLUGINS, Process, World, free_port

HEAD = """
import os, signal, subprocess, time
import pytest
import torch
import torch.distributed as dist
from pytest_ranks.launch.processes import descendants

def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
"""
CUT = (
    HEAD
    + """
@pytest.mark.ranks(4)
def test_world(rank):
    t = torch.ones(1000) * rank.index
    dist.all_reduce(t)
    assert t[0] == 6
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    found = rank.gather([int(os.environ[name]) for name in names])
    assert found == [[0, 2, 0, 2], [1, 2, 0, 2], [0, 2, 1, 2], [1, 2, 1, 2]]
    assert [one for one in rank.gather(rank.local_rank)] == [0, 1, 0, 1]
    assert len(set(rank.gather(os.readlink("/proc/self/ns/net")))) == 2
    assert len(set(rank.gather(str(rank.shared_tmp_path)))) == 2  # one for each node

@pytest.mark.ranks(4)
def test_init_again(rank):
    dist.init_process_group()  # plain, as a trainer does it
    t = torch.ones(1)
    dist.all_reduce(t)
    assert t[0] == 4

@pytest.mark.ranks(2)
def test_one_node_before(rank):
    assert os.environ["GROUP_WORLD_SIZE"] == "1"
    dist.barrier()

@pytest.mark.ranks(4, timeout=4)
def test_cut(rank):
    dist.barrier()
    if rank.index == 0:
        subprocess.run(["ip", "link", "set", os.environ["CABLE"], "down"], check=True)
    for _ in range(10):  # what was on its way has arrived
        dist.all_reduce(torch.ones(1))

@pytest.mark.ranks(2)
def test_one_node_after(rank):
    dist.barrier()

@pytest.mark.ranks(4)
def test_too_few_left(rank):
    dist.barrier()
"""
)
KILL = (
    HEAD
    + """
@pytest.mark.ranks(4)
def test_node_dies(rank):
    dist.barrier()
    if rank.index == 3:
        agent = parent(int(os.environ["PID_OF_PYTEST"]))  # torchrun started pytest
        for pid in [agent, *descendants(agent)]:
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))

@pytest.mark.ranks(2)
def test_one_node_after(rank):
    dist.barrier()
"""
)


@dataclass
class Network:
    """Two namespaces with a cable between them, each a node."""

    name: str

    def make(self) -> None:
        for side in ("a", "b"):
            space = self.name + side
            run("ip", "netns", "add", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
            # gloo and the store look names up, and would wait for a resolver that is not there
            folder = Path("/etc/netns", space)
            folder.mkdir(parents=True)
            hosts = ["127.0.0.1 localhost", "::1 localhost", "::ffff:127.0.0.1 localhost"]
            for node, other in (("a", 1), ("b", 2)):
                hosts += [f"10.77.0.{other} node{node}", f"::ffff:10.77.0.{other} node{node}"]
            (folder / "hosts").write_text("\n".join(hosts) + "\n")
        near, far = f"{self.name}va", f"{self.name}vb"
        run("ip", "link", "add", near, "netns", f"{self.name}a", "type", "veth",
            *("peer", "name", far, "netns", f"{self.name}b"))  # fmt: skip
        for side, number in (("a", 1), ("b", 2)):
            cable = f"{self.name}v{side}"
            run("ip", "-n", self.name + side, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
            run("ip", "-n", self.name + side, "link", "set", cable, "up")

    def remove(self) -> None:
        for side in ("a", "b"):
            space = self.name + side
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
            shutil.rmtree(f"/etc/netns/{space}", ignore_errors=True)

    def torchrun(self, world: World, side: str, port: int) -> Process:
        """Start torchrun with two ranks on one node, under a host name of its own."""
        number = {"a": 0, "b": 1}[side]
        name = 'echo node$SIDE > /proc/sys/kernel/hostname && exec "$@"'
        return world.start(
            *("ip", "netns", "exec", self.name + side, "unshare", "--uts", "sh", "-c", name, "sh"),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{port}", "--rdzv-id=test"),
            f"--rdzv-conf=is_host={'true' if side == 'a' else 'false'}",
            f"--local-addr=10.77.0.{number + 1}",
            *("-m", "pytest", *PLUGINS),
            SIDE=side,
            CABLE=f"{self.name}v{side}",
        )


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs the commands ip and unshare, found none")
    made = Network(f"pr{os.getpid() % 100000}")
    try:
        made.make()
    except OSError as error:
        made.remove()
        pytest.skip(f"needs network namespaces, which may not be made here: {error}")
    try:
        yield made
    finally:
        made.remove()


def run_on_both(
    network: Network, folder: Path, tests: str
) -> Iterator[tuple[World, Process, Process]]:
    run("ip", "-n", f"{network.name}a", "link", "set", f"{network.name}va", "up")
    world = World(folder)
    world.write(tests)
    port = free_port()
    try:
        first = network.torchrun(world, "a", port)
        second = network.torchrun(world, "b", port)
        first.wait()
        yield world, first, second
    finally:
        world.end()


@pytest.fixture(scope="module")
def cut(
    network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, Process, Process]]:
    yield from run_on_both(network, tmp_path_factory.mktemp("cut"), CUT)


@pytest.fixture(scope="module")
def killed(
    network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, Process, Process]]:
    yield from run_on_both(network, tmp_path_factory.mktemp("killed"), KILL)


LOST = "nothing was heard for 10 s from node nodeb: the link is cut, or the node is down"


def test_the_world_spans_two_nodes_until_the_cable_is_cut(
    cut: tuple[World, Process, Process],
) -> None:
    world, first, _ = cut
    assert "ranks: attached to a world of 4 on 2 nodes, this is rank 0" in first.output
    assert "ranks: attached to a world of 4 on 2 nodes, this is rank 1; rank 0 rep" in first.output
    assert world.outcomes() == {
        "test_world": "passed",
        "test_init_again": "passed",
        "test_one_node_before": "passed",
        "test_cut": "failed",
        "test_one_node_after": "passed",
        "test_too_few_left": "failed",
    }, first.output


def test_a_cut_cable_is_named_at_our_deadline(cut: tuple[World, Process, Process]) -> None:
    world, first, _ = cut
    text = world.text("test_cut")
    head = text.splitlines()[0]
    assert head.startswith("rank 2 of 4 failed first (rank 3 failed the same way; ")
    assert head.endswith(f": {LOST}")
    # rank 1 may not have left the barrier before the cable was cut
    waited = r"(ranks 0 and 1|rank 0) waited in all_reduce, called from test_cut \(test_it.py:"
    assert re.search(rf"the deadline of 4 s passed .* from ranks 2 and 3: .*{waited}", text)
    assert "ranks 0 and 1 ran on node nodea; ranks 2 and 3 ran on node nodeb" in text
    assert "Timed out waiting" not in text  # what the group would have said, 30 seconds later
    assert (
        "the test needs 4 ranks, 2 of the world's 4 are left. Lost before: "
        f"ranks 2 and 3 (node nodeb): {LOST}, during test_it.py::test_cut"
        in world.text("test_too_few_left")
    )
    summary = first.output.partition("ranks of the world")[2]
    assert f"ranks 2 and 3 (node nodeb): {LOST}, during test_it.py::test_cut" in summary
    codes = re.findall(r"^  exitcode  : (\S+)", first.output, re.MULTILINE)
    assert codes == ["1", "1"]


def test_the_other_node_ends_by_itself(cut: tuple[World, Process, Process]) -> None:
    _, _, second = cut
    second.wait_for("ends: rank 0: ", 2)
    for rank in (2, 3):
        # silence, or what the kernel makes of a cable that is gone, whichever comes first
        assert re.search(
            rf"ranks: rank {rank} \(node nodeb\) ends: rank 0: "
            r"(nothing was heard for 10 s|its connection ended)",
            second.output,
        )
        assert second.output.count(f"this is rank {rank}; rank 0 reports") == 1


def test_a_node_that_is_killed_is_named(killed: tuple[World, Process, Process]) -> None:
    world, first, second = killed
    assert world.outcomes() == {
        "test_node_dies": "failed",
        "test_one_node_after": "passed",
    }, first.output
    head = world.text("test_node_dies").splitlines()[0]
    ended = "its pytest on node nodeb ended without a word"
    assert re.match(rf"rank [23] of 4 failed first \(.*\): {ended}", head)
    lost = "ranks 2 and 3 (node nodeb)"
    assert f"{lost}: {ended}, during test_it.py::test_node_dies" in first.output
    codes = re.findall(r"^  exitcode  : (\S+)", first.output, re.MULTILINE)
    assert codes == ["1", "1"]
    assert second.wait() < 0  # SIGKILL
