"""Which fidelity a test runs on: the mark, the option, and what the report says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.fidelity import ladder
from pytest_ranks.launch.spec import RankSpec, ranks


def test_a_mark_that_says_nothing_is_valid_on_gloo_only():
    (spec,) = ranks(4)
    assert (spec.fidelity, spec.lowest_fidelity, spec.processes) == ("gloo", "gloo", 4)
    assert ladder.is_allowed(spec, "device")


def test_a_backend_implies_its_fidelity_and_the_other_way_round():
    (by_backend,) = ranks(2, backend="nccl")
    (by_fidelity,) = ranks(2, fidelity="device")
    assert replace(by_backend, is_pinned=True) == by_fidelity
    assert by_fidelity == RankSpec(
        world_size=2, backend="nccl", fidelity="device", lowest_fidelity="device", is_pinned=True
    )
    assert not ladder.is_allowed(by_fidelity, "gloo")


def test_the_lowest_fidelity_alone_lifts_the_default():
    (spec,) = ranks(2, lowest_fidelity="device")
    assert (spec.fidelity, spec.backend) == ("device", "nccl")


def test_a_mark_that_names_a_fidelity_alone_leaves_the_session_no_say():
    (pinned,) = ranks(2, fidelity="fake")
    (free,) = ranks(2, fidelity="fake", lowest_fidelity="fake")
    assert not ladder.is_allowed(pinned, "gloo")
    assert ladder.is_allowed(free, "gloo")
    assert ladder.at(free, "gloo") == replace(free, fidelity="gloo")


def test_what_one_process_plays_is_no_wider_than_one_process():
    (fake,) = ranks(65536, fidelity="fake", as_rank=7)
    assert (fake.processes, fake.is_limited, fake.as_rank) == (1, False, 7)
    assert ladder.at(fake, "local_tensor").as_rank == 0


def test_a_simulated_device_has_a_name():
    (spec,) = ranks(2, fidelity="simulated", device="gaudi")
    assert (spec.simulated, spec.backend, spec.processes) == ("gaudi", "gloo", 2)
    (free,) = ranks(2)
    assert (free.simulated, ladder.at(free, "simulated").simulated) == ("", "neuron")
    several = ranks(2, fidelity=["gloo", "simulated"], device="gaudi")
    assert [one.simulated for one in several] == ["", "gaudi"]


def test_the_rank_that_is_played_is_one_of_each_world():
    with pytest.raises(BadInputError) as caught:
        ranks([2, 4], fidelity="fake", as_rank=3)
    assert str(caught.value) == "ranks(as_rank=3): expected a rank of the world, 0 to 1."


def test_several_fidelities_are_one_spec_each_and_the_lowest_named_is_valid():
    specs = ranks([1, 2], fidelity=["gloo", "device"])
    assert [(one.world_size, one.fidelity) for one in specs] == [
        *((1, "gloo"), (1, "device")),
        *((2, "gloo"), (2, "device")),
    ]
    assert {one.lowest_fidelity for one in specs} == {"gloo"}
    with_lowest = ranks(2, fidelity=["gloo", "device"], lowest_fidelity="gloo")
    assert [one.is_pinned for one in (*specs, *with_lowest)] == [True] * 6


NAMES = ", ".join(map(repr, ladder.FIDELITIES))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"fidelity": "glo"},
            f"ranks(fidelity='glo'): expected one of {NAMES}. Did you mean 'gloo'?",
        ),
        ({"fidelity": 3}, f"ranks(fidelity=3): expected one of {NAMES}."),
        ({"fidelity": []}, "ranks(fidelity=[]): expected at least one fidelity."),
        (
            {"fidelity": ["gloo", "gloo"]},
            "ranks(fidelity=['gloo', 'gloo']): a fidelity is named twice.",
        ),
        (
            {"lowest_fidelity": "devices"},
            f"ranks(lowest_fidelity='devices'): expected one of {NAMES}. Did you mean 'device'?",
        ),
        (
            {"fidelity": "gloo", "lowest_fidelity": "device"},
            "ranks(fidelity='gloo', lowest_fidelity='device'): 'gloo' is lower than the lowest; "
            f"the order is {', '.join(ladder.FIDELITIES)}.",
        ),
        (
            {"fidelity": "gloo", "backend": "nccl"},
            "ranks(fidelity='gloo', backend='nccl'): expected backend 'gloo' or none.",
        ),
        (
            {"fidelity": "device", "backend": "gloo"},
            "ranks(fidelity='device', backend='gloo'): expected backend 'nccl' or none.",
        ),
        (
            {"as_rank": 2, "fidelity": "fake"},
            "ranks(as_rank=2): expected a rank of the world, 0 to 1.",
        ),
        (
            {"as_rank": True, "fidelity": "fake"},
            "ranks(as_rank=True): expected a rank of the world, 0 to 1.",
        ),
        (
            {"as_rank": 1},
            "ranks(as_rank=1): only a body at fidelity='fake' plays one rank of many; at the "
            "others every rank plays itself.",
        ),
        (
            {"device": "cuda", "fidelity": "simulated"},
            "ranks(device='cuda'): expected a name in small letters of an accelerator that torch "
            "does not have itself, such as 'neuron'.",
        ),
        (
            {"device": "gaudi", "fidelity": "gloo"},
            "ranks(device='gaudi'): only fidelity='simulated' names a device; a real one is what "
            "the backend has.",
        ),
        (
            {"expect_deaths": {0: "SIGKILL"}, "lowest_fidelity": "threads"},
            "ranks(expect_deaths=...): at fidelity 'threads' one process plays all ranks, so none "
            "dies alone; expected lowest_fidelity 'gloo' or above.",
        ),
        (
            {"expect_deaths": {0: "SIGKILL"}, "fidelity": "fake"},
            "ranks(expect_deaths=...): at fidelity 'fake' one process plays all ranks, so none "
            "dies alone; expected lowest_fidelity 'gloo' or above.",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(kwargs, text):
    with pytest.raises(BadInputError) as caught:
        ranks(2, **kwargs)
    assert str(caught.value) == text


CHOSEN = """
import pytest

