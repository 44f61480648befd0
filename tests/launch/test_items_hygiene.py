"""What tests leave behind in their ranks: seen, named, put back; or the ranks are replaced."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from launch.conftest import project
from pytest_ranks.launch.hygiene.living import Children

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_leaving.py": project("leaving")}, "-p", "no:randomly")


def test_every_test_finds_what_the_first_one_found(session):
    bad = [(row.id, row.text) for row in session.rows if row.outcome == "failed"]
    assert bad == [], session.output


PUT_BACK = "Put back after teardown (ranks 0 and 1)"
RETIRED = "Left behind after teardown (ranks 0 and 1)"
KEPT = {
    "environment": "environment LEFT='behind' (was unset)",
    "time_zone": "environment TZ='XYZ-5' (was unset)",
    "directory": "working directory '/' (was '{tmp}')",
    "removed_directory": "working directory 'one that was removed' (was '{tmp}')",
    "path": "sys.path has '/nowhere' (new)",
    "argv": "sys.argv has '--left' (new)",
    "umask": "umask 63 (was 18)",
    "recursion": "recursion limit 5000 (was 1000)",
    "gc": "garbage collection enabled: False (was True)",
    "gc_threshold": "thresholds of garbage collection (1, 10, 10) (was (700, 10, 10))",
    "signal": "signal SIGUSR1 is handled by SIG_IGN (was SIG_DFL)",
    "blocked": "blocked signals {<Signals.SIGUSR2: 12>} (was set())",
    "timer": "an interval timer still runs",
    "limit": "resource limit RLIMIT_NOFILE=(100, ",
    "cores": "CPU affinity {0} (was {0, 1",
    "locale": "locale ",
    "tempdir": "tempfile.tempdir '/nowhere' (was ",
    "sockets": "default timeout of sockets 3.0 (was None)",
    "print": "builtins.print was replaced by len",
    "sleep": "time.sleep was replaced by len",
    "root_logger": "logger 'root' has level DEBUG (was WARNING)\n"
    "logger 'root' has <NullHandler (NOTSET)> (new)",
    "logging_disable": "logging.disable 40 (was 0)",
    "logger_level": "logger 'mine' has level ERROR (was NOTSET)",
    "method": "start method of multiprocessing 'spawn' (was None)",
    "numpy": "numpy.seterr divide='raise' (was 'warn')",
    "dtype": "default dtype torch.float64 (was torch.float32)",
    "default_device": "default device 'meta' (was None)",
    "grad": "gradient mode False (was True)",
    "threads": "number of threads 3 (was 1)",
    "deterministic": "torch deterministic_algorithms=True (was False)",
    "cudnn": "torch cudnn.benchmark=True (was False)",
    "tf32": "precision of float32 matmul='high' (was 'highest')",
    "autocast": "autocast cpu=True (was False)\n"
    "autocast dtype on cpu=torch.float16 (was torch.bfloat16)",
    "anomaly": "anomaly detection (True, True) (was (False, True))",
    "denormal": "denormal numbers flushed: True (was False)",
    "patched": "torch.distributed.all_reduce was replaced by patched.<locals>.<lambda>",
    "debug": "debug level of torch.distributed <DebugLevel.DETAIL: 2> (was <DebugLevel.OFF: 0>)",
    "hook": "hook forward_hook.<locals>.<lambda> on all modules or optimizers (new)",
    "excepthook": "threading.excepthook was replaced by len",
    "dynamo_settings": "setting torch._dynamo.config.suppress_errors=True (was unset)",
    "dynamo_settings_again": "setting torch._dynamo.config.suppress_errors=True (was unset)",
    "registered": "CONFIG_MAPPING of transformers left_behind=registered.<locals>.Config (was unset)",
    "registered_again": "CONFIG_MAPPING of transformers left_behind=",
    "child": "1 child process 'sleep 1000' still runs",
    "daemon": "1 child process 'sleep 1001' still runs",
}
REPLACED = {
    "dict_config": "which it did not open, is closed",
    "thread": "1 thread 'prefetch' still runs",
    "file": "{tmp}/test_leaving.py is still open",
    "listening": "1 socket is still open",
    "inference": "inference mode True (was False)",
    "mode": "Spy was entered and not left",
}


def sections_of(session, what):
    row = session.call(f"test_leaves[{what}]")
    if row.outcome == "skipped":
        pytest.skip(row.text)
    row = session.of(f"test_leaves[{what}]")[-1]
    return {name: text for name, text in row.sections if "after teardown" in name}


def pid(session, what):
    return dict(session.call(f"test_leaves[{what}]").properties)["pid"]


def folder_of(session):
    return next(line.split()[-1] for line in session.output.splitlines() if "rootdir:" in line)


@pytest.mark.parametrize("what", KEPT)
def test_what_can_be_put_back_is_and_is_noted(session, what):
    if what == "cores" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("needs two cores")
    said = sections_of(session, what)
    assert list(said) == [PUT_BACK], said
    expected = KEPT[what].replace("{tmp}", folder_of(session))
    assert expected in said[PUT_BACK]
    names = [*KEPT, *REPLACED, "nothing"]
    assert pid(session, what) == pid(session, names[names.index(what) + 1])


@pytest.mark.parametrize("what", REPLACED)
def test_ranks_are_replaced_where_something_cannot_be_put_back(session, what):
    said = sections_of(session, what)
    assert RETIRED in said, said
    expected = REPLACED[what].replace("{tmp}", folder_of(session))
    assert expected in said[RETIRED]
    names = [*REPLACED, "nothing"]
    assert pid(session, what) != pid(session, names[names.index(what) + 1])
    line = f"test_leaving.py::test_leaves[{what}]: {said[RETIRED].splitlines()[0]} (ranks 0 and 1)"
    assert line in session.output


def test_the_summary_names_only_what_cost_ranks(session):
    summary = session.output.split("ranks: replaced after what a test left behind")[1]
    assert "[environment]" not in summary
    assert summary.count("test_leaving.py::test_leaves") == len(REPLACED)


def test_a_test_that_leaves_nothing_is_told_nothing(session):
    assert sections_of(session, "nothing") == {}


@pytest.fixture(scope="module")
def strict(run_session):
    arguments = ("-p", "no:randomly", "-o", "ranks_strict_hygiene=true")
    return run_session({"test_strict.py": project("strict_hygiene")}, *arguments)


FAILING = {
    "test_leaks": "test_leaks leaked on ranks 0 and 1: environment A='1' (was unset); "
    "1 thread 'prefetch' still runs",
    "test_leaks_on_one": "test_leaks_on_one leaked on rank 1: working directory '/' (was ",
    "test_leaks_unevenly": "test_leaks_unevenly leaked on rank 0: environment A='0' (was unset); "
    "on ranks 0 and 1: default dtype torch.float64 (was torch.float32); "
    "on rank 1: environment A='1' (was unset)",
    "test_leaks_where_failure_is_expected": "test_leaks_where_failure_is_expected leaked on "
    "ranks 0 and 1: environment A='1' (was unset)",
    "test_spoils_a_wide_fixture": "test_spoils_a_wide_fixture leaked on ranks 0 and 1: "
    "environment WIDE='2' (was '1')",
    "test_last": "test_last leaked on ranks 0 and 1: environment CARELESS='1' (was unset) (from "
    "the class fixture 'careless'); 1 child process 'sleep 1003' still runs (from the class "
    "fixture 'careless')",
}


@pytest.mark.parametrize("name", FAILING)
def test_strict_hygiene_fails_the_test_that_leaked(strict, name):
    row = next(row for row in strict.of(name) if row.outcome == "failed")
    # an expected failure stays one
    phase = "teardown" if name == "test_leaks_where_failure_is_expected" else "call"
    assert (row.when, row.outcome, row.wasxfail) == (phase, "failed", None)
    lines = row.text.splitlines()
    assert lines[0].startswith(FAILING[name])
    assert lines[1] == (
        "undo it in the test or in the teardown of its fixture (monkeypatch does), or set "
        "ranks_strict_hygiene=false: then what can be put back is, and else the ranks are replaced"
    )
    assert lines[2].startswith("reproduce: pytest 'test_strict.py::")


def test_a_failure_of_its_own_comes_before_a_leak(strict):
    row = strict.call("test_fails_and_leaks")
    assert row.text.splitlines()[0].endswith("ValueError: its own")
    last = strict.of("test_fails_and_leaks")[-1]
    assert [PUT_BACK, "environment A='1' (was unset)"] in last.sections


def test_strict_hygiene_fails_nothing_else(strict):
    bad = {row.id.rpartition("::")[2] for row in strict.rows if row.outcome == "failed"}
    assert bad == {*FAILING, "test_fails_and_leaks"}, strict.output


REUSED = """
import os, threading
import pytest

