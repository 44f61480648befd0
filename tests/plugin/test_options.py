from __future__ import annotations

import pytest

from pytest_ranks import option_table, options

SHOW = """
from pytest_ranks.options import settings

def test_show(request):
    chosen = settings(request.config)
    print("value", chosen.timeout, "source", chosen.source("timeout"))
"""


@pytest.fixture
def run(pytester):
    pytester.makepyfile(SHOW)
    return lambda *arguments: pytester.runpytest("-s", *arguments)


def test_the_order_is_command_line_environment_ini_default(run, pytester, monkeypatch) -> None:
    run().stdout.fnmatch_lines(["*value 60.0 source default"])
    pytester.makeini("[pytest]\nranks_timeout = 3")
    run().stdout.fnmatch_lines(["*value 3.0 source ranks_timeout (tox.ini)"])
    monkeypatch.setenv("RANKS_TIMEOUT", "2")
    run().stdout.fnmatch_lines(["*value 2.0 source RANKS_TIMEOUT"])
    run("--ranks-timeout=1").stdout.fnmatch_lines(["*value 1.0 source --ranks-timeout"])


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_counts_as_unset(run, monkeypatch, text: str) -> None:
    monkeypatch.setenv("RANKS_TIMEOUT", text)
    run().stdout.fnmatch_lines(["*value 60.0 source default"])


def test_an_override_on_the_command_line_is_no_file(run, pytester) -> None:
    pytester.makeini("[pytest]\nranks_timeout = 3")
    result = run("-o", "ranks_timeout=4")
    result.stdout.fnmatch_lines(["*value 4.0 source ranks_timeout (-o)"])


@pytest.mark.parametrize("table", ["tool.pytest.ini_options", "tool.pytest"])
def test_numbers_in_toml_need_no_quotes(run, pytester, table: str) -> None:
    if table == "tool.pytest" and pytest.version_tuple < (9,):
        pytest.skip("pytest reads this table from version 9 on")
    pytester.makepyprojecttoml(f"[{table}]\nranks_timeout = 7\nranks_max_world_size = 8")
    run().stdout.fnmatch_lines(["*value 7.0 source ranks_timeout (pyproject.toml)"])


def test_the_header_names_what_is_not_default_and_its_source(run, pytester, monkeypatch) -> None:
    assert "ranks:" not in run().stdout.str()
    pytester.makeini("[pytest]\nranks_max_world_size = 8\nranks_hardware_marks = false")
    monkeypatch.setenv("RANKS_SUBJECT", "mylib.testing:MyTrainer")
    run(
        "--ranks-timeout=1.5", "--ranks-suite=loss,packing", "--ranks-suite", "data_loading"
    ).stdout.fnmatch_lines(
        [
            "ranks: timeout=1.5 (from --ranks-timeout), "
            "max_world_size=8 (from ranks_max_world_size (tox.ini)), "
            "hardware_marks=False (from ranks_hardware_marks (tox.ini)), "
            "subject=mylib.testing:MyTrainer (from RANKS_SUBJECT), "
            "suite=loss,packing,data_loading (from --ranks-suite)"
        ]
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--ranks-timeout=5m",
            "--ranks-timeout: found '5m', expected a number of seconds greater than 0; "
            "write for example --ranks-timeout=60",
        ),
        (
            "--ranks-timeout=0",
            "--ranks-timeout: found '0', expected a number of seconds greater than 0; "
            "write for example --ranks-timeout=60",
        ),
        (
            "--ranks-timeout=inf",
            "--ranks-timeout: found 'inf', expected a number of seconds greater than 0; "
            "write for example --ranks-timeout=60",
        ),
        (
            "--ranks-timeout=nan",
            "--ranks-timeout: found 'nan', expected a number of seconds greater than 0; "
            "write for example --ranks-timeout=60",
        ),
        (
            "--ranks-max-world-size=0",
            "--ranks-max-world-size: found '0', expected a whole number of at least 1; "
            "write for example --ranks-max-world-size=64",
        ),
        (
            "--ranks-require=gpus:1",
            "--ranks-require: found 'gpus:1', expected a comma list of kind:count, the kinds "
            "being gpu, multi_gpu, trainium and ranks; write for example "
            "--ranks-require=gpu:1,multi_gpu:2 ('gpus' is no kind of need. Did you mean 'gpu'?)",
        ),
        (
            "--ranks-require=gpu:0",
            "--ranks-require: found 'gpu:0', expected a comma list of kind:count, the kinds "
            "being gpu, multi_gpu, trainium and ranks; write for example "
            "--ranks-require=gpu:1,multi_gpu:2 ('gpu:0' asks for no device)",
        ),
        (
            "--ranks-require=gpu:1,",
            "--ranks-require: found 'gpu:1,', expected a comma list of kind:count, the kinds "
            "being gpu, multi_gpu, trainium and ranks; write for example "
            "--ranks-require=gpu:1,multi_gpu:2 ('' is no kind of need.)",
        ),
        (
            "--ranks-require=",
            "--ranks-require: found '', expected a comma list of kind:count, the kinds "
            "being gpu, multi_gpu, trainium and ranks; write for example "
            "--ranks-require=gpu:1,multi_gpu:2 ('' is no kind of need.)",
        ),
        (
            "--ranks-subject=mylib.testing",
            "--ranks-subject: found 'mylib.testing', expected module:Class or path.py:Class; "
            "write for example --ranks-subject=mylib.testing:MyTrainer",
        ),
        (
            "--ranks-suite=loss,,packing",
            "--ranks-suite: found 'loss,,packing', expected a comma list of suites or check ids; "
            "write for example --ranks-suite=loss,packing",
        ),
    ],
)
def test_a_bad_option_is_one_sentence(run, argument: str, message: str) -> None:
    result = run(argument)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == f"ERROR: {message}"


