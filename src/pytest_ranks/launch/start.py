"""How the zygote of a pytest session comes to be: a fork of it, or a fresh process."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_ranks.launch.coverage import SAVE_SECONDS, Harvest
from pytest_ranks.launch.group import early_variables
from pytest_ranks.launch.link import ZygoteLink
from pytest_ranks.launch.processes import native_threads
from pytest_ranks.launch.terminal.attendant import Attendant, Display, is_shown
from pytest_ranks.launch.terminal.debug import desk_of
from pytest_ranks.launch.wire import Configure, Prepare
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from typing import NoReturn

    from pytest_ranks.launch.channel import Channel

HARVEST_KEY = pytest.StashKey[Harvest]()


def start_zygote(session: pytest.Session, *, fresh: bool) -> ZygoteLink:
    """Start the zygote that collects with this session's configuration; returns at once.

    A fork keeps configuration, plugins and hash seed, and needs no second start. It is safe only
    while this process has one native thread (`threading` sees Python's only; those of an xdist
    worker or a BLAS hold locks that no child can release) and no torch.

    Args:
        session: about to collect.
        fresh: never fork, because the session is past its collection.
    """
    configuration = _configuration(session.config)
    harvest = harvest_of(session.config)
    measure = harvest.measure()
    environment = {**os.environ, **early_variables()}
    if not fresh and native_threads() == 1 and "torch" not in sys.modules:

        def serve(channel: Channel, controller: int, log: int) -> NoReturn:
            from pytest_ranks.launch import session as rank_session
            from pytest_ranks.launch.guardian import start_guardian
            from pytest_ranks.launch.zygote import Ends

            ends = Ends(channel=channel, controller=controller, log=log)
            start_guardian(channel, controller, litter=harvest.folder)
            rank_session.serve(session, ends)

        link = ZygoteLink.start_forked(serve)
    else:
        link = ZygoteLink.start_fresh(environment, "--pytest", litter=harvest.folder)
        link.become(configuration)
    link.attendant = Attendant(
        display=Display(session.config) if is_shown(session.config) else None,
        desk=desk_of(session.config),
    )
    link.start_seconds = settings(session.config).join_timeout
    if measure is not None:
        link.farewell = SAVE_SECONDS
    request = Prepare(modules=("torch",), coverage=measure)
    link.prepare(request, configure=configuration, environment=environment)
    return link


def harvest_of(config: pytest.Config) -> Harvest:
    """Return the coverage of this session's ranks."""
    if HARVEST_KEY not in config.stash:
        contexts = getattr(config.option, "cov_context", None) == "test"
        config.stash[HARVEST_KEY] = Harvest(contexts=contexts)
    return config.stash[HARVEST_KEY]


def _configuration(config: pytest.Config) -> Configure:
    arguments = [str(argument) for argument in config.invocation_params.args]
    if config.pluginmanager.has_plugin("pytest_cov"):
        arguments.append("--no-cov")
    # this package is imported before pytest can mark it for rewriting; with -W error that ends it
    arguments += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    kept: dict[str, object] = {
        "numprocesses": None,
        "maxprocesses": None,
        "dist": "no",
        "distload": False,
        "looponfail": False,
        "tx": [],
        "xmlpath": None,
        "htmlpath": None,
        "basetemp": None,
        "log_file": None,
    }
    if "randomly_seed" in vars(config.option):
        kept["randomly_seed"] = config.option.randomly_seed
    options = {name: value for name, value in kept.items() if name in vars(config.option)}
    worker_input = getattr(config, "workerinput", None)
    return Configure(
        arguments=tuple(arguments),
        directory=str(config.invocation_params.dir),
        sys_path=tuple(sys.path),
        options=options,
        worker_input=None if worker_input is None else dict(worker_input),
    )
