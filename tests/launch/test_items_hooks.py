"""Which hooks of a user's conftest run in which process, as the documentation's table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.conftest import RECORDER

pytest.importorskip("torch")

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "which_hooks_run_where.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", re.MULTILINE)
TABLE = {name: cells for name, *cells in ROW.findall(PAGE.read_text())}
NOT_HOOKS = {"import_of_conftest", "fixture", "fixture_finalizer", "addfinalizer"}

CONFTEST = """
import os, warnings
import pytest

os.environ.setdefault("CONTROLLER", str(os.getpid()))


def note(name):
    is_controller = os.environ["CONTROLLER"] == str(os.getpid())
    where = "rank" if "RANK" in os.environ else "controller" if is_controller else "zygote"
    with open(os.environ["RECORDED"] + ".hooks", "a") as file:
        file.write(f"{name} {where}\\n")


note("import_of_conftest")


@pytest.fixture(autouse=True)
def everywhere(request):
    note("fixture")
    request.addfinalizer(lambda: note("addfinalizer"))
    yield
    note("fixture_finalizer")
"""
HOOK = """

def {name}():
    note({name!r})
"""
FILE = """
import warnings
import pytest

@pytest.mark.ranks(2)
@pytest.mark.parametrize("number", [1])
def test_it(rank, number):
    warnings.warn("said", UserWarning)
    assert [number] == [rank.index]
"""


# A fork of a process with threads is not safe, so the zygote of this session is a fresh process.
STARTS_THREAD = """
import os, threading, time

if os.environ.setdefault("FIRST", str(os.getpid())) == str(os.getpid()):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
"""


@pytest.fixture(scope="module", params=["fork", "fresh"])
def ran(request, run_session, tmp_path_factory):
    """Return the kind of start, and where each hook has run."""
    arguments = ["-p", "no:randomly", "-p", "no:rerunfailures"]
    if request.param == "fresh":
        arguments += ["-p", "starts_thread"]
    hooks = "".join(HOOK.format(name=name) for name in TABLE if name not in NOT_HOOKS)
    recorder = RECORDER.replace("pytest_runtest_logreport(", "recorder_(")
    files = {
        "conftest.py": recorder + CONFTEST + hooks,
        "starts_thread.py": STARTS_THREAD,
        "test_it.py": FILE,
    }
    recorded = tmp_path_factory.mktemp("hooks") / "recorded"
    session = run_session(files, *arguments, env={"RECORDED": str(recorded)})
    assert session.returncode == 1, session.output
    found: dict[str, set[str]] = {}
    for line in Path(f"{recorded}.hooks").read_text().splitlines():
        name, where = line.split()
        found.setdefault(name, set()).add(where)
    return request.param, found


def test_each_hook_runs_where_the_table_says(ran):
    kind, found = ran
    wrong = []
    for name, (controller, forked, fresh, rank) in TABLE.items():
        zygote = forked if kind == "fork" else fresh
        expected = {
            where
            for where, word in (("controller", controller), ("zygote", zygote), ("rank", rank))
            if word == "yes"
        }
        if found.get(name, set()) != expected:
            wrong.append(f"{name}: ran in {found.get(name)}, the table says {expected}")
    assert not wrong, "\n".join(wrong)


def test_the_table_is_read():
    assert len(TABLE) > 20
    assert {word for cells in TABLE.values() for word in cells} == {"yes", "no"}
