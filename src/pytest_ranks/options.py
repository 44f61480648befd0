"""Command line options, ini settings and environment variables, resolved in one order.

One table (`option_table`) makes the options, the ini settings, their help and the documentation.
The order is command line, environment, ini, default; every value knows where it came from.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks.option_table import TABLE, Option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_ranks.hardware.requirements import Required

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The values that hold for this session, and the source of each.

    Attributes:
        timeout: seconds that a test on ranks may take once its ranks are ready.
        require: kinds of need whose tests have to run.
        max_world_size: the most ranks that one test may ask for.
        max_uses: the most tests that one pool of ranks runs.
        reuse_after_failure: whether ranks on which a test failed serve the next one.
        fidelity: how real the ranks are, for tests whose mark allows it.
        report: file for what each test did on its ranks, as JSON.
        cpus: ranks that all xdist workers together have at work, None for one a CPU.
        debug: the rank that gets the terminal for a debugger, None where none was chosen.
        strict_hygiene: whether a test fails for what it leaves behind in its ranks.
        collective_debug: when torch compares each collective between the ranks.
        hardware_marks: whether `gpu`, `multi_gpu`, `trainium` and `requires` are ours.
        subject: the training code that the conformance suites test.
        suite: suites or check ids to run; empty means all.
        list_checks: list the conformance checks and exit.
        self_check: run every check against its mutants and exit.
        attach: "auto", "always" or "never" attach to the world of a launcher.
        join_timeout: seconds in which ranks have to import, collect and come together.
        sources: where each value came from: an option, a variable, a file or the default.
    """

    timeout: float
    require: tuple[Required, ...]
    max_world_size: int
    cpus: int | None
    debug: int | None
    max_uses: int
    reuse_after_failure: bool
    fidelity: str | None
    report: str | None
    strict_hygiene: bool
    collective_debug: str
    hardware_marks: bool
    subject: str | None
    suite: tuple[str, ...]
    list_checks: bool
    self_check: bool
    attach: str
    join_timeout: float
    sources: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """Return where a value came from: `--ranks-timeout`, `RANKS_TIMEOUT`, `tox.ini`."""
        return self.sources[name]


SETTINGS_KEY = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Declare the options and ini settings of the table."""
    group = parser.getgroup("ranks", "tests on ranks, hardware needs, conformance (pytest-ranks)")
    for row in TABLE:
        # The default is None so that an option that is not given lets the next source through.
        keywords: dict[str, Any] = {"dest": row.setting, "help": describe(row), "default": None}
        if row.metavar is not None:
            keywords["metavar"] = row.metavar
        if row.flag:
            group.addoption(row.option, action=row.action, **keywords)
        if row.ini is not None:
            parser.addini(row.setting, f"{row.help} (default {row.shown})", row.ini, default=None)


def describe(row: Option) -> str:
    """Return an option's help: what it is for, its default, and where else it can be set."""
    if row.action == "store_true":
        return row.help
    others = [row.variable] if row.env else []
    if row.ini is not None:
        others.append(f"ini {row.setting}")
    return f"{row.help} ({', '.join([f'default {row.shown}', *others])})"


def settings(config: pytest.Config) -> Settings:
    """Return the session's settings, resolved once.

    Raises:
        pytest.UsageError: a value cannot be used; the text names its source.
    """
    if SETTINGS_KEY not in config.stash:
        found = {row.name: _resolve(row, config) for row in TABLE}
        values = {name: value for name, (value, _) in found.items()}
        sources = {name: source for name, (_, source) in found.items()}
        chosen = Settings(**values, sources=sources)
        _check_together(chosen)
        config.stash[SETTINGS_KEY] = chosen
    return config.stash[SETTINGS_KEY]


