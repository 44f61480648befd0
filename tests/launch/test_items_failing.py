"""Ranks that raise, die, hang or disagree: what the one report of the item says."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")

FAILURES = """
import os, signal, subprocess, sys, time
import pytest, torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2)


def wait_for_all():
    dist.all_reduce(torch.ones(1))


def test_before(rank):
    wait_for_all()


def test_raises_on_one(rank):
    print("printed by", rank.index)
    print("printed by both")
    if rank.index == 1:
        raise ValueError("boom")
    wait_for_all()


@pytest.mark.ranks(4)
def test_four_ranks(rank):
    group = dist.group.WORLD  # a reference that survives the failure
    if rank.index == 2:
        assert rank.index == 3
    wait_for_all()


def test_sigkill(rank):
    print("last words")
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()


def test_after_sigkill(rank):
    wait_for_all()


def test_exit_code(rank):
    if rank.index == 1:
        os._exit(7)
    wait_for_all()


def test_fatal_error(rank):
    if rank.index == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    wait_for_all()


def test_keyboard_interrupt(rank):
    if rank.index == 1:
        raise KeyboardInterrupt


@pytest.mark.ranks(2, timeout=1)
def test_hang(rank):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as trainers do
    if rank.index == 1:
        time.sleep(1000)
    wait_for_all()


def test_after_hang(rank):
    wait_for_all()


@pytest.mark.ranks([2, 3])
def test_collective_left_out(rank):
    if rank.index == 0:
        wait_for_all()


def test_collective_of_another_shape(rank):
    dist.all_reduce(torch.ones(8 if rank.index == 0 else 1))


def test_skipped_on_one(rank):
    if rank.index == 1:
        pytest.skip("only here")


def test_skipped_while_the_other_waits(rank):
    if rank.index == 1:
        pytest.skip("only here")
    wait_for_all()


@pytest.mark.xfail
def test_expected_on_one_alone(rank):
    assert rank.index == 0


@pytest.mark.xfail(strict=True)
def test_strictly_expected_on_one_alone(rank):
    assert rank.index == 0


def test_a_fixture_that_does_not_exist(rank, nosuch):
    pass


@pytest.fixture
def setup_on_one(rank):
    if rank.index == 1:
        raise RuntimeError("in setup")


def test_setup_error_on_one(setup_on_one):
    wait_for_all()


@pytest.fixture
def teardown_on_one(rank):
    yield
    if rank.index == 1:
        raise RuntimeError("in teardown")


def test_teardown_error_on_one(teardown_on_one):
    wait_for_all()


def test_grandchild_holds_the_channel(rank):
    if rank.index == 1:
        subprocess.Popen(["sleep", "1000"], close_fds=False)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()


def test_failures_differ(rank):
    dist.barrier()
    assert rank.index == 5, f"said by {rank.index}"


def test_ids_differ(other_on_ranks):
    pass


def pytest_generate_tests(metafunc):
    if "other_on_ranks" in metafunc.fixturenames:
        metafunc.parametrize("other_on_ranks", [os.getpid()])


@pytest.mark.ranks(0)
def test_bad_mark():
    raise AssertionError


@pytest.mark.ranks(2, foo=1)
def test_bad_argument():
    raise AssertionError


@pytest.mark.ranks(1000)
def test_too_many():
    raise AssertionError


def test_last(rank):
    wait_for_all()
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_bad.py": FAILURES}, "-p", "no:randomly")


