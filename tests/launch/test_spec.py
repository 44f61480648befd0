from __future__ import annotations

import inspect
import signal

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.hardware.requirements import BACKEND_DEVICES
from pytest_ranks.launch.fidelity.ladder import DEVICE_BACKENDS
from pytest_ranks.launch.spec import RankSpec, fill, ranks


def test_a_world_size_gives_one_spec():
    assert ranks(4) == (RankSpec(world_size=4),)


def test_a_list_gives_one_spec_for_each_world_size():
    assert [spec.world_size for spec in ranks([1, 2, 4], timeout=5)] == [1, 2, 4]


def test_a_mesh_multiplies_out_in_the_order_given():
    (spec,) = ranks(tp=2, dp=3)
    assert spec.world_size == 6
    assert spec.mesh == (("tp", 2), ("dp", 3))


def test_expected_deaths_are_kept_in_order_of_rank_by_name_or_code():
    (spec,) = ranks(4, expect_deaths={2: signal.SIGSEGV, 0: 3, 1: "SIGKILL"})
    assert spec.expect_deaths == ((0, 3), (1, "SIGKILL"), (2, "SIGSEGV"))


def test_the_signature_that_users_read_is_the_functions_own():
    names = list(inspect.signature(ranks).parameters)
    assert names == [
        "world_size",
        *("dp", "tp", "pp", "cp", "ep"),
        *(
            "timeout",
            "backend",
            "isolate",
            "init",
            "keep_group",
            "fidelity",
            "lowest_fidelity",
            "as_rank",
            "device",
            "expect_deaths",
        ),
    ]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "ranks(): expected a world size, as ranks(2), or a mesh, as dp=2."),
        ((0,), {}, "ranks(0): world size 0, expected a whole number of at least 1."),
        ((True,), {}, "ranks(True): world size True, expected a whole number of at least 1."),
        (("2",), {}, "ranks('2'): world size '2', expected a whole number of at least 1."),
        (
            (2**20 + 1,),
            {"fidelity": "fake"},
            "ranks: world size 1048577, expected at most 1048576; no machine has more.",
        ),
        (
            (),
            {"dp": 2048, "tp": 1024},
            "ranks: world size 2097152, expected at most 1048576; no machine has more.",
        ),
        (([],), {}, "ranks([]): expected at least one world size."),
        (([2, 2],), {}, "ranks([2, 2]): a world size is named twice."),
        (
            (8,),
            {"dp": 2, "tp": 2},
            "ranks(8, dp=2, tp=2): the mesh multiplies out to 4 ranks, the world size is 8.",
        ),
        ((), {"dp": 0}, "ranks(dp=0): expected a whole number of at least 1."),
        ((2,), {"timeout": 0}, "ranks(timeout=0): expected a number of seconds above 0."),
        ((2,), {"isolate": 1}, "ranks(isolate=1): expected True or False."),
        (
            (2,),
            {"expect_deaths": "SIGKILL"},
            "ranks(expect_deaths='SIGKILL'): expected signals or exit codes by rank, such as "
            "{1: 'SIGKILL'} or {1: 3}.",
        ),
        (
            (2,),
            {"keep_group": True, "expect_deaths": {1: 3}},
            "ranks(keep_group=True, expect_deaths={1: 3}): a group with a dead rank cannot be "
            "kept; leave one of the two out.",
        ),
        (
            (2,),
            {"expect_deaths": {}},
            "ranks(expect_deaths={}): expected signals or exit codes by rank, such as "
            "{1: 'SIGKILL'} or {1: 3}.",
        ),
        (
            ([4, 2],),
            {"expect_deaths": {2: "SIGKILL"}},
            "ranks(expect_deaths={2: 'SIGKILL'}): rank 2, expected one from 0 to 1, since the "
            "world has 2.",
        ),
        (
            (2,),
            {"expect_deaths": {True: 3}},
            "ranks(expect_deaths={True: 3}): rank True, expected one from 0 to 1, since the "
            "world has 2.",
        ),
        (
            (2,),
            {"expect_deaths": {1: "SIGKIL"}},
            "ranks(expect_deaths={1: 'SIGKIL'}): found 'SIGKIL', expected a signal, such as "
            "'SIGKILL', or an exit code from 0 to 255. Did you mean 'SIGKILL'?",
        ),
        (
            (2,),
            {"expect_deaths": {1: 256}},
            "ranks(expect_deaths={1: 256}): found 256, expected a signal, such as 'SIGKILL', or "
            "an exit code from 0 to 255.",
        ),
        (
            (2,),
            {"backend": "glo"},
            "ranks(backend='glo'): expected one of 'gloo', 'nccl', 'xccl', 'neuron'. Did you mean 'gloo'?",
        ),
        (
            (2,),
            {"timout": 3},
            "ranks(timout=...): unknown argument 'timout', did you mean 'timeout'?",
        ),
        (
            (2,),
            {"nodes": 3},
            "ranks(nodes=...): unknown argument 'nodes', expected one of dp, tp, pp, cp, ep, "
            "timeout, backend, isolate, init, keep_group, fidelity, lowest_fidelity, as_rank, "
            "device, expect_deaths.",
        ),
        (
            (),
            {"world_size": 2},
            "ranks(world_size=...): expected the world size without its name: ranks(2).",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(args, kwargs, text):
    with pytest.raises(BadInputError) as caught:
        ranks(*args, **kwargs)
    assert str(caught.value) == text


def test_a_size_may_be_a_parameter_of_the_test():
    assert fill(("ws",), {"timeout": 3}, {"ws": 4}) == ((4,), {"timeout": 3})
    filled = fill((), {"dp": "d", "tp": 2, "backend": "gloo"}, {"d": 3})
    assert filled == ((), {"dp": 3, "tp": 2, "backend": "gloo"})


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (
            ("wsize",),
            {},
            "ranks('wsize'): expected a number, or the name of a parametrized argument of the "
            "test, which has 'w_size'. Did you mean 'w_size'?",
        ),
        (
            (),
            {"tp": "x"},
            "ranks(tp='x'): expected a number, or the name of a parametrized argument of the "
            "test, which has 'w_size'.",
        ),
    ],
)
def test_a_size_that_is_no_parameter_gets_one_sentence(args, kwargs, text):
    with pytest.raises(BadInputError) as caught:
        fill(args, kwargs, {"w_size": 2})
    assert str(caught.value) == text


def test_each_backend_with_devices_says_which_devices_they_are():
    assert set(BACKEND_DEVICES) == set(DEVICE_BACKENDS)
