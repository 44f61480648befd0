"""A pytest that torchrun or srun started once a rank: one session over all of them.

Rank 0 is an ordinary session, whose ranks are spread over the others. The others collect, and
then serve: they report nothing and decide nothing, so reruns, `-x`, `--lf` and the order of tests
need no agreement.
"""

from __future__ import annotations

import os
import platform
import zlib
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import __version__, _compat, options
from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.group import scrub_rank_variables
from pytest_ranks.launch.machines.coordination import Hello
from pytest_ranks.launch.machines.outer_world import OuterWorld, read_world

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "ranks-attached"
# Options that print or select; they are for each rank to answer, as without us.
_COMMANDS = ("help", "version", "markers", "showfixtures", "show_fixtures_per_test", "collectonly")
# Plugins of rank 0 alone: they report, or keep what only rank 0 knows.
_REPORTERS = (
    "terminalreporter",
    "terminalprogress-plugin",
    "lfplugin",
    "nfplugin",
    "stepwiseplugin",
    "pastebin",
    "ranks-needs",
    "ranks-report",
    "ranks-verdict",
    "ranks-report",
    "ranks-junit",
)
# Options of rank 0 alone: they write files, or select tests by what only rank 0 has kept.
_OPTIONS_OF_RANK_0: dict[str, object] = {
    "xmlpath": None,
    "htmlpath": None,
    "report_log": None,
    "usepdb": False,
    "lf": False,
    "failedfirst": False,
    "newfirst": False,
    "stepwise": False,
    "no_cov": True,
}


def prepare(config: pytest.Config, *, is_likely: Callable[[pytest.Config], bool]) -> None:
    """Attach this session to the world that it was started in, if there is one.

    Args:
        config: before any plugin was configured.
        is_likely: whether tests on ranks will be collected.

    Raises:
        pytest.UsageError: the session cannot be attached; the text says why.
    """
    chosen = options.settings(config)
    is_worker = hasattr(config, "workerinput")
    is_command = any(getattr(config.option, name, False) for name in _COMMANDS)
    if chosen.attach == "never" or is_worker or is_command:
        return
    try:
        world = read_world(os.environ)
    except BadInputError as error:
        raise pytest.UsageError(str(error)) from None
    if world is None:
        if chosen.attach == "always":
            raise pytest.UsageError(
                f"{chosen.source('attach')}=always: found no world to attach to, expected the "
                "variables that torchrun or srun set, with at least 2 ranks; start pytest with "
                "torchrun --nproc-per-node=2 -m pytest"
            )
        return
    if chosen.attach == "auto" and not is_likely(config):
        return
    _refuse_xdist(config, world)
    _refuse_debugger(config, world)
    # plain tests run on rank 0 alone: whoever reads these variables there would wait for the others
    scrub_rank_variables()
    _agree_on_seed(config, world)
    if world.rank == 0:
        from pytest_ranks.launch.machines.rank_zero import RankZero

        config.pluginmanager.register(RankZero(config, world), NAME)
        return
    from pytest_ranks.launch.machines.rank_other import RankOther

    _be_quiet(config, world)
    config.pluginmanager.register(RankOther(config, world), NAME)
    print(f"ranks: {world}; rank 0 reports", flush=True)


class Collected:
    """What this session collected, before any selection: the same on every rank."""

    def __init__(self, config: pytest.Config, world: OuterWorld) -> None:
        self.config = config
        self.world = world
        self._ids: list[str] = []
        self._errors: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note a test on ranks."""
        if item.get_closest_marker("ranks") is not None:
            self._ids.append(item.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what could not be collected."""
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.strip()]
            self._errors.append(f"{report.nodeid}: {lines[-1] if lines else 'failed'}")

    def hello(self, token: str) -> Hello:
        """Return what this rank says of itself."""
        return Hello(
            token=token,
            rank=self.world.rank,
            node=self.world.node,
            node_name=self.world.node_name,
            versions=_versions(self.config),
            ids=tuple(self._ids),
            errors=tuple(self._errors),
            base_temp=str(_compat.base_temp(self.config)),
        )


def _versions(config: pytest.Config) -> dict[str, str]:
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "pytest": pytest.__version__,
        "pytest-ranks": __version__,
        "torch": torch,
        "arguments": repr([str(argument) for argument in config.invocation_params.args]),
        "settings": repr(options.header(config) or "the defaults"),
    }


def _refuse_xdist(config: pytest.Config, world: OuterWorld) -> None:
    asked = getattr(config.option, "numprocesses", None) or getattr(config.option, "tx", None)
    if asked or getattr(config.option, "dist", "no") != "no":
        raise pytest.UsageError(
            f"pytest-xdist's workers cannot be ranks of the world of {world.size} that "
            f"{world.launcher} started: expected no -n, no --dist and no --tx, also in addopts; "
            "add -n 0, or start pytest without a launcher"
        )


def _refuse_debugger(config: pytest.Config, world: OuterWorld) -> None:
    rank = options.settings(config).debug
    asked = f"--ranks-debug={rank}" if rank is not None else ""
    for name, option in (("usepdb", "--pdb"), ("trace", "--trace")):
        if getattr(config.option, name, False):
            asked = option
    if asked:
        raise pytest.UsageError(
            f"{asked}: a debugger needs the terminal, which the ranks that {world.launcher} "
            f"started do not have; start pytest without {world.launcher}"
        )


def _agree_on_seed(config: pytest.Config, world: OuterWorld) -> None:
    """Give pytest-randomly the same seed on all ranks, where the user gave none."""
    if getattr(config.option, "randomly_seed", None) == "default":
        text = f"{world.run} {world.address} {world.port}"
        config.option.randomly_seed = zlib.crc32(text.encode())


def _be_quiet(config: pytest.Config, world: OuterWorld) -> None:
    """Leave to rank 0 what one session does once."""
    for name in _REPORTERS:
        config.pluginmanager.set_blocked(name)
    for name, value in _OPTIONS_OF_RANK_0.items():
        if name in vars(config.option):
            setattr(config.option, name, value)
    if config.pluginmanager.has_plugin("_cov"):
        config.pluginmanager.unregister(name="_cov")
    if config.option.basetemp is not None:  # each session empties its own
        config.option.basetemp = f"{config.option.basetemp}-rank{world.rank}"