@pytest.mark.parametrize(
    "name", ["test_before", "test_after_sigkill", "test_after_hang", "test_last"]
)
def test_the_next_test_runs(session, name):
    assert session.call(name).outcome == "passed"


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        (
            "test_raises_on_one",
            r"rank 1 of 2 failed first \(rank 0 was cut off in all_reduce\): ValueError: boom",
        ),
        (
            "test_four_ranks",
            r"rank 2 of 4 failed first \(ranks 0, 1 and 3 were cut off in all_reduce\): "
            r"assert 2 == 3",
        ),
        (
            "test_sigkill",
            r"rank 1 of 2 failed first \(rank 0 was cut off in all_reduce\): "
            r"died of SIGKILL without a report",
        ),
        (
            "test_exit_code",
            r"rank 1 of 2 failed first \(rank 0 was cut off in all_reduce\): "
            r"exited with code 7 without a report",
        ),
        (
            "test_fatal_error",
            r"rank 0 of 2 failed first \(rank 1 was cut off in all_reduce\): "
            r"died of SIGSEGV without a report",
        ),
        ("test_keyboard_interrupt", r"rank 1 of 2 failed first: KeyboardInterrupt"),
        (
            "test_hang",
            r"timed out after 1 s: rank 0 was in all_reduce, called from wait_for_all "
            r"\(test_bad.py:\d+\); rank 1 was in test_hang \(test_bad.py:\d+\)",
        ),
        (
            "test_collective_left_out[ws=2]",
            r"rank 0 was in all_reduce, called from wait_for_all \(test_bad.py:\d+\), "
            r"waiting for rank 1 that had finished",
        ),
        (
            "test_collective_left_out[ws=3]",
            r"rank 0 was in all_reduce, called from wait_for_all \(test_bad.py:\d+\), "
            r"waiting for ranks 1 and 2 that had finished",
        ),
        (
            "test_collective_of_another_shape",
            r"rank [01] of 2 failed first.*: died of SIGABRT without a report",
        ),
        ("test_skipped_on_one", r"the ranks disagree: rank 0 passed, rank 1 skipped"),
        (
            "test_skipped_while_the_other_waits",
            r"the ranks disagree: rank 0 was cut off in all_reduce, rank 1 skipped",
        ),
        ("test_expected_on_one_alone", r"the ranks disagree: rank 0 xpassed, rank 1 xfailed"),
        (
            "test_strictly_expected_on_one_alone",
            r"the ranks disagree: rank 0 xpassed \(strict\), rank 1 xfailed",
        ),
        (
            "test_a_fixture_that_does_not_exist",
            r"rank \d of 2 failed first \(rank \d failed the same way\): "
            r"fixture 'nosuch' not found",
        ),
        (
            "test_setup_error_on_one",
            r"rank 1 of 2 failed first \(rank 0 was cut off in all_reduce\): "
            r"RuntimeError: in setup",
        ),
        ("test_teardown_error_on_one", r"rank 1 of 2 failed first: RuntimeError: in teardown"),
        (
            "test_grandchild_holds_the_channel",
            r"rank 1 of 2 failed first \(rank 0 was cut off in all_reduce\): "
            r"died of SIGKILL without a report",
        ),
        (
            "test_failures_differ",
            r"rank \d of 2 failed first \(rank \d failed too\): AssertionError: said by \d",
        ),
    ],
)
def test_the_first_line_names_rank_and_place(session, name, headline):
    row = session.call(name)
    assert row.outcome == "failed"
    first, *rest = row.text.splitlines()
    assert re.fullmatch(headline, first), row.text
    assert rest[-1] == f"reproduce: pytest 'test_bad.py::{name}'"


def test_phases_are_those_of_pytest(session):
    assert session.call("test_setup_error_on_one").when == "setup"
    teardown = [row.when for row in session.of("test_teardown_error_on_one") if row.text]
    assert teardown == ["teardown"]


def test_all_stacks_are_in_the_report_of_a_hang(session):
    text = session.call("test_hang").text
    assert re.search(r"stacks of rank 0:\n.*in all_reduce\n.*in wait_for_all\n", text, re.DOTALL)
    assert re.search(r"stacks of rank 1:\n[^\n]*\n[^\n]*in test_hang\n", text)
    assert "_pytest" not in text


def test_a_fatal_error_shows_its_stack(session):
    text = session.call("test_fatal_error").text
    assert "Fatal Python error: Segmentation fault" in text
    assert "in test_fatal_error" in text
    assert "Extension modules" not in text


def test_a_gloo_abort_is_explained(session):
    row = session.call("test_collective_of_another_shape")
    assert "hint: gloo aborts a rank that receives more than it asked for" in row.text
    assert any("op.preamble.length" in text for _, text in row.sections)


def test_each_rank_has_its_own_output(session):
    sections = dict(session.call("test_raises_on_one").sections)
    assert sections["Captured stdout call (rank 0)"] == "printed by 0\nprinted by both\n"
    assert sections["Captured stdout call (rank 1)"] == "printed by 1\nprinted by both\n"


def test_torch_adds_no_records_of_its_own(session):
    texts = [text for row in session.rows for _, text in row.sections]
    assert not any("c10d" in text for text in texts)


def test_the_last_words_of_a_dead_rank_are_kept(session):
    sections = session.call("test_sigkill").sections
    assert ["Captured output (rank 1)", "last words"] in sections


def test_an_id_that_ranks_do_not_find_is_an_error(session):
    (row,) = [row for row in session.rows if "test_ids_differ" in row.id and row.text]
    assert row.outcome == "failed"
    assert "the ranks collected no test of this id" in row.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_bad_mark", "world size 0, expected a whole number of at least 1."),
        ("test_bad_argument", "unknown argument 'foo', expected one of dp, tp, pp,"),
        ("test_too_many", "world size 1000, expected at most 64"),
    ],
)
def test_a_bad_mark_is_one_sentence_and_the_others_go_on(session, name, said):
    row = session.call(name)
    assert row.outcome == "failed"
    assert len(row.text.splitlines()) == 1
    assert said in row.text
    assert f"test_bad.py::{name}" in row.text
    assert "=None" not in row.text