def _check_together(chosen: Settings) -> None:
    """Refuse values that contradict each other."""
    foreign = [str(entry) for entry in chosen.require if entry.kind != "ranks"]
    if foreign and not chosen.hardware_marks:
        raise pytest.UsageError(
            f"{chosen.source('require')}: found {','.join(foreign)}, but "
            f"{chosen.source('hardware_marks')} makes these marks the project's own, which this "
            "plugin does not follow; require ranks alone, or set ranks_hardware_marks=true"
        )
    if chosen.list_checks and chosen.self_check:
        raise pytest.UsageError(
            "--ranks-list-checks, --ranks-self-check: found both, expected one: the first lists "
            "checks, the second proves them on planted bugs"
        )
    if chosen.source("subject") == "--ranks-subject" and (chosen.list_checks or chosen.self_check):
        command = "--ranks-list-checks" if chosen.list_checks else "--ranks-self-check"
        raise pytest.UsageError(
            f"{command}: found --ranks-subject={chosen.subject} beside it, which it does not look "
            "at; leave one of the two out"
        )


def _resolve(row: Option, config: pytest.Config) -> tuple[Any, str]:
    """Return the value from the first source that has one, and that source."""
    given = config.getoption(row.setting, default=None)
    if row.action == "store_true":
        return (True, row.option) if given else (row.default, DEFAULT)
    if row.flag and given is not None:
        texts = given if row.action == "append" else [given]
        parsed = [_parse(row, text, source=row.option, example=row.option) for text in texts]
        if row.action == "append":
            return tuple(name for names in parsed for name in names), row.option
        return parsed[0], row.option
    if row.env and (text := os.environ.get(row.variable, "").strip()):
        source = f"{row.variable} (environment)"
        return _parse(row, text, source=source, example=row.variable), row.variable
    if row.ini is not None:
        return _resolve_ini(row, config)
    return row.default, DEFAULT


def _resolve_ini(row: Option, config: pytest.Config) -> tuple[Any, str]:
    """Return the ini setting's value and its file, or the default."""
    source = f"{row.setting} ({_ini_file(row, config)})"
    try:
        raw = config.getini(row.setting)
    except (ValueError, TypeError, pytest.UsageError) as error:
        # pytest's text ends with the value that it found, quoted where that is a string.
        found = re.search(r"'[^']*'$|\S+$", str(error))
        raise _usage_error(row, source, found[0] if found else str(error), row.setting) from None
    if raw is None or raw == "":
        return row.default, DEFAULT
    return _parse(row, str(raw), source=source, example=row.setting), source


def _ini_file(row: Option, config: pytest.Config) -> str:
    """Return where an ini setting was made: a file's name, or `-o` for an override."""
    overrides = config.getoption("override_ini", default=None) or ()
    if config.inipath is None or any(o.startswith(f"{row.setting}=") for o in overrides):
        return "-o"
    return config.inipath.name


def _parse(row: Option, text: str, *, source: str, example: str) -> Any:
    """Return the value that a text stands for."""
    try:
        return row.parse(text.strip())
    except ValueError as error:
        # Our own parsers say what is wrong; those of int() and float() only repeat the text.
        detail = str(error)
        known = detail and "invalid literal" not in detail and "could not convert" not in detail
        raise _usage_error(
            row, source, repr(text), example, detail=detail if known else ""
        ) from None


def _usage_error(
    row: Option, source: str, found: str, example: str, *, detail: str = ""
) -> pytest.UsageError:
    """Return the error: found, expected, what to do."""
    text = f"{source}: found {found}, expected {row.expected}; "
    text += f"write for example {example}={row.example}"
    return pytest.UsageError(f"{text} ({detail})" if detail else text)


def header(config: pytest.Config) -> str | None:
    """Return the line of the session's header: the values that are not the default."""
    chosen = settings(config)
    changed = [
        f"{entry.name}={_show(getattr(chosen, entry.name))} (from {chosen.source(entry.name)})"
        for entry in fields(Settings)
        if entry.name != "sources" and chosen.source(entry.name) != DEFAULT
    ]
    return f"ranks: {', '.join(changed)}" if changed else None


def _show(value: object) -> str:
    """Return a value as the user writes it."""
    if isinstance(value, tuple):
        return ",".join(str(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown() -> str:
    """Return the table as a page of the documentation."""
    lines = [
        "| option | ini setting | environment | default | what it is for |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in TABLE:
        names = (
            row.option if row.flag else "",
            row.setting if row.ini is not None else "",
            row.variable if row.env else "",
            row.shown,
        )
        cells = [f"`{name}`" if name else "" for name in names[:3]]
        lines.append(f"| {' | '.join([*cells, names[3], row.help])} |")
    return "\n".join(lines) + "\n"
