"""Write the reference pages that the code knows: `python docs/generate.py` fills docs/reference/generated.

Facts have one home: a mark's signature, an option's default, a check's claim stand in the code, and
these pages are made from there before each build.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks import fixtures, hookspecs, marks, options
from pytest_ranks.conformance.check import Check, all_checks, suites
from pytest_ranks.conformance.job import Job, Optimizer
from pytest_ranks.conformance.subject import Capabilities, Trained
from pytest_ranks.reference.mutants import all_mutants

if TYPE_CHECKING:
    from types import ModuleType

    from pytest_ranks.reference.mutants.planted import Mutant

OUT = Path(__file__).parent / "reference" / "generated"

API = {
    "conformance": ("pytest_ranks.conformance", None),
    "models": ("pytest_ranks.models", None),
    "launch": (
        "pytest_ranks.launch",
        (
            "rank_context:RankContext()",
            "rank_context:current_rank",
            "functions:Launcher()",
            "functions:ScriptResult",
            "host:RankHost",
            "faults:Faults()",
            "faults:inject_faults",
            "injection.triggers:step",
            "injection.triggers:AtStep",
        ),
    ),
    "reference": ("pytest_ranks.reference", None),
    "errors": (
        "pytest_ranks.errors",
        (
            ":BadInputError",
            ":FidelityError",
            ":UnavailableError",
            ":RankFailure",
            ":RankTimeout",
        ),
    ),
}
"""Page -> module, and what of it is public: None means its `__all__`. With `()` the constructor is ours alone."""


def main() -> None:
    """Write every page afresh."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "checks").mkdir(parents=True)
    (OUT / "api").mkdir()
    for name, text in pages().items():
        (OUT / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"{len(list(OUT.rglob('*.md')))} pages in {OUT}")


def pages() -> dict[str, str]:
    """Return every generated page by its name."""
    mutants = all_mutants()
    found = {
        "marks": marks_page(),
        "fixtures": fixtures_page(),
        "options": options_page(),
        "capabilities": capabilities_page(),
        "job": job_page(),
        "kill_matrix": kill_matrix_page(mutants),
        "checks/index": checks_index(),
    }
    found |= {f"checks/{suite}": suite_page(suite, mutants) for suite in suites()}
    found |= {f"api/{name}": api_page(*place) for name, place in API.items()}
    return found


def marks_page() -> str:
    """Return the marks with their signatures."""
    return f"# Marks\n\n{marks.markdown()}\n{cell_note('pytest --markers')}"


def options_page() -> str:
    """Return command line options, ini settings and environment variables."""
    order = (
        "The command line comes before the environment, that before the ini file, that before the default. "
        "The session's header names the source of every value that is not the default."
    )
    return f"# Options\n\n{options.markdown()}\n{order}\n\n{cell_note('pytest --help')}"


def cell_note(command: str) -> str:
    """Return where the terminal shows the same."""
    return f"`{command}` prints the same.\n"


def fixtures_page() -> str:
    """Return fixtures and hooks with their docstrings."""
    parts = ["# Fixtures and hooks\n"]
    for function in functions_of(fixtures):
        decorators = [d for d in function.decorator_list if "fixture" in ast.unparse(d)]
        if not decorators:
            continue
        scope = re.search(r"scope='(\w+)'", ast.unparse(decorators[0]))
        parts.append(f"## `{function.name}`\n")
        parts.append(f"Scope: {scope[1] if scope else 'function'}.\n")
        parts.append(f"{ast.get_docstring(function)}\n")
    for function in functions_of(hookspecs):
        parts.append(f"## Hook `{function.name}({ast.unparse(function.args)})`\n")
        parts.append(f"{fenced(ast.get_docstring(function) or '')}\n")
    return "\n".join(parts)


def functions_of(module: ModuleType) -> list[ast.FunctionDef]:
    """Return the public functions of a module, as they are written."""
    tree = ast.parse(inspect.getsource(module))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if not node.name.startswith("_")]


