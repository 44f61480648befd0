"""An item run once more in detail: when, and what it says."""

from __future__ import annotations

import re

import pytest

from pytest_ranks.launch.forensics import rerun
from pytest_ranks.launch.forensics.sight import Sight
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Injected, Phase, Raised

ABORT = "terminate called ... op.preamble.length <= op.nbytes. 32 vs 4"
# As torch 2.13 words it: what each rank says of the other is not to be relied on.
ON_RANK_0 = (
    "RuntimeError: Detected mismatch between collectives on ranks. Rank 0 is running collective: "
    "CollectiveFingerPrint(SequenceNumber=1, OpType=ALLREDUCE, TensorShape=[2 3], "
    "TensorDtypes=Float, TensorDeviceTypes=TensorOptions(dtype=float (default))), but Rank 1 is "
    "running collective: CollectiveFingerPrint(SequenceNumber=0OpType=REDUCE)."
)
ON_RANK_1 = (
    "RuntimeError: Detected mismatch between collectives on ranks. Rank 1 is running collective: "
    "CollectiveFingerPrint(SequenceNumber=1OpType=BARRIER), but Rank 0 is running collective: "
    "CollectiveFingerPrint(SequenceNumber=0OpType=GATHER)."
)


class Done:
    def __init__(self, *runs):
        self.runs = list(runs)


def raised(rank, text):
    return RankRun(rank=rank, done=True, messages=[Raised(headline=text, traceback=text, at=0.0)])


@pytest.mark.parametrize(
    ("run", "needed"),
    [
        (RankRun(rank=0, crashed=True, status=-6, output=ABORT), True),
        (RankRun(rank=0, crashed=True, status=-6, captured=ABORT), True),
        (RankRun(rank=0, crashed=True, status=-6, output="double free"), False),
        (RankRun(rank=0, crashed=True, status=-9), False),
        (RankRun(rank=0, stopped="deadline", sight=Sight(rank=0)), False),
        (RankRun(rank=0, stopped="collateral", sight=Sight(rank=0, recorder="off")), False),
        (raised(0, "ValueError: boom"), False),
    ],
)
def test_it_is_needed_only_where_nothing_else_explains(run, needed):
    assert rerun.is_needed(Done(run, RankRun(rank=1, done=True))) is needed


def test_it_is_not_needed_after_a_fault_that_the_test_injected():
    run = RankRun(rank=0, crashed=True, status=-6, output=ABORT)
    assert rerun.is_needed(Done(run))
    run.messages.append(Injected.__new__(Injected))
    assert not rerun.is_needed(Done(run))


def test_each_rank_is_asked_for_its_own_collective_alone():
    assert rerun.describe([raised(0, ON_RANK_0), raised(1, ON_RANK_1)]) == (
        "run once more under TORCH_DISTRIBUTED_DEBUG=DETAIL, the collectives differ: "
        "rank 0 called all_reduce #2 of float32 [2, 3]; rank 1 called barrier #2"
    )


def test_a_rank_that_never_came_is_named():
    text = "Ranks 1, 2 failed to pass monitoredBarrier in 10000 ms"
    entry = {"data": {"reprfileloc": {"path": "test_a.py", "lineno": 7}}}
    longrepr = {"reprtraceback": {"reprentries": [entry]}, "text": text}
    phase = Phase(
        when="call", outcome="failed", was_xfail=None, report={"longrepr": longrepr}, at=0.0
    )
    assert rerun.describe([RankRun(rank=0, messages=[phase])]) == (
        "run once more under TORCH_DISTRIBUTED_DEBUG=DETAIL: ranks 1 and 2 did not come to "
        "test_a.py:7"
    )


def test_finding_nothing_is_said():
    assert rerun.describe([raised(0, "ValueError: boom")]) == (
        "run once more under TORCH_DISTRIBUTED_DEBUG=DETAIL, no collective was found to differ"
    )


