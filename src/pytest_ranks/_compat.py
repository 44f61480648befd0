"""Every private torch and pytest name that we use, each with a probe.

Nothing on the gloo path depends on one of them: each has an answer for the case that it is gone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest


def all_process_groups() -> list[Any]:
    """Return every live process group (torch 2.11 to 2.13: `distributed_c10d._world.pg_map`).

    Where torch does not tell, subgroups are destroyed in the foreground: slower, not wrong.
    """
    from torch.distributed import distributed_c10d

    world = getattr(distributed_c10d, "_world", None)
    return list(getattr(world, "pg_map", ()))


def sequence_number(group: Any) -> int | None:
    """Return how many collectives a group has issued, None where torch does not tell."""
    probe = getattr(group, "_get_sequence_number_for_group", None)
    if probe is None:
        return None
    try:
        return int(probe())
    except RuntimeError:
        return None


def flight_records() -> tuple[list[dict[str, Any]], str]:
    """Return what torch's flight recorder holds, oldest first, and why it holds nothing.

    `_dump_fr_trace` (torch 2.11 to 2.13, gloo too, on by default) is a pickle of plain data.
    To name the frames it looks for `torch._inductor`, which would import the whole compiler
    (0.9 s) for nothing: that attribute is hidden where it was not imported before.
    """
    import pickle

    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return [], "torch is not in use"
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace", None)
    if dump is None:
        return [], f"torch {torch.__version__} has no _dump_fr_trace for gloo"
    names = vars(torch)
    original = names.get("__getattr__")
    is_hidden = original is not None and "_inductor" not in names

    def without_compiler(name: str) -> Any:
        if name == "_inductor":
            raise AttributeError(name)
        return original(name)  # type: ignore[misc]

    if is_hidden:
        names["__getattr__"] = without_compiler
    try:
        found = pickle.loads(dump())
    finally:
        if is_hidden:
            names["__getattr__"] = original
    entries = list(found.get("entries") or ())
    size = os.environ.get("TORCH_FR_BUFFER_SIZE", "")
    reason = "it is off: TORCH_FR_BUFFER_SIZE=0" if not entries and size == "0" else ""
    return entries, reason


def compare_collectives() -> None:
    """Have torch compare each collective of the next groups between their ranks.

    `set_debug_level_from_env` is public, but only this order of the two steps works in a process
    that imported torch long ago.
    """
    import torch.distributed as dist

    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()  # type: ignore[attr-defined]


def group_members() -> dict[str, dict[str, Any]]:
    """Return the ranks of each live process group, in order, and its timeout, by its name.

    `_world.pg_group_ranks` and `pg_names`; empty where torch does not tell.
    """
    distributed_c10d = sys.modules.get("torch.distributed.distributed_c10d")
    world = getattr(distributed_c10d, "_world", None)
    names = getattr(world, "pg_names", {})
    members = getattr(world, "pg_group_ranks", {})
    return {
        str(names.get(group, "")): {
            "ranks": sorted(ranks, key=ranks.__getitem__),
            "timeout": _group_timeout(group),
        }
        for group, ranks in list(members.items())
    }


def group_name(group: Any) -> str:
    """Return the name by which torch's flight recorder knows a group, None being the default."""
    distributed_c10d = sys.modules.get("torch.distributed.distributed_c10d")
    world = getattr(distributed_c10d, "_world", None)
    if group is None:
        group = getattr(world, "default_pg", None)
    return str(getattr(world, "pg_names", {}).get(group, ""))


def _group_timeout(group: Any) -> float | None:
    """Return a group's timeout in seconds (`ProcessGroupGloo.options._timeout`), if told."""
    try:
        import torch

        options = group._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return None


