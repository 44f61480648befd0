from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_ranks.errors import BadInputError, RankFailure, RankTimeout

pytest.importorskip("torch")

SCRIPT = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
sys.stdout.write(f"rank {dist.get_rank()} total {int(total)} says {sys.argv[1]}\\n")
dist.destroy_process_group()
"""
FAIL = """
import os
if os.environ["RANK"] == "1":
    raise SystemExit("rank 1 gives up")
"""
MISUSED = """
import pytest

@pytest.mark.parametrize("size", [0, 2])
def test_function(launch, size):
    launch("nosuch:fn", world_size=size)

def test_script(launch):
    launch.script("train.py")
"""
HANG = """
sleep 1000 & echo $$ $! > $1/$RANK.part
mv $1/$RANK.part $1/$RANK.pids
sleep 1001
"""


def rank_and_argument(argument):
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size(), argument


def test_a_function_returns_its_results_by_rank(launch):
    assert launch(rank_and_argument, world_size=3, args=("x",)) == [(r, 3, "x") for r in range(3)]


def test_a_failure_names_the_rank(launch):
    def fail():
        import torch.distributed as dist

        assert dist.get_rank() != 1, "not on rank 1"

    with pytest.raises(RankFailure, match=re.escape("rank 1 of 2 failed first: AssertionError")):
        launch(fail)


def test_a_script_runs_under_torchrun(launch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = launch.script([script, "hello"], world_size=2, timeout=60)
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [f"rank {r} total 2 says hello" for r in (0, 1)]


def test_a_failing_script_raises_unless_told_otherwise(launch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAIL)
    with pytest.raises(RankFailure) as caught:
        launch.script([script], timeout=60)
    assert str(caught.value).startswith("the script failed with exit code 1: -m torch.distributed")
    assert "rank 1 gives up" in str(caught.value)
    result = launch.script([script], timeout=60, check=False)
    assert result.returncode == 1
    assert "rank 1 gives up" in result.stderr


def test_a_script_at_its_deadline_is_ended_with_its_whole_tree(launch, tmp_path):
    script = tmp_path / "hang.sh"
    script.write_text(HANG)
    with pytest.raises(RankTimeout, match=r"the script was still running after 12 s and was ended"):
        launch.script(["--no-python", "sh", script, tmp_path], timeout=12)
    pids = [int(pid) for file in tmp_path.glob("*.pids") for pid in file.read_text().split()]
    assert len(pids) == 4, "the ranks did not start before the deadline"
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)] == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"command": "train.py"},
            "command='train.py': expected a list of the script and its arguments, such as "
            "['train.py', '--steps', '3'].",
        ),
        ({"command": ["x.py", 3]}, "command=['x.py', 3]: 3 is no text; write '3'."),
        ({"cwd": "/no/such"}, "cwd='/no/such': there is no such folder."),
        (
            {"command": ["nosuch.py"], "cwd": "/"},
            "command=['nosuch.py']: there is no file 'nosuch.py' in '/'.",
        ),
    ],
)
def test_bad_scripts_get_one_sentence(launch, arguments, text):
    with pytest.raises(BadInputError) as caught:
        launch.script(**{"command": ["-m", "x"], **arguments})
    assert str(caught.value) == text


@pytest.mark.parametrize("start", ["function", "script"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"world_size": 0}, "world_size=0: expected a whole number of at least 1."),
        ({"world_size": True}, "world_size=True: expected a whole number of at least 1."),
        (
            {"world_size": 65},
            "world_size=65: expected at most 64 (default); allow more with "
            "--ranks-max-world-size=65.",
        ),
        ({"timeout": 0}, "timeout=0: expected a number of seconds above 0."),
        ({"timeout": "x"}, "timeout='x': expected a number of seconds above 0."),
        ({"timeout": float("inf")}, "timeout=inf: expected a number of seconds above 0."),
        (
            {"env": {"A": 1}},
            "env={'A': 1}: expected names and values as texts, such as {'A': '1'}.",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(launch, start, arguments, text):
    begin, what = (launch, "os:getpid") if start == "function" else (launch.script, ["-m", "x"])
    with pytest.raises(BadInputError) as caught:
        begin(what, **arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"args": 1}, "args=1: expected a tuple of arguments, such as (1,)."),
        ({"args": "ab"}, "args='ab': expected a tuple of arguments, such as ('ab',)."),
        ({"kwargs": [1]}, "kwargs=[1]: expected a dict of arguments by name."),
    ],
)
def test_bad_arguments_of_the_function_get_one_sentence(launch, arguments, text):
    with pytest.raises(BadInputError) as caught:
        launch(rank_and_argument, **arguments)
    assert str(caught.value) == text


class Unreadable:
    def __reduce__(self):
        return int, ("zzz",)


def test_a_result_that_cannot_be_read_is_named(launch):
    with pytest.raises(RankFailure) as caught:
        launch(Unreadable, world_size=1)
    assert str(caught.value) == (
        "the result of rank 0 cannot be unpickled in this process (ValueError: invalid literal "
        "for int() with base 10: 'zzz'): return plain data."
    )


def test_a_report_shows_no_code_of_ours(run_session):
    session = run_session({"test_it.py": MISUSED})
    assert session.returncode == 1
    assert "nosuch" in session.output
    assert "launch/functions.py" not in session.output
    assert "launch/host.py" not in session.output


BREAKPOINTS = """
import pdb
import pytest

def stop():
    breakpoint()

def trace():
    pdb.set_trace()

@pytest.mark.parametrize("function", [stop, trace])
def test_it(function, launch):
    launch(function, world_size=1)
"""


def test_a_breakpoint_in_a_function_is_a_sentence(run_session):
    session = run_session({"test_it.py": BREAKPOINTS})
    for name in ("stop", "trace"):
        assert (
            "rank 0 of 1 failed: UnavailableError: breakpoint() on rank 0: a function of the "
            "launch fixture has no terminal; the debugger works in a test with "
            "@pytest.mark.ranks, run with --ranks-debug=0"
        ) in session.call(f"test_it[{name}]").text.replace("pytest_ranks.errors.Unav", "Unav")


def test_torchrun_leaves_no_folder(launch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAIL)
    folder = tmp_path / "temporary"
    folder.mkdir()
    launch.script([script], timeout=60, check=False, env={"TMPDIR": str(folder)})
    assert list(folder.iterdir()) == []


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
