"""The reference trainer goes on after a death as if there had been none: real ranks, killed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "recovery_session.py"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Run the tests on ranks in a session of their own; return its words by name of test."""
    folder = tmp_path_factory.mktemp("recovery")
    shutil.copy(SOURCE, folder / "test_recovery.py")
    (folder / "pytest.ini").write_text("[pytest]\n")
    arguments = ("-p", "no:cacheprovider", "-p", "no:randomly", "-rA", "--ranks-timeout=200")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "test_recovery.py"],
        cwd=folder,
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "RANKS_"))
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    words = re.findall(r"^([A-Z]+) test_recovery\.py::(\S+)", done.stdout, re.MULTILINE)
    assert words, done.stdout + done.stderr
    return {name: word for word, name in words}, done.stdout


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_spare_takes_over_and_ends_where_an_uninterrupted_run_does(reported, strategy, when):
    words, output = reported
    assert words[f"test_a_spare_takes_over[{when}-{strategy}]"] == "PASSED", output


def test_a_checkpoint_torn_by_a_death_is_not_taken_for_a_whole_one(reported):
    words, output = reported
    assert words["test_a_torn_checkpoint_is_not_taken_for_a_whole_one"] == "PASSED", output


def test_a_new_world_resumes_after_a_death_inside_a_collective(reported):
    words, output = reported
    assert words["test_a_new_world_resumes"] == "PASSED", output


def test_there_is_no_other_test_in_the_session(reported):
    assert len(reported[0]) == 6