def intercept_operators(
    namespace: str,
    names: Sequence[str],
    around: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any],
) -> Callable[[], None] | None:
    """Have every call of these operators, from any thread or language, pass through a function.

    The function stands at the key BackendSelect: that is in force for every call, comes before
    all backends, and is empty for these operators (torch 2.11 to 2.13: `DispatchKey`,
    `_dispatch_keyset_full_after`, `OpOverload.redispatch`, `Library._destroy`).

    Args:
        namespace: of the operators.
        names: operators; those that this torch does not have are left out.
        around: called with the operator's name, its arguments, and a function that runs it.

    Returns:
        A function that ends it, None where this torch does not let us.
    """
    import torch

    key = getattr(getattr(torch._C, "DispatchKey", None), "BackendSelect", None)
    keys_after = getattr(torch._C, "_dispatch_keyset_full_after", None)
    packets = [getattr(getattr(torch.ops, namespace), name, None) for name in names]
    operators = {packet.__name__: packet.default for packet in packets if packet is not None}
    can_go_on = all(hasattr(operator, "redispatch") for operator in operators.values())
    if key is None or keys_after is None or not can_go_on:
        return None
    library = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]
    below = keys_after(key)

    def stand_before(name: str, operator: Any) -> None:
        def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            issue = functools.partial(operator.redispatch, keyset & below, *args, **kwargs)
            return around(name, args, issue)

        library.impl(name, kernel, "BackendSelect", with_keyset=True)  # type: ignore[no-untyped-call]

    for name, operator in operators.items():
        stand_before(name, operator)
    return getattr(library, "_destroy", lambda: None)


def process_group_among(arguments: Sequence[Any]) -> Any:
    """Return the process group among an operator's arguments, None where there is none.

    Operators get it wrapped (torch 2.11 to 2.13: `torch._C.ScriptObject`, `ProcessGroup.unbox`).
    """
    import torch
    from torch.distributed import ProcessGroup

    for one in arguments:
        if isinstance(one, ProcessGroup):
            return one
        if isinstance(one, torch._C.ScriptObject):
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                return ProcessGroup.unbox(one)
    return None


def work_class() -> Any:
    """Return the class of what a collective returns (torch 2.11 to 2.13: `distributed._Work`)."""
    import torch.distributed as dist

    return dist._Work  # type: ignore[attr-defined]


def unbox_work(boxed: Any) -> Any:
    """Return the work that an operator wrapped, None where it returned none (`Work.unbox`)."""
    return None if boxed is None else work_class().unbox(boxed)


# ---- pytest 8.4 to 9.2


def stop_capture(config: pytest.Config) -> None:
    """Stop pytest's global capture, giving 0 to 2 back (`CaptureManager`, no public way)."""
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is not None:
        manager.suspend_global_capture(in_=True)
        manager.stop_global_capturing()


def start_capture(config: pytest.Config) -> tuple[int, ...]:
    """Start pytest's global capture anew, on files of this process; it waits suspended.

    Returns:
        Descriptors of the files that hold what 1 and 2 got, where those are captured.
    """
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is None:
        return ()
    manager.start_global_capturing()
    files = (os.dup(1), os.dup(2)) if config.option.capture == "fd" else ()
    manager.suspend_global_capture()
    return files


def base_temp(config: pytest.Config) -> Path:
    """Return the session's base temporary folder (`tmp_path_factory` is only a fixture).

    With `-p no:tmpdir` it is one of our own, which ends with the session.
    """
    if (factory := getattr(config, "_tmp_path_factory", None)) is not None:
        return Path(factory.getbasetemp())
    return _own_temp(config)


@functools.cache
def _own_temp(config: pytest.Config) -> Path:
    above = tempfile.mkdtemp(prefix="pytest-ranks-")
    config.add_cleanup(lambda: shutil.rmtree(above, ignore_errors=True))
    own = Path(above, "base")  # xdist's workers have what they share above their own
    own.mkdir()
    return own


def set_base_temp(config: pytest.Config, folder: Path) -> None:
    """Have `tmp_path` make its folders below this one.

    Else each rank would remove `--basetemp`, or take a numbered folder of its own and never
    clean it up.
    """
    factory = getattr(config, "_tmp_path_factory", None)
    if factory is not None and factory._basetemp != folder:
        folder.mkdir(parents=True, exist_ok=True)
        factory._basetemp = folder
        if hasattr(factory, "_next_number"):  # 9.1: prefix -> next number, of the old folder
            factory._next_number = {}


def run_protocol(item: pytest.Item, following: pytest.Item | None) -> None:
    """Run setup, call and teardown of an item without reporting hooks."""
    from _pytest.runner import runtestprotocol

    runtestprotocol(item, log=False, nextitem=following)


def session_end_of(error: BaseException) -> tuple[str, int | None] | None:
    """Return message and status of a `pytest.exit`, None for anything else.

    By name (`_pytest.outcomes.Exit`), because a rank that runs a function has no pytest to ask.
    """
    if type(error).__qualname__ != "Exit" or type(error).__module__ != "_pytest.outcomes":
        return None
    return str(getattr(error, "msg", "")), getattr(error, "returncode", None)


