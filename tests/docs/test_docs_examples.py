"""The documentation's examples run, and print what the pages say that they print."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from pytest_ranks.conformance import Capabilities
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.report.verdict import reasons

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page
    for page in DOCS.rglob("*.md")
    if not {"generated", "_build"} & {*page.relative_to(DOCS).parts}
)
QUICKSTART = DOCS / "tutorial" / "quickstart.md"
PLAIN = Capabilities(gradient_accumulation=True)  # what the quickstart's subject declares
VERDICT = ("-p", "no:randomly", "--pyargs", "pytest_ranks.conformance")


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def named_files(pages):
    """Return the blocks that begin with `# name.py`, as files."""
    found = {}
    for page in pages:
        for block in blocks(page, "python"):
            if match := re.match(r"# (\w+\.py)\n", block):
                assert match[1] not in found, f"two examples are called {match[1]}"
                found[match[1]] = block
    return found


def after(patch, source):
    """Return a source with the parts of a diff replaced; `...` stands for lines between them."""
    for part in patch.split("...\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert source.count(old) == 1, f"the fix does not apply: {old!r}"
        source = source.replace(old, new)
    return source


def shown(text):
    """Return a line's part that does not depend on the processor: `match 5e-08` is rounding noise."""
    return re.sub(r"match \d+e-\d+", "match ...", text).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_the_page_compiles_and_imports_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_ranks"):
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"


def test_example_tests_pass_on_ranks(pytester):
    files = {n: text for n, text in named_files(PAGES).items() if n.startswith("test_")}
    needs = files.pop("test_needs.py")
    for name, text in files.items():
        (pytester.path / name).write_text(text)
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-rA")
    expected = sum(text.count("def test_") for text in files.values())
    # Two examples list world sizes, [1, 2, 4] and [1, 2]; one lists two fidelities.
    result.assert_outcomes(passed=expected + 2 + 1 + 1)
    assert needs.count("@pytest.mark.") == needs.count("def test_")


def test_hardware_examples_have_marks_that_can_be_used(pytester):
    pytester.makepyfile(named_files(PAGES)["test_needs.py"])
    outcomes = pytester.runpytest_inprocess("-p", "no:randomly").parseoutcomes()
    assert set(outcomes) <= {"passed", "skipped"}
    assert sum(outcomes.values()) == 5


def test_verdict_of_the_quickstart_is_what_it_shows(pytester):
    (pytester.path / "my_trainer.py").write_text(named_files([QUICKSTART])["my_trainer.py"])
    subject = "--ranks-subject=my_trainer.py:MyTrainer"
    result = pytester.runpytest_subprocess(*VERDICT, subject, "--ranks-suite=loss")
    printed = [shown(line.replace(f"{pytester.path}/", "")) for line in result.outlines]
    finding, verdict = blocks(QUICKSTART, "text")[1:3]
    for line in map(shown, (finding + verdict).splitlines()):
        assert any(found.startswith(line) for found in printed), f"not printed: {line!r}"


def test_fix_of_the_quickstart_passes(pytester):
    fixed = after(*blocks(QUICKSTART, "diff"), named_files([QUICKSTART])["my_trainer.py"])
    (pytester.path / "my_trainer.py").write_text(fixed)
    claims = "--ranks-suite=loss.token_weights,loss.partial_window"
    subject = "--ranks-subject=my_trainer.py:MyTrainer"
    result = pytester.runpytest_subprocess(*VERDICT, subject, claims)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["PASSED: verified 2 of 2 claims in 1 setting"])


def not_applicable(planned):
    check, setting, _ = planned
    outcome = "passed" if setting is not None else "not applicable"
    return {"check": check.id, "setting": "", "outcome": outcome, "text": check.unmet(PLAIN)}


def test_table_of_the_quickstart_counts_the_claims_that_there_are():
    planned = plan_for(PLAIN, None)
    judged = Counter(check.suite for check, setting, _ in planned if setting is not None)
    table = blocks(QUICKSTART, "text")[3]
    for suite in {check.suite for check, _, _ in planned}:
        count = judged[suite]
        row = rf"^{suite} +{count} +{count} +-$" if count else rf"^{suite} +-  not applicable$"
        assert re.search(row, table, re.MULTILINE), f"{suite}: {count} claims are judged"
    why = [line for line, _ in reasons([*map(not_applicable, planned)])]
    assert [line for line in table.splitlines() if line.startswith("not applicable")] == why
    assert f"PASSED: verified {judged.total()} of {len(planned)} claims" in table


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([a-z-]+/\w+)$", index, re.MULTILINE))
    written = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"}
    assert written == listed
