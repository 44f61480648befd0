"""The pytest entry point: hook functions only, each delegating to the module that knows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import marks, options
from pytest_ranks.errors import not_installed
from pytest_ranks.launch import scan

if TYPE_CHECKING:
    from pytest_ranks.hardware.found import Hardware

pytest_plugins = ("pytest_ranks.fixtures",)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare options and ini settings."""
    options.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks that users may implement."""
    from pytest_ranks import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Hand the commands of the conformance suites over; attach to a launcher's world."""
    chosen = options.settings(config)
    if (
        "TORCHELASTIC_RUN_ID" in os.environ
        or "SLURM_PROCID" in os.environ
        or chosen.attach != "auto"
    ):
        from pytest_ranks.launch import attached

        attached.prepare(config, is_likely=scan.is_likely)
    if not (chosen.list_checks or chosen.self_check):
        return None
    return _run_command(
        config, "--ranks-list-checks" if chosen.list_checks else "--ranks-self-check"
    )


def _run_command(config: pytest.Config, option: str) -> int:
    """Run a command that replaces the session; it needs what the plugin does without."""
    from importlib import import_module

    try:
        return int(import_module("pytest_ranks.conformance.command").main(config))
    except ModuleNotFoundError as error:
        raise pytest.UsageError(not_installed(option, error)) from None


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings, declare the marks, follow the session's needs."""
    from pytest_ranks.report.terminal import NeedsReporter
    from pytest_ranks.report.verdict import VerdictReporter

    options.settings(config)
    scan.check_options(config)
    marks.register(config)
    config.pluginmanager.register(NeedsReporter(config), "ranks-needs")
    config.pluginmanager.register(VerdictReporter(config), "ranks-verdict")
    if options.settings(config).report is not None:
        from pytest_ranks.report import json

        json.register(config)
    if config.getoption("xmlpath", None) and not hasattr(config, "workerinput"):
        from pytest_ranks.report.junit import JunitSections

        config.pluginmanager.register(JunitSections(), "ranks-junit")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Print the settings that are not the default, with their sources."""
    return options.header(config)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> None:
    """Let a fixture say how real the ranks of a test are."""
    marks.use_fidelity(collector, name, obj)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item for each world size."""
    marks.parametrize(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    """Start what tests on ranks need before the first file is imported."""
    if isinstance(collector, pytest.Session):
        scan.before_collection(collector)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Have the tests that ask for ranks run there."""
    scan.after_collection(session)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are not met, before any fixture of it."""
    # In a rank the controller has asked already, once for all ranks.
    if not item.config.pluginmanager.has_plugin("ranks-session"):
        marks.enforce(item)
        scan.check_mark_is_in_time(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests whose ranks could not be used again."""
    needs = terminalreporter.config.pluginmanager.get_plugin("ranks-needs")
    if getattr(needs, "book", None) is not None:  # a session with tests of ours
        from pytest_ranks.report import leftovers

        leftovers.summarize(terminalreporter)


@pytest.hookimpl(trylast=True)
def pytest_ranks_hardware(config: pytest.Config) -> Hardware:  # noqa: ARG001 - the hook's name
    """Look at this machine."""
    from pytest_ranks.hardware.probes import probe

    return probe()
