"""Private names of pytest around the terminal, held against what pytest itself does."""

from __future__ import annotations

import logging

import pytest
from _pytest import logging as private

from pytest_ranks import _compat_terminal

NAMES = ("listening.root", "listening.alone", "listening.made_later")


@pytest.fixture
def loggers():
    found = [logging.getLogger(name) for name in NAMES[:2]]
    found[1].propagate = False
    found[1].setLevel(logging.INFO)
    yield found
    for name in NAMES:
        logging.root.manager.loggerDict.pop(name, None)


def heard(catch, loggers):
    """Return what a handler hears, and the level of the root inside and after."""
    handler = private.LogCaptureHandler()
    level = logging.root.level
    with catch(handler, level=logging.INFO) as same:
        assert same is handler
        inside = logging.root.level
        for one in loggers:
            one.info("from %s", one.name)
        with catch(handler, level=logging.DEBUG):  # a second time, as nested phases do
            loggers[1].info("once more")
    loggers[1].info("after")
    assert logging.root.level == level
    attached = [one.name for one in (logging.root, *loggers) if handler in one.handlers]
    return [one.getMessage() for one in handler.records], inside, attached


def test_quick_listening_hears_what_pytest_hears(loggers):
    plain = heard(private.catching_logs, loggers)
    original = private.catching_logs
    with _compat_terminal.listening_quickly():
        assert heard(private.catching_logs, loggers) == plain
    assert private.catching_logs is original
    assert plain[0]
    assert plain[2] == []


@pytest.mark.skipif(
    "attached_loggers" not in getattr(private.catching_logs, "__slots__", ()),
    reason="this pytest listens to the root logger alone",
)
def test_quick_listening_leaves_the_trace_of_torch_out(loggers):
    trace = logging.getLogger(_compat_terminal.TRACE_LOGGER)
    before = trace.propagate, trace.level
    trace.propagate = False
    trace.setLevel(logging.DEBUG)
    handler = private.LogCaptureHandler()
    try:
        with _compat_terminal.listening_quickly(), private.catching_logs(handler):
            trace.debug("a structured record")
            loggers[1].info("heard")
    finally:
        trace.propagate, trace.level = before
    assert [one.getMessage() for one in handler.records] == ["heard"]