@pytest.mark.ranks(2)
def test_plain(rank):
    assert rank.fidelity == "gloo"

@pytest.mark.ranks(2)
def test_fails(rank):
    assert rank.index == 0

@pytest.mark.ranks([1], fidelity=["gloo", "device"])
def test_several(rank):
    assert rank.fidelity == "gloo"
"""


@pytest.fixture(scope="module")
def chosen(run_session):
    return run_session({"test_it.py": CHOSEN})


def test_every_report_names_its_fidelity(chosen):
    for name in ("test_plain", "test_fails", "test_several[ws=1-gloo]"):
        assert ["fidelity", "gloo"] in chosen.call(name).properties


def test_a_fidelity_is_in_the_id_where_the_mark_lists_several(chosen):
    assert chosen.call("test_several[ws=1-gloo]").outcome == "passed"
    assert chosen.call("test_several[ws=1-device]").outcome in ("skipped", "passed", "failed")


def test_usual_failures_say_nothing_of_fidelity(chosen):
    assert "fidelity" not in chosen.call("test_fails").text


def test_a_session_that_wants_devices_skips_without_them_and_keeps_listed_items(run_session):
    found = run_session({"test_it.py": CHOSEN}, "--ranks-fidelity=device", "-k", "not fails")
    assert "ranks: fidelity=device (from --ranks-fidelity)" in found.output
    row = found.call("test_plain")
    if row.outcome == "skipped":
        assert "backend 'nccl': needs 2 CUDA or ROCm devices" in row.text
    assert found.call("test_several[ws=1-gloo]").outcome == "passed"


def test_a_bad_option_is_one_sentence(run_session):
    found = run_session({"test_it.py": CHOSEN}, "--ranks-fidelity=glo")
    assert found.returncode == 4
    assert "--ranks-fidelity: found 'glo', expected " in found.output
    assert "(no fidelity is called 'glo'. Did you mean 'gloo'?)" in found.output


CHOSEN_BY_FIXTURE = """
import pytest

class TestEach:
    @pytest.fixture(params=["threads", "gloo"])
    def ranks_fidelity(self, request):
        return request.param

    @pytest.mark.ranks(2, lowest_fidelity="threads")
    def test_allows(self, rank, request):
        assert f"[{rank.fidelity}]" in request.node.nodeid
        assert rank.gather(rank.index) == [0, 1]

    @pytest.mark.ranks(2)
    def test_says_nothing(self, rank):
        assert rank.fidelity == "gloo"

    @pytest.mark.ranks(2, fidelity="fake")
    def test_pinned(self, rank):
        assert rank.fidelity == "fake"

    def test_plain(self):
        pass


