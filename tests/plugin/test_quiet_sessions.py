"""Sessions that have nothing to do with ranks, or next to nothing: they notice nothing of us."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDY = """
import pytest

@pytest.mark.gpu
def test_gpu(): pass

@pytest.mark.requires("pytest")
def test_package(): pass

def test_plain(): pass
"""
HEAVY = {"torch", "numpy", "transformers", "asyncio"}
# The plugin's own modules in a session without marks of ours; a new one has to earn its place.
AT_MOST = {
    "pytest_ranks",
    "pytest_ranks.errors",
    "pytest_ranks.fixtures",
    "pytest_ranks.hookspecs",
    "pytest_ranks.launch",
    "pytest_ranks.launch.scan",
    "pytest_ranks.marks",
    "pytest_ranks.option_table",
    "pytest_ranks.options",
    "pytest_ranks.plugin",
    "pytest_ranks.report",
    "pytest_ranks.report.terminal",
    "pytest_ranks.report.verdict",
}
LIST_MODULES_AT_THE_END = """
import sys
import pytest

@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    import atexit
    atexit.register(lambda: open("modules.txt", "w").write("\\n".join(sys.modules)))
"""


def run_and_list_modules(pytester, *arguments: str) -> set[str]:
    pytester.makeconftest(LIST_MODULES_AT_THE_END)
    assert pytester.runpytest_subprocess(*arguments).ret == 0
    return set((pytester.path / "modules.txt").read_text().split())


def test_a_session_without_our_marks_ends_with_nothing_heavy_loaded(pytester, monkeypatch) -> None:
    pytester.makepyfile("def test_plain(tmp_path, capsys): pass")
    with_us = run_and_list_modules(pytester)
    assert not with_us & HEAVY
    assert {name for name in with_us if name.startswith("pytest_ranks")} <= AT_MOST
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    without_us = run_and_list_modules(pytester)
    assert not {name for name in without_us if name.startswith("pytest_ranks")}
    new = {name for name in with_us - without_us if not name.startswith("pytest_ranks")}
    # 15 new modules were the budget; errors.py needs difflib, and that is all today.
    assert new <= {"difflib"}


def test_a_session_with_skipped_needs_loads_no_framework(pytester) -> None:
    pytester.makepyfile(NEEDY)
    assert (
        not run_and_list_modules(pytester, "--ranks-require=ranks", "-k", "plain", "--co") & HEAVY
    )
    assert not run_and_list_modules(pytester) & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--strict-markers", "--strict-config"),
        ("-W", "error"),
        ("-p", "no:cacheprovider"),
        ("-p", "no:terminal"),
        ("--collect-only",),
        ("--import-mode=importlib",),
        ("-p", "no:skipping"),
        ("-p", "no:capture"),
        ("--setup-only",),
        ("--junitxml=report.xml",),
    ],
    ids=" ".join,
)
def test_sessions_of_all_sorts_work(pytester, arguments: tuple[str, ...]) -> None:
    pytester.makepyfile(NEEDY)
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret == 0
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def test_a_read_only_project_works(pytester) -> None:
    if os.geteuid() == 0 and not Path("/proc/self/uid_map").exists():
        pytest.skip("needs a user that file modes bind, found root")
    pytester.makepyfile(test_it=NEEDY)
    pytester.path.chmod(0o555)
    try:
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--ranks-require=ranks")
    finally:
        pytester.path.chmod(0o755)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in result.stdout.str()
    assert [entry.name for entry in pytester.path.iterdir() if entry.suffix == ".xml"] == []


# An interpreter that cannot find torch: the import system is asked, and answers no.
WITHOUT_TORCH = """
from importlib.machinery import PathFinder

real = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name == "torch" else real(name, *rest)
)
"""


def run_without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(WITHOUT_TORCH)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--ranks-list-checks"], "--ranks-list-checks"),
        (["--ranks-self-check"], "--ranks-self-check"),
        (["--pyargs", "pytest_ranks.conformance"], "the conformance suites"),
    ],
)
def test_without_torch_the_suites_say_what_they_need(pytester, arguments, what) -> None:
    result = run_without_torch(pytester.path, *arguments)
    said = result.stdout + result.stderr
    text = f"{what}: needs torch, found none; install it with: pip install 'pytest-ranks[models]'"
    assert any(line.removeprefix("ERROR: ") == text for line in said.splitlines()), said
    assert "Traceback" not in said
    assert "INTERNALERROR" not in said
    assert result.returncode != 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--ranks-subject=nosuch.py:Mine", "subject 'nosuch.py:Mine': there is no Python file"),
        ("--ranks-suite=lss", "'lss' names no suite and no check. Did you mean 'loss'?"),
    ],
)
def test_a_misspelt_subject_or_suite_is_one_sentence(pytester, option, said) -> None:
    if importlib.util.find_spec("torch") is None:  # importing it here would be undone with pytester
        pytest.skip("needs torch")
    result = pytester.runpytest_subprocess("--pyargs", "pytest_ranks.conformance", option)
    lines = result.stdout.str().splitlines()
    assert any(line.startswith(said) for line in lines), lines
    assert not any("conftest.py" in line for line in lines)
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_without_torch_the_plugin_loads_and_ranks_tests_say_what_they_need(pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.ranks(2)
        def test_ranks(): pass

        def test_plain(): pass
        """,
    )
    result = run_without_torch(pytester.path, "-rs", "--ranks-require=ranks:2")
    lines = result.stdout.splitlines()
    reason = "needs torch, found none (pip install 'pytest-ranks[torch]')"
    assert any(
        line.startswith("SKIPPED [1] test_it.py") and line.endswith(reason) for line in lines
    )
    gate = f"ranks:2 is not met: 1 ranks test was selected, none ran: {reason}"
    assert f"--ranks-require: {gate}" in lines
    assert result.returncode == pytest.ExitCode.TESTS_FAILED


def test_the_plugin_can_be_switched_off(pytester, monkeypatch) -> None:
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.delenv("PYTEST_ADDOPTS")
    pytester.makepyfile("def test_plain(): pass")
    help_text = pytester.runpytest_subprocess("--help", "-p", "no:ranks").stdout.str()
    assert "--ranks-timeout" not in help_text
