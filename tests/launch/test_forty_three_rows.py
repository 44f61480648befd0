"""One test for each feature that a survey of ten harnesses for tests on ranks lists.

`docs/explanation/other_harnesses.md` has the table; its last column links to these tests, and
`tests/docs/test_other_harnesses.py` holds that no row is without one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.conftest import project
from pytest_ranks.launch.processes import descendants

pytest.importorskip("torch")


SECOND = """
import os
import pytest


class TestElsewhere:
    @pytest.mark.ranks(2)
    def test_same_ranks_again(self, rank, record_property):
        record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))

    @pytest.mark.ranks(3)
    def test_other_size(self, rank, record_property):
        record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))
"""


@dataclass(frozen=True)
class Ran:
    """The session, with what it wrote for CI."""

    session: object
    junit: ElementTree.Element

    def properties(self, name: str) -> dict[str, object]:
        return dict(self.session.of(name)[-2].properties)

    def text(self, name: str) -> str:
        return self.session.call(name).text

    def outcome(self, name: str) -> str:
        return self.session.call(name).outcome


@pytest.fixture(scope="module")
def ran(run_session, tmp_path_factory) -> Ran:
    junit = tmp_path_factory.mktemp("junit") / "junit.xml"
    session = run_session(
        {"test_first.py": project("forty_three_rows"), "test_second.py": SECOND},
        "-p",
        "no:randomly",
        "-p",
        "no:rerunfailures",
        f"--junitxml={junit}",
    )
    return Ran(session, ElementTree.parse(junit).getroot())


def test_row_01_plain_test_functions(ran: Ran) -> None:
    assert ran.outcome("test_plain_function") == "passed"
    assert ran.properties("test_plain_function")["total"] == 2.0


def test_row_02_one_call_runs_cpu_and_distributed_tests(ran: Ran) -> None:
    assert ran.outcome("test_on_cpu_alone") == "passed"
    assert ran.outcome("test_plain_function") == "passed"
    assert ran.session.output.count("test session starts") == 1


def test_row_03_installable_independent_of_a_framework() -> None:
    needed = importlib.metadata.requires("pytest-ranks") or []
    without_extras = [name for name in needed if "extra ==" not in name]
    assert [name.partition(">")[0] for name in without_extras] == ["pytest"]
    points = importlib.metadata.entry_points(group="pytest11")
    assert "pytest_ranks.plugin" in [point.value for point in points]


def test_row_04_the_real_item_executes_in_the_rank(ran: Ran) -> None:
    found = ran.properties("test_the_item_itself")
    kind, node_id, pid = found["item"].split()
    assert (kind, node_id) == ("Function", "test_first.py::test_the_item_itself")
    assert found["item (rank 1)"].split()[:2] == [kind, node_id]
    assert found["item (rank 1)"].split()[2] != pid


def test_row_05_fixtures_on_ranks(ran: Ran) -> None:
    assert ran.outcome("test_fixtures") == "passed"
    events = [
        value
        for name, value in dict(ran.session.of("test_fixtures")[-2].properties).items()
        if name.startswith("events")
    ]
    assert set(events) == {"up body down"}


def test_row_06_what_cannot_be_pickled(ran: Ran) -> None:
    assert ran.outcome("test_what_no_pickle_carries") == "passed"


def test_row_07_parametrize(ran: Ran) -> None:
    found = {
        name: ran.properties(f"test_parameters[{name}]")["parameters"]
        for name in ("a-1", "a-2", "b-1", "b-2")
    }
    assert found == {"a-1": "1a", "a-2": "2a", "b-1": "1b", "b-2": "2b"}


def test_row_08_a_list_of_world_sizes_gives_an_item_each(ran: Ran) -> None:
    sizes = [ran.properties(f"test_world_sizes[ws={n}]")["size"] for n in (1, 2, 3)]
    assert sizes == [1, 2, 3]


def test_row_09_layouts_from_test_arguments(ran: Ran) -> None:
    assert ran.properties("test_layout[1-2]")["mesh"] == "1x2"
    assert ran.properties("test_layout[2-1]")["mesh"] == "2x1"


def test_row_10_assertions_explain_themselves(ran: Ran) -> None:
    assert "assert {'loss': 3.0} == {'loss': 2.0}" in ran.text("test_assertion_explains")


def test_row_11_ranks_serve_many_tests(ran: Ran) -> None:
    pids = [ran.properties(f"test_same_ranks[{turn}]")["pids"] for turn in range(3)]
    assert len(set(pids)) == 1


def test_row_12_reuse_across_files_keyed_by_size(ran: Ran) -> None:
    before = ran.properties("test_last_of_the_file")["pids"].split()
    after = ran.properties("test_same_ranks_again")["pids"].split()
    other = ran.properties("test_other_size")["pids"].split()
    assert before == after
    assert len(other) == 3
    assert not set(other) & set(after)


def test_row_13_a_pool_is_replaced_after_a_failing_test(ran: Ran) -> None:
    failed = dict(ran.session.call("test_fails_then_is_replaced").properties)["pids"]
    assert ran.outcome("test_fails_then_is_replaced") == "failed"
    after = ran.properties("test_after_the_failure")["pids"]
    assert ran.outcome("test_after_the_failure") == "passed"
    assert not set(failed.split()) & set(after.split())


def test_row_14_wide_fixtures_live_on_the_ranks(ran: Ran) -> None:
    assert ran.outcome("test_module_fixture[1]") == "passed"
    assert ran.outcome("test_module_fixture[2]") == "passed"


def test_row_15_every_failing_rank_is_in_the_report(ran: Ran) -> None:
    text = ran.text("test_each_rank_fails_its_own_way")
    assert re.search(r"^E +ValueError: of rank zero$", text, re.MULTILINE)
    assert re.search(r"^E +KeyError: 'of rank one'$", text, re.MULTILINE)


def test_row_16_the_root_cause_is_told_from_its_victims(ran: Ran) -> None:
    first = ran.text("test_root_cause").splitlines()[0]
    assert first.startswith("rank 1 of 3 failed first")
    assert first.endswith("ValueError: the cause")


def test_row_17_a_skip_masks_nothing(ran: Ran) -> None:
    skipped = ran.session.call("test_skip_on_all")
    assert (skipped.outcome, "no tokenizer" in skipped.text) == ("skipped", True)
    assert ran.outcome("test_skip_masks_nothing") == "failed"


def test_row_18_failures_that_are_no_exceptions(ran: Ran) -> None:
    assert "DID NOT RAISE" in ran.text("test_did_not_raise").splitlines()[0]
    assert "said by pytest.fail" in ran.text("test_pytest_fail").splitlines()[0]


def test_row_19_a_crash_of_any_rank_fails_the_test(ran: Ran) -> None:
    assert ran.outcome("test_crash") == "failed"
    assert ran.outcome("test_silent_exit") == "failed"
    assert "exited with code 0 without a report" in ran.text("test_silent_exit")


def test_row_20_a_crash_names_rank_and_signal(ran: Ran) -> None:
    assert "rank 1 of 2 failed first" in ran.text("test_crash").splitlines()[0]
    assert "died of SIGSEGV" in ran.text("test_crash").splitlines()[0]


def test_row_21_each_test_has_a_deadline(ran: Ran) -> None:
    assert ran.text("test_hang").startswith("timed out after 1 s: ")


def test_row_22_a_timeout_shows_the_stacks_of_all_ranks(ran: Ran) -> None:
    text = ran.text("test_hang")
    assert "stacks of rank 0" in text
    assert "stacks of rank 1" in text
    assert "in wait_for_all" in text
    assert "in test_hang" in text


def test_row_23_stacks_are_in_junit(ran: Ran) -> None:
    (case,) = [one for one in ran.junit.iter("testcase") if one.get("name") == "test_hang"]
    (failure,) = case.findall("failure")
    assert "stacks of rank 0" in (failure.text or "")
    assert "stacks of rank 1" in (failure.text or "")


def test_row_24_a_hang_does_not_end_the_session(ran: Ran) -> None:
    assert ran.outcome("test_after_the_hang") == "passed"


def test_row_25_survivors_are_ended_with_all_below_them(ran: Ran) -> None:
    assert ran.outcome("test_hang") == "failed"
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert not [line for line in lines.stdout.splitlines() if line.endswith("of-the-rows")]


def test_row_26_ranks_die_with_a_killed_pytest(start_session, tmp_path: Path) -> None:
    session = start_session(
        """
        import os, pathlib, time, pytest

        @pytest.mark.ranks(2)
        def test_waits(rank):
            rank.barrier()
            pathlib.Path(os.environ["RECORDED"] + str(rank.index)).touch()
            time.sleep(1000)
        """.replace("\n        ", "\n")
    )
    started = [tmp_path / f"reports.jsonl{rank}" for rank in range(2)]
    await_true(lambda: all(path.exists() for path in started))
    below = [os.pidfd_open(pid) for pid in descendants(session.pid)]
    assert len(below) >= 3
    session.send_signal(signal.SIGKILL)
    session.wait()
    await_true(lambda: all(has_ended(pidfd) for pidfd in below))
    for pidfd in below:
        os.close(pidfd)


def has_ended(pidfd: int) -> bool:
    from pytest_ranks.launch import processes

    return processes.has_ended(pidfd)


def await_true(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_row_27_no_port_is_guessed(ran: Ran) -> None:
    port = int(ran.properties("test_no_port_is_guessed")["port"])
    least, most = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert least <= port <= most  # the kernel chose it


def test_row_28_xdist(run_session) -> None:
    pytest.importorskip("xdist")
    session = run_session({"test_second.py": SECOND}, "-n", "2", "-p", "no:rerunfailures")
    assert session.returncode == 0, session.output
    assert {row.outcome for row in session.rows} == {"passed"}


def test_row_32_output_of_each_rank_is_in_the_report(ran: Ran) -> None:
    sections = dict(ran.session.call("test_output").sections)
    assert sections["Captured stdout call (rank 0)"] == "spoken by 0\n"
    assert sections["Captured stdout call (rank 1)"] == "spoken by 1\n"


def test_row_35_values_of_all_ranks_in_one_assertion(ran: Ran) -> None:
    assert ran.outcome("test_gathers") == "passed"


def test_row_36_results_of_each_rank_reach_the_caller(ran: Ran) -> None:
    assert ran.outcome("test_results_of_ranks") == "passed"


def test_row_38_required_hardware_has_to_run(run_session) -> None:
    session = run_session(
        {"test_gpu.py": "import pytest\n@pytest.mark.gpu(99)\ndef test_gpu(): pass\n"},
        "--ranks-require=gpu:1",
    )
    assert session.returncode == 1
    assert {row.outcome for row in session.rows} <= {"passed", "skipped"}
