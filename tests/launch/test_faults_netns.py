"""A slow cable between two nodes: the kernel's traffic control in namespaces that the test makes."""

from __future__ import annotations

import shutil

import pytest
from test_attached_netns import HEAD, network, run_on_both  # noqa: F401 - a fixture

TESTS = (
    HEAD
    + """
from pytest_ranks import UnavailableError

CABLE = os.environ["CABLE"]
BURST = 1 << 16

def discipline():
    return subprocess.run(["tc", "qdisc", "show", "dev", CABLE], capture_output=True, text=True).stdout

@pytest.mark.ranks(4, timeout=120)
def test_slow(rank, faults):
    faults.slow_network(bandwidth=1_000_000, interface=CABLE)
    dist.barrier()
    assert "tbf" in discipline() and "rate 8Mbit" in discipline()
    half = torch.zeros(125_000)  # 500,000 bytes, which cross the cable at least once
    begin = time.monotonic()
    dist.broadcast(half, 0)
    dist.barrier()
    assert time.monotonic() - begin >= (500_000 - BURST) / 1_000_000

@pytest.mark.ranks(4)
def test_as_before(rank):
    assert "tbf" not in discipline()

@pytest.mark.ranks(4)
def test_no_such_interface(rank, faults):
    if rank.local_rank == 0:
        with pytest.raises(UnavailableError, match="tc qdisc replace dev nowhere root tbf rate "):
            faults.slow_network(bandwidth=1_000_000, interface="nowhere")
    else:
        faults.slow_network(bandwidth=1_000_000, interface="nowhere")
"""
)


@pytest.fixture(scope="module")
def session(network, tmp_path_factory):  # noqa: F811
    if shutil.which("tc") is None:
        pytest.skip("needs the command tc, found none")
    yield from run_on_both(network, tmp_path_factory.mktemp("slow"), TESTS)


def test_a_cable_is_slow_for_one_test(session):
    world, first, _ = session
    assert world.outcomes() == {
        "test_slow": "passed",
        "test_as_before": "passed",
        "test_no_such_interface": "passed",
    }, first.output + world.text("test_slow")
