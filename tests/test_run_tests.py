"""`python tests/run_tests.py`: what it runs, what it says, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import run_tests

SCRIPT = Path(run_tests.__file__)


def call(*arguments):
    """Run the script as a user does."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help_says_what_runs_and_how_it_ends():
    done = call("--help")
    assert done.returncode == 0
    assert "Run everything: all tests, then the performance comparisons" in done.stdout
    assert "The exit status is 0 if every part ended well, 1 if one did not, 2 if" in done.stdout
    assert "--only {tests,packing,launch}" in done.stdout


def test_everything_is_all_tests_then_the_comparisons():
    lines = call("--list").stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["tests", "packing", "launch"]
    python = sys.executable
    assert lines[0] == f"tests: {python} -m pytest -n 2 --dist loadfile"  # no -m: GPU tests too
    for line in lines[1:]:
        assert Path(line.split()[2]).is_file()


def test_a_run_that_passes():
    done = call("--only", "tests", "--", "-n0", "-q", "tests/test_compat_terminal.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed in" in done.stdout
    lines = done.stdout.splitlines()
    line, verdict, *_ = lines[lines.index("==== summary") + 1 :]
    assert line.split()[:2] == ["tests", "passed"]
    assert verdict == "PASSED: 1 of 1"


def test_a_part_that_fails_is_named_and_the_others_run(capfd):
    good, bad = (
        run_tests.Part(name=name, title=name, command=(sys.executable, "-c", code))
        for name, code in (("good", "print('ran')"), ("bad", "raise SystemExit(3)"))
    )
    results = run_tests.run([bad, good])
    assert "ran" in capfd.readouterr().out
    assert [result.status for result in results] == [3, 0]
    text = run_tests.summary(results)
    assert "bad      FAILED (exit status 3) " in text
    assert "good     passed  " in text
    assert text.endswith("\nFAILED: bad")


def test_no_test_that_matches_is_a_failure():
    done = call("--only", "tests", "--", "-n0", "-k", "no_such", "tests/test_compat_terminal.py")
    assert done.returncode == 1
    assert "\nFAILED: tests\n" in done.stdout


def test_what_is_not_installed_is_named_with_the_command(monkeypatch, capsys):
    assert run_tests.missing(run_tests.NEEDED) == []
    monkeypatch.setitem(run_tests.NEEDED, "no_such_module", "no-such-package")
    assert run_tests.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("needs no-such-package, found none. Install with\n  ")
    assert "[trainer]' no-such-package\n" in said
    assert said.endswith("pip install tox && tox -e test\n")


def test_what_tests_are_skipped_without_is_said(monkeypatch, capsys):
    monkeypatch.setattr(run_tests, "SKIPPED_WITHOUT", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(run_tests, "run", lambda parts: [])
    assert run_tests.main(["--only", "tests"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("tests that need no-such-package were skipped: not installed\n")
    assert run_tests.main(["--only", "packing"]) == 0
    assert "no-such-package" not in capsys.readouterr().out


def test_an_unknown_part_is_refused():
    done = call("--only", "benchmarks")
    assert done.returncode == 2
    assert "invalid choice: 'benchmarks'" in done.stderr
