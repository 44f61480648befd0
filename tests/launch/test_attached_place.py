"""What user code is told about a rank whose run is on several machines."""

from __future__ import annotations

import os

import pytest

from pytest_ranks.launch.group import export_rank_variables
from pytest_ranks.launch.wire import Place, Rendezvous, World

RENDEZVOUS = Rendezvous(
    run=1, port=4001, home_port=4002, seconds=9, host="10.0.0.1", interface="eth1"
)


def exported(world: World) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {})
        export_rank_variables(world)
        return dict(os.environ)


def test_a_rank_on_the_second_node_has_the_numbers_of_its_node() -> None:
    place = Place(local_rank=1, local_world_size=2, node=1, nodes=2)
    world = World(rank=3, world_size=4, place=place, rendezvous=RENDEZVOUS)
    found = exported(world)
    assert world.local_rank == 1
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
    }
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert (found["GROUP_RANK"], found["GROUP_WORLD_SIZE"]) == ("1", "2")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4001")
    assert found["GLOO_SOCKET_IFNAME"] == "eth1"


def test_a_rank_without_a_place_is_on_the_one_machine_there_is() -> None:
    found = exported(World(rank=3, world_size=4))
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("3", "4")
    assert (found["GROUP_RANK"], found["GROUP_WORLD_SIZE"]) == ("0", "1")