def is_set_up_for(session: pytest.Session, item: pytest.Item) -> bool:
    """Return whether the live fixture scopes all belong to an item."""
    stack = list(session._setupstate.stack)
    return stack == item.listchain()[: len(stack)]


def set_up(item: pytest.Item) -> None:
    """Set up an item, and what of its scopes is not alive yet."""
    item.session._setupstate.setup(item)


def tear_down_to(session: pytest.Session, item: pytest.Item | None) -> None:
    """Tear down all live fixture scopes that an item does not share."""
    session._setupstate.teardown_exact(item)


def timeout_of(item: pytest.Item) -> float | None:
    """Return what pytest-timeout allows an item, in seconds, None where it allows all."""
    mark = item.get_closest_marker("timeout")
    if mark is not None:
        found = mark.args[0] if mark.args else mark.kwargs.get("timeout")
    else:
        found = getattr(item.config, "_env_timeout", None)
    return float(found) if isinstance(found, int | float) and found > 0 else None


def report_from_data(config: pytest.Config, data: dict[str, Any]) -> Any:
    """Return the report that a rank serialised."""
    return config.hook.pytest_report_from_serializable(config=config, data=dict(data))


def longrepr_text(longrepr: Any) -> str:
    """Return a serialised longrepr as text: its last error's lines."""
    if not isinstance(longrepr, dict):
        return "" if longrepr is None else str(longrepr)
    lines: list[str] = []
    for traceback, _, description in longrepr.get("chain") or [(longrepr["reprtraceback"], 0, "")]:
        for entry in traceback["reprentries"]:
            lines += entry["data"]["lines"]
        if description:
            lines.append(description)
    return "\n".join(lines)


def make_longrepr(
    item: pytest.Item, *, head: str, below: str = "", inner: Any, text: str, tail: str
) -> Any:
    """Return what pytest prints for a failure: a headline, a traceback or text, and a tail.

    Made of pytest's own classes, because only those travel from an xdist worker.

    Args:
        item: the failed item.
        head: first line, and what the short summary shows.
        below: lines right below it, empty for none.
        inner: longrepr of the rank that failed first, None where it has none.
        text: what to print in its place.
        tail: last lines.
    """
    from _pytest._code.code import (
        ExceptionChainRepr,
        ReprEntryNative,
        ReprFileLocation,
        ReprTraceback,
    )

    def block(text: str) -> Any:
        entry = ReprEntryNative(lines=[f"{line}\n" for line in text.splitlines()])
        return ReprTraceback(reprentries=[entry], extraline=None, style="native")

    crash = getattr(inner, "reprcrash", None)
    if crash is not None:
        place = ReprFileLocation(crash.path, crash.lineno, head)
    else:
        file, line, _ = item.location
        place = ReprFileLocation(str(file), (line or 0) + 1, head)
    chain: list[Any] = [(block(f"{head}\n{below}" if below else head), None, None)]
    is_told = head.endswith(str(inner).strip())  # such as of `pytest.fail("no", pytrace=False)`
    if isinstance(inner, ExceptionChainRepr):
        chain += [] if is_told else inner.chain
    elif inner is not None and not is_told:
        chain.append((block(str(inner)), None, None))
    elif text:
        chain.append((block(text), None, None))
    chain.append((block(tail), place, None))
    return ExceptionChainRepr(chain)


def show_junit(config: pytest.Config, view: Callable[[Any], Any]) -> None:
    """Have pytest's junitxml plugin write the output of a view of each report.

    `LogXML.node_reporter` and `_NodeReporter.write_captured_output` have no public way; where
    they are gone, output is written without its ranks.
    """
    from _pytest import junitxml

    key = getattr(junitxml, "xml_key", None)
    xml = None if key is None else config.stash.get(key, None)
    reporter_of = getattr(xml, "node_reporter", None)
    if reporter_of is None:
        return

    def node_reporter(report: Any) -> Any:
        reporter = reporter_of(report)
        write = getattr(reporter, "write_captured_output", None)
        if write is not None and "write_captured_output" not in vars(reporter):
            reporter.write_captured_output = lambda report: write(view(report))
        return reporter

    xml.node_reporter = node_reporter  # type: ignore[union-attr]


def fixture_definitions(item: pytest.Item) -> list[pytest.FixtureDef[Any]]:
    """Return the definitions of all fixtures that an item uses, autouse ones included."""
    info = getattr(item, "_fixtureinfo", None)
    if info is None:
        return []
    return [one for definitions in info.name2fixturedefs.values() for one in definitions]
