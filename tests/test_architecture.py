"""The house's rules, read from the sources: who may import whom, how long, and what loads torch."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import pytest_ranks

PACKAGE = Path(pytest_ranks.__file__).parent
NAME = "pytest_ranks"
MOST_LINES = 400
MOST_FUNCTION_LINES = 50
HEAVY = ("torch", "numpy", "transformers", "asyncio")

# From the ground up: a room imports from the floors below its own and from itself, never from a
# neighbour or from above. A dotted room is one module that stands apart from its folder: most are
# the face that a room shows to pytest, which may know what the marks and options say.
FLOORS = (
    (
        "errors",
        "__init__",
        "_compat",
        "_compat_fidelity",
        "_compat_kept",
        "_compat_terminal",
        "_compat_state",
        "launch.spec",
        "launch.channel",
        "launch.wire",
        "launch.terminal.asides",
        "launch.fidelity.ladder",
        "report.records",
    ),
    ("hardware", "models", "observe", "tiers"),
    ("option_table",),
    ("options", "mark_arguments"),
    ("launch", "reference"),
    ("conformance", "preflight"),
    ("subjects",),
    ("reference.mutants",),
    ("marks", "hookspecs"),
    (
        "launch.items",
        "launch.scan",
        "launch.attached",
        "launch.machines.rank_zero",
        "launch.machines.rank_other",
        "conformance.parametrize",
        "conformance.command",
        "conformance.conftest",
        "fixtures",
        "report",
    ),
    ("plugin",),
)
# Rooms on one floor of which the first may know the second.
NEIGHBOURS = {
    "_compat_fidelity": {"errors"},
    "_compat_terminal": {"_compat_state"},
    "launch.channel": {"errors", "_compat"},
    "launch.wire": {"errors", "_compat", "launch.terminal.asides"},
    "launch.spec": {"errors", "_compat", "launch.fidelity.ladder"},
    "launch.fidelity.ladder": {"errors", "launch.spec"},
    "launch.scan": {"launch.items", "launch.machines.rank_other"},
    "launch.attached": {"launch.machines.rank_zero", "launch.machines.rank_other"},
    "launch.machines.rank_zero": {"launch.attached", "launch.items"},
    "launch.machines.rank_other": {"launch.attached"},
    "conformance.command": {"conformance.parametrize"},
    "conformance.conftest": {"conformance.parametrize", "conformance.command"},
}
# Runs in the ranks, where nothing of the controller may come along: what it loads, and why.
RANK = "launch.rank"
RANK_MODULES = {
    "__init__": "the package itself",
    "errors": "the exceptions that users catch",
    "_compat": "private names of torch and pytest",
    "_compat_kept": "private names of torch that the proof of a clean group needs",
    "launch": "the folder",
    "launch.channel": "the socket to the controller",
    "launch.wire": "what is said over it",
    "launch.terminal.asides": "what is said beside the work",
    "launch.fidelity": "the folder",
    "launch.fidelity.ladder": "which fidelities one process plays",
    "launch.hygiene": "what a test left behind",
    "launch.group": "the process group that the rank joins",
    "launch.rank_context": "what a test knows of its rank",
    "launch.own_address": "how a test's own world meets at a port of its own",
    "launch.resolver": "the look-up of names while it meets its store",
    "launch.seeding": "the random generators, seeded before each test",
    "launch.startline": "where the ranks of a run wait for each other",
    "launch.kept": "what was done on a process group that is kept",
    "launch.processes": "the signal that dumps its stacks",
    "launch.deadline": "the collective that a stack waits in",
    "launch.target": "the function that it calls",
    "launch.coverage": "which lines the rank executes, for a controller that measures them",
    "launch.forensics.witness": "the thread that tells what the rank is doing",
}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """Return the most special room that the module belongs to."""
        rooms = [room for floor in FLOORS for room in floor]
        fits = [room for room in rooms if self.name == room or self.name.startswith(room + ".")]
        return max(fits, key=len, default=self.name)


@dataclass
class Imports:
    """What a module imports: when it is loaded, or later, inside functions."""

    loaded: dict[str, int] = field(default_factory=dict)
    later: dict[str, int] = field(default_factory=dict)


@cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = Module(name, path, ast.parse(path.read_text()))
    return found


@cache
def imports_of(module: Module) -> Imports:
    found = Imports()
    visit(module, module.tree, found.loaded, found.later)
    return found


def visit(module: Module, node: ast.AST, here: dict[str, int], later: dict[str, int]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                visit(module, ast.Module([other], []), here, later)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            visit(module, child, later, later)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            for name in named(module, child):
                here.setdefault(name, child.lineno)
        else:
            visit(module, child, here, later)


def named(module: Module, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the modules that an import statement names, ours without the package's name."""
    if isinstance(node, ast.Import):
        return [ours(alias.name) for alias in node.names]
    base = node.module or ""
    if node.level:
        is_package = module.path.name == "__init__.py"
        parents = [NAME, *module.name.split(".")] if module.name != "__init__" else [NAME]
        kept = parents[: len(parents) - node.level + (1 if is_package else 0)]
        base = ".".join([*kept, *([base] if base else [])])
    inside = [f"{base}.{alias.name}" for alias in node.names]
    known = [name for name in inside if ours(name) in modules()]
    return [ours(name) for name in known] or [ours(base)]


def ours(name: str) -> str:
    if name == NAME:
        return "__init__"
    return name.removeprefix(f"{NAME}.")


def re_exports(module: Module, target: Module) -> bool:
    """Return whether a folder's `__init__` names what lies in the folder."""
    return module.path.name == "__init__.py" and target.name.startswith(f"{module.name}.")