def fenced(text: str) -> str:
    """Return a docstring with its indented blocks as fenced Python."""

    def fence(match: re.Match[str]) -> str:
        return f"\n\n```python\n{inspect.cleandoc(match[0])}\n```\n"

    return re.sub(r"\n\n(?: {4}.*\n?|\n(?= {4}))+", fence, text)


def capabilities_page() -> str:
    """Return what a subject can declare, and which checks ask for it."""
    asked: dict[str, list[Check]] = defaultdict(list)
    for check in all_checks().values():
        for requirement in check.requires:
            asked[requirement.partition(":")[0]].append(check)
    lines = [
        "# Capabilities\n",
        "What a class declares as `capabilities = Capabilities(...)`. "
        "A check that asks for something undeclared is not applicable, and is counted as such.\n",
        "| capability | default | what it says | checks that ask for it |",
        "| --- | --- | --- | --- |",
    ]
    for field, text in described(Capabilities):
        checks = ", ".join(link(check) for check in asked[field.name])
        lines.append(f"| `{field.name}` | {default_of(field)} | {text} | {checks} |")
    return "\n".join(lines) + "\n"


def job_page() -> str:
    """Return the fields of what a subject is asked to do, and of what it returns."""
    parts = ["# Job and Trained\n", f"{summary(Job)}\n"]
    parts += [fields_table(Job), "## What a job can do\n"]
    for name in ("global_batch", "build_model", "write_data"):
        kind = "autoattribute" if isinstance(vars(Job)[name], property) else "automethod"
        parts.append(directive(f".. {kind}:: pytest_ranks.conformance.job.Job.{name}"))
    parts += [f"## `job.optimizer`\n\n{summary(Optimizer)}\n", fields_table(Optimizer)]
    parts += [f"## `Trained`\n\n{summary(Trained)}\n", fields_table(Trained)]
    return "\n".join(parts)


def fields_table(cls: type[Any]) -> str:
    """Return a dataclass's fields as a table."""
    lines = ["| field | type | default | what it says |", "| --- | --- | --- | --- |"]
    for field, text in described(cls):
        kind = str(field.type).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{kind}` | {default_of(field)} | {text} |")
    return "\n".join(lines) + "\n"


def described(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], str]]:
    """Return a dataclass's fields, each with what the class's docstring says about it."""
    _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    texts = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    }
    missing = [field.name for field in dataclasses.fields(cls) if field.name not in texts]
    if missing:
        raise SystemExit(f"{cls.__name__}: the docstring does not describe {', '.join(missing)}")
    return [(field, texts[field.name]) for field in dataclasses.fields(cls)]


def summary(cls: type[Any]) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(cls) or "").splitlines()[0]


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as a user would write it."""
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return ""
        value = field.default_factory()
        if dataclasses.is_dataclass(value):
            return f"`{type(value).__name__}()`"
    if isinstance(value, frozenset):
        return f"`{{{', '.join(sorted(map(repr, value)))}}}`"
    return f"`{value!r}`"


def checks_index() -> str:
    """Return the suites, each with its checks and claims."""
    checks = all_checks().values()
    lines = [f"# Checks\n\n{len(checks)} checks in {len(suites())} suites.\n"]
    for suite in suites():
        mine = [check for check in checks if check.suite == suite]
        lines += [f"## {suite}\n", f"{question(mine[0])}\n", "| check | claim |", "| --- | --- |"]
        lines += [f"| {link(check, at='')} | {check.part('Claim')} |" for check in mine]
        lines.append("")
    lines += [
        "```{toctree}\n:hidden:\n",
        *suites(),
        "```",
        "",
        cell_note("pytest --ranks-list-checks"),
    ]
    return "\n".join(lines)


def question(check: Check) -> str:
    """Return what the check's suite asks."""
    return (importlib.import_module(check.run.__module__).__doc__ or "").strip().splitlines()[0]


def link(check: Check, *, at: str = "checks/") -> str:
    """Return a link to a check from a page; `at` leads from there to the folder of the suites."""
    return f"[`{check.id}`]({at}{check.suite}.md#{anchor(check)})"


def anchor(check: Check) -> str:
    """Return the anchor that a heading with the check's id gets."""
    return check.id.replace(".", "")