pytestmark = pytest.mark.ranks(2)


@pytest.fixture(autouse=True)
def noted(rank, record_property):
    assert "A" not in os.environ
    record_property("pid", os.getpid())


def test_fails():
    os.environ["A"] = "1"
    raise ValueError


def test_has_the_same_ranks():
    pass


def test_fails_and_leaves_a_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    raise ValueError


def test_has_others():
    pass
"""


def test_ranks_that_hold_something_are_replaced_also_where_failures_are_no_reason(run_session):
    arguments = ("-p", "no:randomly", "-o", "ranks_reuse_after_failure=true")
    session = run_session({"test_reused.py": REUSED}, *arguments)
    names = ("test_fails", "test_has_the_same_ranks", "test_fails_and_leaves_a_thread")
    pids = [dict(session.of(name)[1].properties)["pid"] for name in (*names, "test_has_others")]
    assert pids[0] == pids[1] == pids[2] != pids[3]


def test_children_are_ended_unheard_by_handlers():
    """torch's handler raises in a rank when a worker of a data loader is killed."""
    child = subprocess.Popen(["sleep", "1000"])
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
    try:
        assert Children().end({child.pid: "sleep"})
        assert heard == []
        assert child.wait() is not None
        subprocess.run(["true"], check=True)
        assert heard  # from here on it is told again
    finally:
        signal.signal(signal.SIGCHLD, before)
