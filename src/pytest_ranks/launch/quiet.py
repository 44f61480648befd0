"""What a rank leaves to its controller: reporting, selecting, timing, debugging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks import _compat_terminal

if TYPE_CHECKING:
    import pytest

_CONTROLLERS = (
    "terminalreporter",
    "terminalprogress-plugin",
    "terminaldistreporter",
    "lfplugin",
    "nfplugin",
    "stepwiseplugin",
    "pastebin",
    "junitxml",
    "pdbinvoke",
    "pdbtrace",
    "timeout",
    "pytest_cov",
    "_cov",
    "_cov_contexts",
    "rerunfailures",
    "html",
    "xdist",
    "xdist.looponfail",
    "ranks-needs",
    "ranks-verdict",
    "ranks-report",
    "ranks-junit",
    "ranks-items",
    "ranks-attached",
)


def make_quiet(config: pytest.Config) -> None:
    """Take the plugins out of a session that only the controller may have."""
    manager = config.pluginmanager
    # by name, and by the name of its module: some are registered as anonymous objects
    for plugin in list(manager.get_plugins()):
        module = getattr(plugin, "__module__", None) or getattr(plugin, "__name__", "")
        is_report = type(plugin).__name__ in ("LogXML", "WorkerInteractor", "DSession")
        if manager.get_name(plugin) in _CONTROLLERS or is_report or module == "pytest_timeout":
            manager.unregister(plugin)
    config.option.usepdb = False
    config.option.setupshow = (
        False  # the controller shows its setup; here is no terminal to write to
    )
    _compat_terminal.write_to_nobody(config)