def test_a_bad_variable_is_named(run, monkeypatch) -> None:
    monkeypatch.setenv("RANKS_MAX_WORLD_SIZE", "many")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == (
        "ERROR: RANKS_MAX_WORLD_SIZE (environment): found 'many', expected a whole number of at "
        "least 1; write for example RANKS_MAX_WORLD_SIZE=64"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "ranks_timeout = -3",
            "ranks_timeout (tox.ini): found '-3.0', expected a number of seconds greater than 0; "
            "write for example ranks_timeout=60",
        ),
        (
            "ranks_timeout = 5m",
            "ranks_timeout (tox.ini): found '5m', expected a number of seconds greater than 0; "
            "write for example ranks_timeout=60",
        ),
        (
            "ranks_max_world_size = 2.5",
            "ranks_max_world_size (tox.ini): found '2.5', expected a whole number of at least 1; "
            "write for example ranks_max_world_size=64",
        ),
        (
            "ranks_hardware_marks = maybe",
            "ranks_hardware_marks (tox.ini): found 'maybe', expected true or false; "
            "write for example ranks_hardware_marks=false",
        ),
    ],
)
def test_a_bad_ini_setting_is_one_sentence(run, pytester, line: str, message: str) -> None:
    pytester.makeini(f"[pytest]\n{line}")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == f"ERROR: {message}"


def test_marks_that_are_not_ours_cannot_be_required(run, pytester) -> None:
    pytester.makeini("[pytest]\nranks_hardware_marks = false")
    result = run("--ranks-require=gpu:1,ranks:2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == (
        "ERROR: --ranks-require: found gpu:1, but ranks_hardware_marks (tox.ini) makes these marks "
        "the project's own, which this plugin does not follow; require ranks alone, or set "
        "ranks_hardware_marks=true"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--ranks-list-checks", "--ranks-self-check"],
            "--ranks-list-checks, --ranks-self-check: found both, expected one: the first lists "
            "checks, the second proves them on planted bugs",
        ),
        (
            ["--ranks-list-checks", "--ranks-subject=mine:Trainer"],
            "--ranks-list-checks: found --ranks-subject=mine:Trainer beside it, which it does not "
            "look at; leave one of the two out",
        ),
        (
            ["--ranks-self-check", "--ranks-subject=mine:Trainer"],
            "--ranks-self-check: found --ranks-subject=mine:Trainer beside it, which it does not "
            "look at; leave one of the two out",
        ),
    ],
)
def test_commands_that_would_leave_an_option_out_say_so(run, arguments, message: str) -> None:
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == f"ERROR: {message}"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--ranks-suite=los"], "--ranks-suite"),
        (["--ranks-suite=loss", "--ranks-subject=mine:Trainer"], "--ranks-subject, --ranks-suite"),
    ],
)
def test_options_of_the_suites_without_the_suites_are_told(run, arguments, options: str) -> None:
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.OK
    assert (
        f"{options}: no check of the conformance suites ran; run them with: pytest --pyargs "
        f"pytest_ranks.conformance {options.partition(',')[0]}=..."
    ) in result.outlines
    assert "no check of the conformance suites" not in run().stdout.str()


def test_a_wrong_type_in_native_toml_is_one_sentence(run, pytester) -> None:
    if pytest.version_tuple < (9,):
        pytest.skip("pytest reads this table from version 9 on")
    pytester.makepyprojecttoml("[tool.pytest]\nranks_timeout = '5m'")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == (
        "ERROR: ranks_timeout (pyproject.toml): found '5m', expected a number of seconds greater "
        "than 0; write for example ranks_timeout=60"
    )


def test_the_documentation_lists_every_row() -> None:
    lines = options.markdown().splitlines()
    assert lines[2] == (
        "| `--ranks-timeout` | `ranks_timeout` | `RANKS_TIMEOUT` | 60 "
        "| Seconds that a test on ranks may take once its ranks are ready |"
    )
    assert len(lines) == 2 + len(option_table.TABLE)
    assert all(line.count("|") == 6 for line in lines)