def floor_of(room: str) -> int | None:
    return next((n for n, rooms in enumerate(FLOORS) if room in rooms), None)


def every_import(module: Module) -> dict[str, int]:
    found = imports_of(module)
    return {**found.later, **found.loaded}


@pytest.mark.parametrize("module", modules().values(), ids=lambda module: module.name)
def test_a_room_imports_only_from_the_floors_below_it(module: Module) -> None:
    floor = floor_of(module.room)
    assert floor is not None, (
        f"{module.path}: {module.room!r} has no place in the house; give it one in FLOORS"
    )
    wrong = []
    for name, line in every_import(module).items():
        target = modules().get(name)
        if target is None or target.room == module.room:
            continue
        if target.room in NEIGHBOURS.get(module.room, ()) or re_exports(module, target):
            continue
        other = floor_of(target.room)
        if other is None or other >= floor:
            wrong.append(f"{module.path}:{line}: {module.name} imports {name}")
    below = [room for rooms in FLOORS[:floor] for room in rooms]
    assert not wrong, (
        "\n".join(wrong)
        + f"\n{module.room!r} is on floor {floor} and may import only {', '.join(below) or 'nothing'}; "
        "pass the value in, or move what both need to a lower floor"
    )


def test_the_rank_brings_nothing_of_the_controller_along() -> None:
    module = modules().get(RANK)
    if module is None:
        pytest.skip(f"there is no {RANK} yet")
    seen: dict[str, str] = {}
    waiting = [(RANK, RANK)]
    while waiting:
        name, way = waiting.pop()
        for other in imports_of(modules()[name]).loaded:
            if other in modules() and other not in seen:
                seen[other] = f"{way} -> {other}"
                waiting.append((other, seen[other]))
    foreign = [way for name, way in seen.items() if name not in RANK_MODULES]
    assert not foreign, (
        "\n".join(foreign) + f"\n{RANK} runs in every rank and may load only "
        f"{', '.join(RANK_MODULES)}; import it inside the function that needs it, or not at all"
    )


@pytest.mark.parametrize("module", modules().values(), ids=lambda module: module.name)
def test_a_file_holds_one_idea(module: Module) -> None:
    lines = len(module.path.read_text().splitlines())
    assert lines <= MOST_LINES, (
        f"{module.path}: {lines} lines, expected at most {MOST_LINES}; it holds two ideas, split it"
    )


@pytest.mark.parametrize("module", modules().values(), ids=lambda module: module.name)
def test_a_function_fits_on_a_screen(module: Module) -> None:
    long = [
        f"{module.path}:{node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := lines_of_code(node)) > MOST_FUNCTION_LINES
    ]
    assert not long, (
        "\n".join(long) + f"\nexpected at most {MOST_FUNCTION_LINES}; name its parts and split it"
    )


def lines_of_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines; a docstring as long as its arguments ask for is no fault.

    Nor is a command with many options, which typer reads off its arguments: one a line.
    """
    first = node.body[0]
    documented = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
    is_command = any(".command(" in ast.unparse(decorator) for decorator in node.decorator_list)
    declared = first.lineno - node.lineno if is_command else 0
    return (node.end_lineno or 0) - node.lineno + 1 - documented - declared


def test_ranks_over_many_machines_do_all_that_ranks_do() -> None:
    """What they would inherit works on processes of this machine, of which they have none."""

    def methods(module: str, name: str) -> set[str]:
        tree = modules()[module].tree
        body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name).body
        return {one.name for one in body if isinstance(one, ast.FunctionDef) and one.name[0] != "_"}

    missing = methods("launch.pool", "Ranks") - methods("launch.machines.spread", "SpreadRanks")
    assert not missing, f"launch.machines.spread.SpreadRanks has to say what it does for {missing}"


def test_loading_the_plugin_loads_nothing_heavy() -> None:
    heavy = []
    ways = {"plugin": "plugin", "fixtures": "plugin -> fixtures"}
    waiting = list(ways)
    while waiting:
        name = waiting.pop()
        module = modules().get(name)
        if module is None:
            continue
        for other, line in imports_of(module).loaded.items():
            top = other.partition(".")[0]
            if other not in modules() and top in HEAVY:
                heavy.append(f"{module.path}:{line}: {ways[name]} -> {other}")
            # Importing a module loads the packages around it first.
            for loaded in [other, *parents(other)]:
                if loaded in modules() and loaded not in ways:
                    ways[loaded] = f"{ways[name]} -> {loaded}"
                    waiting.append(loaded)
    assert not heavy, (
        "\n".join(heavy) + f"\nevery pytest session would load it; import {', '.join(HEAVY)} "
        "inside the functions that need them"
    )


def parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def test_the_rules_are_read_from_real_imports(tmp_path: Path) -> None:
    """Hold the reader itself: what it must see, and what it must not."""
    source = """
from typing import TYPE_CHECKING
import torch.distributed
if TYPE_CHECKING:
    from pytest_ranks.launch import pool
else:
    import numpy
try:
    from pytest_ranks import errors
except ImportError:
    from .machine import Machine
def later():
    from pytest_ranks.launch.spec import RankSpec
class Body:
    from pytest_ranks.hardware import found
"""
    module = Module("hardware.sample", PACKAGE / "hardware" / "sample.py", ast.parse(source))
    found = imports_of(module)
    assert set(found.loaded) == {
        "typing",
        "torch.distributed",
        "numpy",
        "errors",
        "hardware.machine",
        "hardware.found",
    }
    assert set(found.later) == {"launch.spec"}
