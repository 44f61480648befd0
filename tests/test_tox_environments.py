"""Each environment of tox.ini selects what its name says: pytest is asked, for all of them in one process."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOW = {"-n": 2, "--dist": 2, "-p": 2, "-x": 1, "-v": 1}
"""Options that say how to run and not what, with the words that they take."""

COLLECT = """
import contextlib, io, json, sys
import pytest


class Chosen:
    def __init__(self):
        self.left_out = []

    def pytest_deselected(self, items):
        self.left_out += [item.nodeid for item in items]

    def pytest_collection_finish(self, session):
        self.ids = sorted(item.nodeid for item in session.items)


# The second session finds test files and conftests imported, and says so.
quiet = ["--collect-only", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    chosen, output = Chosen(), io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main([*arguments, *quiet], [chosen])
    found[name] = {"status": int(status), "output": output.getvalue()[-2000:]}
    found[name] |= {"ids": chosen.ids, "left_out": chosen.left_out}
json.dump(found, open(sys.argv[2], "w"))
"""


def sections():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


def pytest_arguments(commands):
    """Return the arguments of the one pytest command among an environment's, without how to run it."""
    (line,) = [
        line for line in commands.splitlines() if re.match(r"(coverage run -m )?pytest\b", line)
    ]
    words = shlex.split(line.replace("{posargs}", ""))
    words = words[words.index("pytest") + 1 :]
    skipped = {
        place + offset for place, word in enumerate(words) for offset in range(HOW.get(word, 0))
    }
    return [
        word
        for place, word in enumerate(words)
        if place not in skipped and not word.startswith("--ranks-require")
    ]


def environments():
    """Return the pytest arguments of each environment that runs this repository's tests."""
    parser = sections()
    names = [name.partition(":")[2] for name in parser.sections() if ":" in name]
    names = [name for name in names if name.startswith(("test", "gpu", "diagnostic"))]
    default = parser["testenv"]["commands"]
    return {
        name: pytest_arguments(parser[f"testenv:{name}"].get("commands", default)) for name in names
    }


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Return the ids that each environment selects; under "" those of everything."""
    target = tmp_path_factory.mktemp("tox") / "chosen.json"
    wanted = environments()
    different = {json.dumps(arguments): arguments for arguments in wanted.values()}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps(different), str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    by_arguments = json.loads(target.read_text())
    found = {name: by_arguments[json.dumps(arguments)] for name, arguments in wanted.items()}
    for name, one in found.items():
        assert one["status"] == 0, f"{name}: {one['output']}"
        assert one["ids"], f"tox -e {name} selects no test"
    everything = {*found["test"]["ids"], *found["test"]["left_out"]}
    return {name: {*one["ids"]} for name, one in found.items()} | {"": everything}


def test_the_environments_are_those_that_are_known():
    names = ["test", "test-verbose", "test-quick", "test-coverage", "diagnostic"]
    gpu = ["gpu", "gpu-tests", "gpu-single", "gpu-multi", "gpu-overfitting"]
    assert [*environments()] == names + gpu


def test_every_test_is_in_the_one_for_cpus_or_in_the_one_for_gpus(chosen):
    assert chosen["test"] | chosen["gpu"] == chosen[""]
    assert not chosen["test"] & chosen["gpu"]
    assert chosen["test-verbose"] == chosen["test-coverage"] == chosen["test"]


def test_the_quick_ones_start_no_ranks(chosen):
    assert chosen["test-quick"] < chosen["test"]
    files = {one.partition("::")[0] for one in chosen["test-quick"]}
    assert "tests/launch/test_spec.py" in files
    assert not [file for file in files if "_on_ranks" in file or "test_items" in file]


def test_the_environments_for_gpus_divide_their_folder(chosen):
    folder = {one for one in chosen[""] if one.startswith("tests/gpu_tests/")}
    assert chosen["gpu-tests"] == chosen["gpu"] == folder
    assert chosen["gpu-single"] | chosen["gpu-multi"] == folder
    assert not chosen["gpu-single"] & chosen["gpu-multi"]
    for name, one, other in (
        ("gpu-single", "TestSingleGPUTraining", "TestMultiGPUTraining"),
        ("gpu-multi", "TestMultiGPUTraining", "TestSingleGPUTraining"),
    ):
        assert [one for found in chosen[name] if f"::{one}::" in found]
        assert not [found for found in chosen[name] if f"::{other}::" in found]


def test_overfitting_is_that_of_every_file(chosen):
    every = {one for one in chosen["gpu-tests"] if "overfitting" in one.lower()}
    assert chosen["gpu-overfitting"] == every
    files = {one.partition("::")[0].rpartition("/")[2] for one in every}
    assert files == {"test_overfitting.py", "test_suites_on_gpu.py"}


def test_the_diagnosis_is_one_file(chosen):
    assert {one.partition("::")[0] for one in chosen["diagnostic"]} == {"tests/test_diagnostic.py"}
    assert len([one for one in chosen["diagnostic"] if "::test_diagnostic[" in one]) >= 20


def test_an_environment_for_gpus_fails_where_nothing_ran_and_hides_no_device():
    parser = sections()
    for name in parser.sections():
        if name.startswith("testenv:gpu"):
            needs = "multi_gpu:2" if name.endswith("multi") else "gpu:1"
            assert f"--ranks-require={needs} " in parser[name]["commands"]
            assert "set_env" not in parser[name]
    assert "CUDA_VISIBLE_DEVICES" in parser["testenv"]["pass_env"].split()
    assert "CUDA_VISIBLE_DEVICES" not in parser["testenv"]["set_env"]


def test_coverage_measures_branches_and_has_a_limit():
    *_, report = sections()["testenv:test-coverage"]["commands"].splitlines()
    assert "--fail-under=95" in report
    assert "branch = true" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