def suite_page(suite: str, mutants: tuple[Mutant, ...]) -> str:
    """Return all that is known about the checks of a suite."""
    mine = [check for check in all_checks().values() if check.suite == suite]
    parts = [f"# Suite {suite}\n", f"{question(mine[0])}\n"]
    for check in mine:
        parts += [f"## `{check.id}`\n", f"{(inspect.getdoc(check.run) or '').splitlines()[0]}\n"]
        for part in ("Claim", "Why it matters", "Likely causes"):
            parts.append(f"{part}\n: {check.part(part)}\n")
        parts.append(f"Reference\n: {urls(check.part('Reference'))}\n")
        needs = ", ".join(f"`{name}`" for name in check.requires) or "nothing beyond `train`"
        parts.append(f"Needs\n: {needs}\n")
        worlds = ", ".join(map(str, check.worlds))
        strategies = ", ".join(f"`{name}`" for name in check.strategies)
        parts.append(f"Judged on\n: {worlds} ranks where declared; strategies {strategies}\n")
        kills = [m for m in mutants if any(name.partition("[")[0] == check.id for name in m.kills)]
        names = ", ".join(f"[`{m.name}`](../kill_matrix.md#{m.suite})" for m in kills)
        parts.append(f"Planted bugs that it must find\n: {names or 'none yet'}\n")
        parts.append(f"Since\n: {check.since}\n")
    return "\n".join(parts)


def urls(text: str) -> str:
    """Return a text with its addresses as links."""
    return re.sub(r"https?://\S+", lambda match: f"<{match[0]}>", text)


def kill_matrix_page(mutants: tuple[Mutant, ...]) -> str:
    """Return the planted bugs, each with the checks that must find it."""
    by_id = all_checks()
    parts = [
        "# Planted bugs\n",
        f"{len(mutants)} bugs, each planted alone into a correct trainer. `pytest --ranks-self-check` trains "
        "each of them and passes only if every check in its row finds the bug and names its cause, and "
        "if the same trainer without the bug passes all of these checks. "
        "Each is a subject that you can run: "
        "`--ranks-subject=pytest_ranks.reference.mutants:MeanOfMeans`.\n",
        "A bug from a public report links to it. Bugs of one row are of one kind.\n",
    ]
    for suite in dict.fromkeys(mutant.suite for mutant in mutants):
        parts += [
            f"## {suite}\n",
            "| bug | row | what is wrong | found by |",
            "| --- | --- | --- | --- |",
        ]
        for m in mutants:
            if m.suite == suite:
                row = f"[{m.row}]({m.issue})" if m.issue else m.row
                kills = "<br>".join(kill_link(name, by_id) for name in m.kills)
                parts.append(
                    f"| `{m.name}` | {row} | {m.summary.replace('|', chr(92) + '|')} | {kills} |"
                )
        parts.append("")
    return "\n".join(parts)


def kill_link(name: str, by_id: dict[str, Check]) -> str:
    """Return a check with its setting as a link."""
    check = by_id[name.partition("[")[0]]
    return f"[`{name}`](checks/{check.suite}.md#{anchor(check)})"


def api_page(module_name: str, names: tuple[str, ...] | None) -> str:
    """Return the directives that make a module's public names into a page."""
    module = importlib.import_module(module_name)
    parts = [f"# {module_name}\n", f"{(inspect.getdoc(module) or '').splitlines()[0]}\n"]
    for name in names or tuple(module.__all__):
        submodule, _, attribute = name.rpartition(":")
        home = f"{module_name}.{submodule}" if submodule else module_name
        value = getattr(importlib.import_module(home), attribute.removesuffix("()"))
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        members = "\n   :members:" if kind == "autoclass" else ""
        # Under the name that users import.
        parts.append(directive(f".. {kind}:: {home}.{attribute}{members}"))
    return "\n".join(parts)


def directive(text: str) -> str:
    """Return a reStructuredText directive for a Markdown page."""
    return f"```{{eval-rst}}\n{text}\n```\n"


if __name__ == "__main__":
    main()