MISMATCHES = """
import os, signal, time
import pytest, torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2)


@pytest.fixture(autouse=True)
def count(rank, request):
    if rank.index == 0:
        with open(os.environ["COUNTED"], "a") as file:
            file.write(request.node.name + "\\n")


def step(size, dtype=torch.float32):
    dist.all_reduce(torch.ones(size, dtype=dtype))


def test_another_shape(rank):
    step(2)
    step(8 if rank.index == 0 else 1)


@pytest.mark.ranks(4)
def test_another_shape_on_one_of_four(rank):
    step(8 if rank.index == 2 else 1)


def test_another_dtype(rank):
    step(4, torch.int32 if rank.index else torch.float32)


def test_sigkill(rank):
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(1)


def test_assertion(rank):
    assert rank.index == 5


@pytest.mark.ranks(2, timeout=2)
def test_hang(rank):
    if rank.index == 1:
        time.sleep(1000)
    step(1)


def test_last(rank):
    step(1)
    assert os.environ.get("TORCH_DISTRIBUTED_DEBUG", "") == os.environ["EXPECTED"]
"""
AGAIN = "run once more under TORCH_DISTRIBUTED_DEBUG=DETAIL, the collectives differ: "


def run_counted(run_session, folder, when):
    pytest.importorskip("torch")
    counted = folder / "counted.txt"
    session = run_session(
        {"test_mismatches.py": MISMATCHES},
        "-pno:randomly",
        env={
            "COUNTED": str(counted),
            "RANKS_COLLECTIVE_DEBUG": when,
            "EXPECTED": "DETAIL" if when == "always" else "",
        },
    )
    return session, counted.read_text().splitlines()


@pytest.fixture(scope="module")
def on_failure(run_session, tmp_path_factory):
    return run_counted(run_session, tmp_path_factory.mktemp("counted"), "on_failure")


def test_an_abort_of_an_innocent_rank_names_the_mismatch(on_failure):
    session, counted = on_failure
    row = session.call("test_another_shape")
    first, second, *_ = row.text.splitlines()
    assert re.fullmatch(r"rank \d of 2 failed first.*: died of SIGABRT without a report", first)
    mismatch = (
        r"rank 0 called all_reduce #2 of float32 \[8\], test_mismatches.py:\d+; "
        r"rank 1 called all_reduce #2 of float32 \[1\], test_mismatches.py:\d+"
    )
    assert re.fullmatch(AGAIN + mismatch, second), row.text
    assert counted.count("test_another_shape") == 2


def test_a_mismatch_that_the_recorder_tells_needs_no_second_run(on_failure):
    session, counted = on_failure
    row = session.call("test_another_shape_on_one_of_four")
    assert row.outcome == "failed"
    place = r"(?:step \()?test_mismatches.py:\d+\)?"
    mismatch = (
        rf"^.*: ranks 0, 1 and 3 called all_reduce #1 of float32 \[1\], {place}; "
        rf"rank 2 called all_reduce #1 of float32 \[8\], {place}$"
    )
    assert re.search(mismatch, row.text, re.MULTILINE), row.text
    assert counted.count("test_another_shape_on_one_of_four") == 1 + (AGAIN in row.text)


@pytest.mark.parametrize("name", ["test_sigkill", "test_assertion", "test_hang", "test_last"])
def test_other_tests_run_once(on_failure, name):
    session, counted = on_failure
    assert counted.count(name) == 1
    assert session.call(name).outcome == ("passed" if name == "test_last" else "failed")
    assert AGAIN not in session.call(name).text


def test_always_raises_on_every_rank_in_the_first_run(run_session, tmp_path):
    session, counted = run_counted(run_session, tmp_path, "always")
    for name in ("test_another_shape", "test_another_dtype"):
        assert "Detected mismatch between collectives on ranks" in session.call(name).text
    assert session.call("test_last").outcome == "passed"
    assert len(counted) == len(set(counted))


def test_never_leaves_it_at_the_first_run(run_session, tmp_path):
    session, counted = run_counted(run_session, tmp_path, "never")
    assert "run once more" not in session.call("test_another_shape").text
    assert len(counted) == len(set(counted))


def test_another_word_is_refused(run_session):
    session = run_session({"test_it.py": ""}, "--ranks-collective-debug=sometimes")
    assert session.returncode == 4
    assert (
        "--ranks-collective-debug: found 'sometimes', expected always, on_failure or never; "
        "write for example --ranks-collective-debug=never" in session.output
    )
