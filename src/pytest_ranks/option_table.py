"""The table of options: what makes the command line, the ini settings, their help and the docs."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.hardware.requirements import Required

# Twice the 32 ranks of the largest configuration that training tests use (tp=8, pp=4): more than
# that in one test is a typing error oftener than a wish.
MAX_WORLD_SIZE = 64
# A rank test that runs takes well under a second; a minute is what a loaded CI machine may need.
TIMEOUT_SECONDS = 60.0
# Nodes import torch from a shared file system at very different speeds.
JOIN_SECONDS = 300.0


# What tests leak into a process stays bounded; new ranks cost a few hundredths of a second.
MAX_USES = 500


# A dataclass would cost every pytest session half a millisecond more.
class Option(NamedTuple):
    """One row of the table.

    Attributes:
        name: the field of `Settings`; option, ini setting and variable derive their names from it.
        help: what it is for, one phrase.
        default: the value where nobody sets one.
        action: how the command line takes it.
        metavar: what stands for the value in `--help`.
        ini: the type of the ini setting, or None where there is none.
        env: whether there is an environment variable.
        flag: whether there is a command line option.
        parse: makes a value of a text; a ValueError's text says what was found wrong.
        expected: what a value has to be.
        example: a value to write.
        shown: the default in words, where its `repr` says little.
    """

    name: str
    help: str
    default: Any
    action: Literal["store", "append", "store_true"] = "store"
    metavar: str | None = None
    ini: Literal["string", "float", "int", "bool"] | None = None
    env: bool = False
    flag: bool = True
    parse: Callable[[str], Any] = str
    expected: str = ""
    example: str = ""
    shown: str = ""

    @property
    def option(self) -> str:
        """Return the command line option's name."""
        return "--ranks-" + self.name.replace("_", "-")

    @property
    def setting(self) -> str:
        """Return the ini setting's name."""
        return f"ranks_{self.name}"

    @property
    def variable(self) -> str:
        """Return the environment variable's name."""
        return f"RANKS_{self.name.upper()}"


