"""The parts of a session over several machines: who is told what, and what is read from where."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.deadline import Where
from pytest_ranks.launch.machines import coordination as c
from pytest_ranks.launch.machines import interfaces
from pytest_ranks.launch.machines.agreement import complaints
from pytest_ranks.launch.machines.codec import decode, encode
from pytest_ranks.launch.machines.line import Line, LineLost
from pytest_ranks.launch.machines.outer_world import first_hosts, read_world
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Finished, Phase, Raised

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[08-09]",
    "SLURMD_NODENAME": "gpu09",
}


def test_the_world_of_torchrun_is_read_from_its_variables() -> None:
    world = read_world(TORCHRUN)
    assert world is not None
    assert str(world) == "attached to a world of 4 on 2 nodes, this is rank 3"
    assert (world.launcher, world.node, world.has_store) == ("torchrun", 1, True)
    assert (world.address, world.port) == ("10.0.0.1", 29400)


def test_the_world_of_srun_has_rank_0_on_the_first_host_at_a_port_of_the_job() -> None:
    world = read_world(SRUN)
    assert world is not None
    assert str(world) == "attached to a world of 4 on 2 nodes, this is rank 2"
    assert (world.launcher, world.node, world.node_name) == ("srun", 1, "gpu09")
    assert world.address == "gpu08"
    assert 20000 <= world.port < 30000
    assert not world.has_store
    other = read_world({**SRUN, "SLURM_JOB_ID": "78"})
    assert other is not None
    assert other.port != world.port
    chosen = read_world({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert chosen is not None
    assert (chosen.address, chosen.port) == ("head", 4000)


def test_torchrun_started_by_srun_is_torchrun() -> None:
    world = read_world({**SRUN, **TORCHRUN})
    assert world is not None
    assert world.launcher == "torchrun"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},  # a rank of ours
        {name: text for name, text in SRUN.items() if name != "SLURM_STEP_ID"},  # a batch script
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
    ],
    ids=["none", "no launcher", "batch script", "one rank"],
)
def test_what_is_no_world_is_left_alone(variables: dict[str, str]) -> None:
    assert read_world(variables) is None


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {**TORCHRUN, "RANK": "x"},
            "RANK is 'x': expected a whole number, as torchrun and srun set it. "
            "--ranks-attach=never runs the tests as on one machine.",
        ),
        (
            {**TORCHRUN, "RANK": "4"},
            "torchrun says that this is rank 4 of 4: expected a rank from 0 to 3.",
        ),
        (
            {**TORCHRUN, "MASTER_ADDR": ""},
            "MASTER_ADDR is not set: expected the address of rank 0, as torchrun sets it. "
            "--ranks-attach=never runs the tests as on one machine.",
        ),
        (
            {**SRUN, "SLURM_JOB_NODELIST": ""},
            "srun started this process, but SLURM_JOB_NODELIST names no host: expected it, or "
            "MASTER_ADDR, to know where rank 0 is.",
        ),
        (
            {**SRUN, "SLURM_JOB_NODELIST": "node[1-x]"},
            "the node list 'node[1-x]' cannot be read: expected numbers and ranges in brackets, "
            "as in 'node[01-04,7]'.",
        ),
    ],
)
def test_variables_that_cannot_be_read_are_named(variables: dict[str, str], text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        read_world(variables)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("", []),
    ],
)
def test_node_lists_of_slurm(text: str, hosts: list[str]) -> None:
    assert first_hosts(text) == hosts


def test_what_a_rank_did_travels_as_it_is() -> None:
    phase = Phase(
        when="call",
        outcome="skipped",
        was_xfail=None,
        report={"longrepr": ("a.py", 3, "why"), "sections": [("out", "\udcff ü")], 1: b"\x00"},
        at=1.5,
    )
    run = RankRun(
        rank=0,
        messages=[Raised(headline="h", traceback="t", at=2.0), Finished(phases=(phase,))],
        done=True,
        where=Where(collective="all_reduce", function="f", file="a.py", line=1),
    )
    message = c.Result(number=7, run=run)
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[",
        b'{"type":"os.system","state":{}}',
        b'{"type":"messages.annotations","state":{}}',
        b'{"type":"codec.Any","state":{}}',
        b'{"type":"coordination.RankRun","state":{"rank":0}}',
        b'{"type":"coordination.End","state":{"code":1}}',
    ],
)
def test_what_is_no_message_is_refused_and_never_run(data: bytes) -> None:
    with pytest.raises(BadInputError, match="what arrived is no message of ours"):
        decode(data)


def test_only_data_travels() -> None:
    with pytest.raises(TypeError, match=r"^object does not travel between machines$"):
        encode(c.Leaving(reason=object()))  # type: ignore[arg-type]


@pytest.fixture
def lines() -> Iterator[tuple[Line, Line]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = Line(socket.create_connection(listener.getsockname()))
        far = Line(listener.accept()[0])
    yield near, far
    near.close()
    far.close()


def test_messages_come_in_order_and_then_the_end(lines: tuple[Line, Line]) -> None:
    near, far = lines
    sent = [c.Failed(number=number) for number in range(3)]
    for message in sent:
        near.send(message)
    near.close()
    assert far.receive(60) == sent[0]
    assert [far.receive(60), far.receive(60)] == sent[1:]
    with pytest.raises(LineLost, match="its connection ended"):
        far.receive(60)


def test_a_long_message_and_silence(lines: tuple[Line, Line]) -> None:
    near, far = lines
    near.send(c.Leaving(reason="x" * 200_000))
    assert len(far.receive(60).reason) == 200_000
    assert far.receive_all() == []
    with pytest.raises(TimeoutError):
        far.receive(0.01)


HELLO = c.Hello(
    token="t",
    rank=0,
    node=0,
    node_name="a",
    versions={"torch": "2.13.0"},
    ids=("t.py::x", "t.py::y"),
)
LIKE = [replace(HELLO, rank=rank, node=1, node_name="b") for rank in (2, 3)]


def test_ranks_that_are_alike_have_no_complaint() -> None:
    assert complaints([HELLO, *LIKE]) == []


def test_what_differs_is_named_once_with_its_ranks_and_nodes() -> None:
    others = [
        replace(one, versions={"torch": "2.11.0"}, ids=("t.py::x", "t.py::z")) for one in LIKE
    ]
    assert complaints([HELLO, *others]) == [
        "ranks 2 and 3 (node b) have torch 2.11.0, rank 0 (node a) has torch 2.13.0: "
        "make them the same",
        "ranks 2 and 3 (node b) did not collect what rank 0 did: t.py::y",
        "ranks 2 and 3 (node b) collected what rank 0 did not: t.py::z",
    ]


def test_rank_0_may_have_selected_while_it_collected() -> None:
    first = replace(HELLO, ids=("t.py::x",))
    assert complaints([first, *LIKE], may_have_more=True) == []
    assert complaints([first, LIKE[0]]) == [
        "rank 2 (node b) collected what rank 0 did not: t.py::y"
    ]


def test_a_file_that_one_rank_cannot_collect_is_named() -> None:
    broken = replace(LIKE[0], ids=(), errors=("t.py: E   ImportError: no x",))
    assert complaints([HELLO, broken]) == [
        "rank 2 (node b) could not collect: t.py: E   ImportError: no x"
    ]


def test_nodes_of_one_name_are_told_apart() -> None:
    twin = replace(LIKE[0], node_name="a", ids=())
    assert complaints([HELLO, twin]) == [
        "rank 2 (node a#1) did not collect what rank 0 did: t.py::x, t.py::y"
    ]


def test_the_way_to_this_machine_is_the_loopback() -> None:
    assert interfaces.own_address("127.0.0.1") == "127.0.0.1"
    assert interfaces.interface_towards("127.0.0.1") == "lo"
    assert interfaces.plain_address("::ffff:10.0.0.1") == "10.0.0.1"
    assert interfaces.plain_address("fe80::1%eth0") == "fe80::1"
