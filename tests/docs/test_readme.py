"""The README's files are written, its commands run, and its outputs compared line by line."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"<!-- output: pytest (.*?) -->\n```text\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(pytester, monkeypatch):
    """Return a folder with all of the README's files."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    for name, text in FILE.findall(README.read_text()):
        (pytester.path / name).write_text(text)
    return pytester


def pattern(line):
    """Return a shown line as a pattern: `...` stands for anything."""
    escaped = re.sub(r"([\[\]?*])", r"[\1]", line)
    return escaped.replace("...", "*")


@pytest.mark.parametrize(("arguments", "shown"), OUTPUT.findall(README.read_text()))
def test_an_output_of_the_readme_is_what_the_command_prints(folder, arguments, shown):
    result = folder.runpytest_subprocess("-p", "no:randomly", *shlex.split(arguments))
    printed = iter(result.outlines)
    for line in shown.rstrip().splitlines():
        assert any(fnmatch.fnmatchcase(found, pattern(line)) for found in printed), (
            f"the README shows, but the command did not print, after the lines before it: {line!r}"
        )


def test_the_decorated_test_of_the_readme_passes(folder):
    result = folder.runpytest_subprocess("-p", "no:randomly", "test_conformance.py")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["PASSED: verified 2 of 2 claims in 1 setting"])


def test_the_subject_of_the_readme_is_short():
    text = dict(FILE.findall(README.read_text()))["mytrainer.py"]
    body = text[text.index("class MyTrainer") :]
    assert len(body.rstrip().splitlines()) <= 20


def test_every_option_of_the_plugin_is_in_the_readme():
    from pytest_ranks.option_table import TABLE

    text = README.read_text()
    assert [row.option for row in TABLE if row.flag and row.option not in text] == []


def test_the_commands_of_the_readme_name_environments_that_exist():
    tox = (README.parent / "tox.ini").read_text()
    for name in re.findall(r"tox -e (\S+)", README.read_text()):
        assert f"[testenv:{name}]" in tox


def test_the_readme_names_no_option_and_no_argument_of_the_mark_that_there_is_not():
    import inspect

    from pytest_ranks.launch.spec import ranks
    from pytest_ranks.option_table import TABLE

    text = README.read_text()
    known = {row.option for row in TABLE if row.flag}
    assert set(re.findall(r"--ranks-[a-z-]+", text)) <= known
    (line,) = [line for line in text.splitlines() if line.startswith("| ... `timeout=`")]
    assert set(re.findall(r"`(\w+)=`", line)) <= set(inspect.signature(ranks).parameters)