class TestOne:
    @pytest.fixture
    def ranks_fidelity(self):
        return "threads"

    @pytest.mark.ranks(2, lowest_fidelity="threads")
    def test_allows_one(self, rank):
        assert rank.gather(rank.fidelity) == [rank.fidelity] * 2

    @pytest.mark.ranks(2)
    def test_says_nothing_to_one(self, rank):
        assert rank.fidelity == "gloo"


class TestWrong:
    @pytest.fixture
    def ranks_fidelity(self):
        return "thread"

    @pytest.mark.ranks(2)
    def test_name(self, rank):
        pass


class TestArguments:
    @pytest.fixture
    def ranks_fidelity(self, tmp_path):
        return "threads"

    @pytest.mark.ranks(2)
    def test_arguments(self, rank):
        pass


@pytest.mark.ranks(4096, fidelity="fake", lowest_fidelity="fake")
def test_allows_more_ranks_than_may_be_processes(rank):
    assert rank.fidelity == "fake"


@pytest.mark.ranks(2)
def test_asks(rank, ranks_fidelity):
    assert ranks_fidelity == "gloo"


@pytest.mark.ranks(2, fidelity="threads")
def test_faults(rank, faults):
    pass
"""


@pytest.fixture(scope="module")
def by_fixture(run_session):
    # a wish of the session that no test here allows leaves the say to the fixture
    return run_session({"test_it.py": CHOSEN_BY_FIXTURE}, "--ranks-fidelity=fake")


@pytest.mark.parametrize(
    ("name", "fidelity"),
    [
        ("test_allows[threads]", "threads"),
        ("test_allows[gloo]", "gloo"),
        ("test_says_nothing[gloo]", "gloo"),
        ("test_allows_one", "threads"),
        ("test_says_nothing_to_one", "gloo"),
        ("test_asks", "gloo"),
    ],
)
def test_a_fixture_chooses_where_the_test_allows_it(by_fixture, name, fidelity):
    row = by_fixture.call(name)
    assert row.outcome == "passed", row.text
    assert dict(row.properties)["fidelity"] == fidelity


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "test_says_nothing[threads]",
            "fixture ranks_fidelity says 'threads', the test is valid at 'gloo' and above; write "
            "lowest_fidelity='threads' on its mark if it is",
        ),
        (
            "test_pinned[gloo]",
            "fixture ranks_fidelity says 'gloo', the test runs at fidelity 'fake' alone",
        ),
    ],
)
def test_a_fixture_skips_what_it_may_not_choose(by_fixture, name, reason):
    row = by_fixture.call(name)
    assert row.outcome == "skipped"
    assert reason in row.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "test_name",
            f"ranks: the fixture ranks_fidelity says 'thread', expected one of {NAMES}.",
        ),
        (
            "test_arguments",
            "ranks: the fixture ranks_fidelity takes tmp_path, expected nothing, or params=[...]: "
            "it is asked before the ranks are there.",
        ),
        (
            "test_faults",
            "ranks(fidelity='threads'): the fixture 'faults' needs a process a rank, expected "
            "fidelity 'gloo' or above.",
        ),
    ],
)
def test_a_fixture_that_cannot_choose_is_one_sentence(by_fixture, name, text):
    row = by_fixture.call(name)
    assert row.outcome == "failed"
    assert text in row.text


def test_tests_without_the_mark_are_not_repeated(by_fixture):
    assert by_fixture.call("test_plain").outcome == "passed"


def test_the_command_line_goes_before_a_fixture_without_parameters(run_session):
    found = run_session({"test_it.py": CHOSEN_BY_FIXTURE}, "--ranks-fidelity=gloo", "-k", "allows")
    assert dict(found.call("test_allows_one").properties)["fidelity"] == "gloo"
    wide = found.call("test_allows_more_ranks_than_may_be_processes")
    assert wide.outcome == "passed", wide.text
    assert dict(wide.properties)["fidelity"] == "fake"
    assert dict(found.call("test_allows[threads]").properties)["fidelity"] == "threads"