def _parse_seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _parse_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _parse_rank(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _parse_bool(text: str) -> bool:
    return text == "True"


def _parse_switch(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ValueError
    return known[text.lower()]


def _parse_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError
    return names


def _parse_path(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _parse_require(text: str) -> tuple[Required, ...]:
    from pytest_ranks.hardware.requirements import parse_required

    return parse_required(text)


def _parse_fidelity(text: str) -> str:
    from pytest_ranks.launch.fidelity.ladder import parse

    return parse(text)


def _parse_collective_debug(text: str) -> str:
    if text not in ("always", "on_failure", "never"):
        raise ValueError
    return text


def _parse_subject(text: str) -> str:
    if not re.fullmatch(r"[^:]+:[A-Za-z_][\w.]*", text):
        raise ValueError
    return text


def _parse_attach(text: str) -> str:
    if text not in ("auto", "always", "never"):
        raise ValueError
    return text


TABLE = (
    Option(
        name="timeout",
        help="Seconds that a test on ranks may take once its ranks are ready",
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        ini="float",
        env=True,
        parse=_parse_seconds,
        expected="a number of seconds greater than 0",
        example="60",
        shown="60",
    ),
    Option(
        name="require",
        help="Kinds of need whose tests have to run, or the session fails: gpu:1,multi_gpu:2",
        default=(),
        metavar="NEEDS",
        ini="string",
        env=True,
        parse=_parse_require,
        expected="a comma list of kind:count, the kinds being gpu, multi_gpu, trainium and ranks",
        example="gpu:1,multi_gpu:2",
        shown="none",
    ),
    Option(
        name="max_world_size",
        help="Most ranks that one test may ask for",
        default=MAX_WORLD_SIZE,
        metavar="RANKS",
        ini="int",
        env=True,
        parse=_parse_count,
        expected="a whole number of at least 1",
        example="64",
        shown="64",
    ),
    Option(
        name="max_uses",
        help="Most tests that one pool of ranks runs before new ranks take its place",
        default=MAX_USES,
        metavar="TESTS",
        ini="int",
        env=True,
        parse=_parse_count,
        expected="a whole number of at least 1",
        example="500",
        shown="500",
    ),
    Option(
        name="reuse_after_failure",
        help="Whether ranks on which a test failed serve the next one, in a fresh process group",
        default=False,
        metavar="BOOL",
        ini="bool",
        env=True,
        parse=_parse_switch,
        expected="true or false",
        example="true",
        shown="false",
    ),
    Option(
        name="fidelity",
        help="How real the ranks are, for tests whose mark allows it; others run as marked",
        default=None,
        metavar="NAME",
        ini="string",
        env=True,
        parse=_parse_fidelity,
        expected="fake, local_tensor, threads, gloo, simulated or device",
        example="gloo",
        shown="what the mark says",
    ),
    Option(
        name="report",
        help="File for what each test did on its ranks, as JSON",
        default=None,
        metavar="PATH",
        ini="string",
        env=True,
        parse=_parse_path,
        expected="the path of a file",
        example="ranks.json",
        shown="none",
    ),
    Option(
        name="cpus",
        help="Ranks that all xdist workers together have at work; a test with more runs alone",
        default=None,
        metavar="CPUS",
        ini="int",
        env=True,
        parse=_parse_count,
        expected="a whole number of at least 1",
        example="8",
        shown="the CPUs that there are",
    ),
    Option(
        name="debug",
        help="Rank that gets the terminal for breakpoint(), --pdb and --trace; all deadlines are "
        "lifted",
        default=None,
        metavar="RANK",
        parse=_parse_rank,
        expected="the number of a rank, from 0",
        example="1",
        shown="none",
    ),
    Option(
        name="strict_hygiene",
        help="Whether a test fails for what it leaves behind in its ranks: environment, threads, "
        "open files; false puts back what can be and replaces the ranks else",
        default=False,
        metavar="BOOL",
        ini="bool",
        env=True,
        parse=_parse_switch,
        expected="true or false",
        example="true",
        shown="false",
    ),
    Option(
        name="collective_debug",
        help="When torch compares each collective between the ranks, 3 to 12 times slower: always, "
        "on_failure (once more after a failure that nothing else explains) or never",
        default="on_failure",
        metavar="WHEN",
        ini="string",
        env=True,
        parse=_parse_collective_debug,
        expected="always, on_failure or never",
        example="never",
        shown="on_failure",
    ),
    Option(
        name="hardware_marks",
        help="Whether gpu, multi_gpu, trainium and requires are marks of this plugin; "
        "false leaves a project's own marks of these names alone",
        default=True,
        ini="bool",
        flag=False,
        parse=_parse_bool,
        expected="true or false",
        example="false",
        shown="true",
    ),
    Option(
        name="subject",
        help="Training code that the conformance suites test: module:Class or path.py:Class",
        default=None,
        metavar="SUBJECT",
        ini="string",
        env=True,
        parse=_parse_subject,
        expected="module:Class or path.py:Class",
        example="mylib.testing:MyTrainer",
        shown="the reference trainer",
    ),
    Option(
        name="suite",
        help="Conformance suites or check ids to run, a comma list; repeatable",
        default=(),
        action="append",
        metavar="SUITES",
        parse=_parse_names,
        expected="a comma list of suites or check ids",
        example="loss,packing",
        shown="all",
    ),
    Option(
        name="list_checks",
        help="List the conformance checks and exit",
        default=False,
        action="store_true",
    ),
    Option(
        name="self_check",
        help="Run every conformance check against the bugs it has to catch, and exit",
        default=False,
        action="store_true",
    ),
    Option(
        name="attach",
        help="Whether a pytest that torchrun or srun starts once a rank is one session over all "
        "ranks: auto where tests on ranks are likely, always, or never",
        default="auto",
        metavar="WHEN",
        ini="string",
        env=True,
        parse=_parse_attach,
        expected="auto, always or never",
        example="never",
        shown="auto",
    ),
    Option(
        name="join_timeout",
        help="Seconds in which the ranks have to import, collect and come together, also those of a "
        "launcher's world",
        default=JOIN_SECONDS,
        metavar="SECONDS",
        ini="float",
        env=True,
        parse=_parse_seconds,
        expected="a number of seconds greater than 0",
        example="300",
        shown="300",
    ),
)
