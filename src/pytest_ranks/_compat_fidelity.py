"""Private torch and pytest names of the fidelities below gloo, each with what it stands for.

torch 2.11 to 2.13 has them all; where one is gone, the sentence says which fidelity it takes along.
"""

from __future__ import annotations

import importlib
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

# ---- torch


def find(fidelity: str, module: str, name: str) -> Any:
    """Return a private name of torch that a fidelity rests on.

    Raises:
        UnavailableError: this torch has it no more, or not yet.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        import torch

        raise UnavailableError(
            f"fidelity {fidelity!r}: needs {module}.{name}, which torch {torch.__version__} does "
            "not have; run the test at fidelity 'gloo'."
        ) from None


def fake_store() -> Any:
    """Return a store that answers nothing; loading it registers the backend "fake"."""
    return find("fake", "torch.testing._internal.distributed.fake_pg", "FakeStore")()


def install_threaded_group() -> Any:
    """Make process groups belong to threads in this process; return torch's module of them.

    `destroy_process_group` asks the world for its `comms`, which the threaded one of torch 2.11
    does not have: it would end half-way, and the group would stay.
    """
    name = "torch.testing._internal.distributed.multi_threaded_pg"
    install = find("threads", name, "_install_threaded_pg")
    find("threads", "torch._C._distributed_c10d", "_set_thread_isolation_mode")(True)
    world = type(install())
    if not hasattr(world, "comms"):
        world.comms = property(lambda _: [])  # of torchcomms, which threads never use
    return importlib.import_module(name)


def finished_work(result: Any) -> Any:
    """Return a handle of a collective that is over."""
    from torch.testing._internal.distributed import multi_threaded_pg

    make: Callable[[object], Any] = multi_threaded_pg.ret_work
    return make(result)


def waiting_work(wait: Callable[[], None], is_done: Callable[[], bool]) -> Any:
    """Return a handle whose `wait()` is this function (`torch.distributed._Work`)."""
    import torch.distributed as dist

    class Waiting(dist._Work):  # type: ignore[name-defined, misc]
        def wait(self, timeout: object = None) -> bool:
            del timeout
            wait()
            return True

        def is_completed(self) -> bool:
            return is_done()

    return Waiting()


_libraries: list[Any] = []  # what is registered in a library ends with it


def setup_device(name: str, module: object, run: Callable[..., Any]) -> None:
    """Name a device that is played in Python, and have this function run its factories."""
    import torch

    setup = find(
        "simulated",
        "torch.utils.backend_registration",
        "_setup_privateuseone_for_python_backend",
    )
    setup(name, backend_module=module)
    make_library: Callable[..., Any] = torch.library.Library
    library = make_library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    _libraries.append(library)


def make_wrapper(kind: Any, raw: Any, device: Any) -> Any:
    """Return a tensor of a subclass that has the looks of another one, on another device."""
    import torch

    return torch.Tensor._make_wrapper_subclass(
        kind,
        raw.shape,
        strides=raw.stride(),
        storage_offset=raw.storage_offset(),
        dtype=raw.dtype,
        device=device,
    )


def replace_everywhere(original: object, name: str, replacement: object) -> None:
    """Rebind a function of torch in every module that has it under its name.

    User modules are imported before a rank knows its fidelity, so they hold the original; torch's
    own modules below `torch.distributed` keep it.
    """
    import sys

    for module in list(sys.modules.values()):
        own = getattr(module, "__dict__", {})
        is_inside = getattr(module, "__name__", "").startswith("torch.distributed.")
        if own.get(name) is original and not is_inside:
            own[name] = replacement


# ---- pytest 8.4 to 9.2


def collect_again(
    config: pytest.Config, file: str, removed: list[object]
) -> tuple[pytest.Session, list[pytest.Item]]:
    """Collect a file in a session with fixtures and set-up state of its own (no public way).

    The module is the one that is imported already. The first session and its fixtures take no
    part in hooks any more: a process that does this runs no item of theirs.

    Args:
        config: of the first session.
        file: what to collect.
        removed: plugins whose hooks the nodes of the session never call.
    """
    import pytest
    from _pytest.fixtures import FixtureManager
    from _pytest.runner import SetupState

    manager = config.pluginmanager
    for name in ("session", "funcmanage"):
        if manager.has_plugin(name):
            manager.unregister(name=name)
    session = pytest.Session.from_config(config)
    try:
        session._fixturemanager = FixtureManager(session)
        session._setupstate = SetupState()
        found: list[pytest.Item] = []
        with _noting(config, found):
            session.perform_collect([file])
        _remove_from_hooks(session, removed)
    finally:
        for name in ("session", "funcmanage"):
            manager.unregister(name=name)
    return session, found


@contextmanager
def _noting(config: pytest.Config, found: list[pytest.Item]) -> Iterator[None]:
    """Note all collected items before other plugins select among them."""
    import pytest

    class Noting:
        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            found.extend(items)

    plugin = Noting()
    config.pluginmanager.register(plugin)
    try:
        yield
    finally:
        config.pluginmanager.unregister(plugin)


def _remove_from_hooks(session: pytest.Session, plugins: list[object]) -> None:
    """Have the nodes of a session call no hook of these plugins (`FSHookProxy`)."""
    from _pytest.main import FSHookProxy

    original = session.gethookproxy
    proxies: dict[frozenset[int], Any] = {}

    def gethookproxy(path: Any) -> Any:
        proxy = original(path)
        others = getattr(getattr(proxy, "_hook_relay", proxy), "remove_mods", ())
        key = frozenset(map(id, others))
        if key not in proxies:
            proxies[key] = FSHookProxy(session.config.pluginmanager, {*others, *plugins})
        return proxies[key]

    vars(session)["gethookproxy"] = gethookproxy


def share_log_capture(source: pytest.Item, target: pytest.Item) -> None:
    """Have `caplog` of one item see what that of another one sees (`_pytest.logging`)."""
    from _pytest import logging

    keys: tuple[pytest.StashKey[Any], ...] = (
        logging.caplog_handler_key,
        logging.caplog_records_key,
    )
    for key in keys:
        if key in source.stash:
            target.stash[key] = source.stash[key]


def lock_temporary_folders(config: pytest.Config) -> None:
    """Have threads make their `tmp_path` one after the other (`TempPathFactory` counts)."""
    factory = config._tmp_path_factory  # type: ignore[attr-defined]
    make, lock = factory.mktemp, threading.Lock()

    def mktemp(basename: str, numbered: bool = True) -> Any:
        with lock:
            return make(basename, numbered)

    object.__setattr__(factory, "mktemp", mktemp)  # a frozen class


def take_sections(item: pytest.Item) -> list[tuple[str, str]]:
    """Return what was captured for an item, under the titles of a report, and forget it."""
    found = [(f"Captured {key} {when}", text) for when, key, text in item._report_sections]
    item._report_sections.clear()
    return found


def subset_hook(config: pytest.Config, name: str, kept: list[object]) -> Callable[..., Any]:
    """Return a hook that calls only these plugins."""
    manager = config.pluginmanager
    removed = [one for one in manager.get_plugins() if one not in kept]
    return manager.subset_hook_caller(name, removed)
