"""Every bug planted by hand is killed by the tests that say they see it."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hand_mutants import MUTANTS, VARIABLE

HERE = Path(__file__).parent


def test_there_are_as_many_as_in_the_measurement():
    assert len(MUTANTS) == 24


@pytest.mark.parametrize("name", MUTANTS)
def test_is_killed(name, tmp_path):
    """Each of the tests fails in its call: one that cannot start has seen nothing."""
    mutant = MUTANTS[name]
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "hand_mutants", "-p", "no:cacheprovider"),
            *("-p", "no:randomly", "-q", "--tb=short", f"--junitxml={report}"),
            *(str(HERE / one) for one in mutant.killed_by),
        ],
        env={**os.environ, VARIABLE: name, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    cases = list(ET.parse(report).iter("testcase"))
    assert len(cases) == len(mutant.killed_by), done.stdout
    passed = [case.get("name") for case in cases if case.find("failure") is None]
    assert not passed, f"{mutant.summary} Not seen by {passed}.\n{done.stdout}"
