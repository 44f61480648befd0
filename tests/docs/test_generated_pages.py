"""The reference pages are made from the code, and nothing that the code knows is left out."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from pytest_ranks.conformance.check import all_checks
from pytest_ranks.conformance.subject import Capabilities
from pytest_ranks.option_table import TABLE
from pytest_ranks.reference.mutants import all_mutants

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate):
    return generate.pages()


def test_every_check_has_a_section_with_all_its_parts(pages):
    for check in all_checks().values():
        section = pages[f"checks/{check.suite}"].partition(f"## `{check.id}`\n")[2]
        section = section.partition("\n## ")[0]
        for part in ("Claim", "Why it matters", "Likely causes", "Reference"):
            said = re.search(rf"^{part}\n: (.+)$", section, re.MULTILINE)
            assert said, f"{check.id}: {part}"
        assert check.part("Claim") in section


def test_a_check_is_linked_to_the_bugs_that_it_must_find(pages):
    section = pages["checks/loss"].partition("## `loss.token_weights`\n")[2].partition("\n## ")[0]
    assert "[`MeanOfMeans`](../kill_matrix.md#loss)" in section
    assert "`PromptsTrained`" not in section


def test_kill_matrix_has_every_bug_with_every_check_that_finds_it(pages):
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", pages["kill_matrix"], re.MULTILINE)
    found = {name: re.findall(r"\[`([^`]+)`\]", kills) for name, kills in rows}
    assert found == {mutant.name: [*mutant.kills] for mutant in all_mutants()}


def test_capabilities_name_the_checks_that_ask_for_them(pages):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", pages["capabilities"], re.MULTILINE))
    assert list(rows) == [field.name for field in dataclasses.fields(Capabilities)]
    for check in all_checks().values():
        for requirement in check.requires:
            assert f"[`{check.id}`]" in rows[requirement.partition(":")[0]]


def test_every_option_and_fixture_is_there(pages):
    for row in TABLE:
        assert (row.option if row.flag else row.setting) in pages["options"]
    assert re.findall(r"^## `(\w+)`$", pages["fixtures"], re.MULTILINE) == [
        "rank",
        "ranks_fidelity",
        "faults",
        "launch",
        "tiny_model",
    ]


def test_every_generated_page_is_in_the_index(pages):
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    top = {name for name in pages if not name.startswith("checks/")} | {"checks/index"}
    assert set(re.findall(r"^reference/generated/(\S+)$", index, re.MULTILINE)) == top


def test_a_field_that_the_docstring_leaves_out_is_refused(generate):
    @dataclasses.dataclass
    class Settings:
        """Hold settings.

        Attributes:
            lr: the learning rate.
        """

        lr: float = 1.0
        eps: float = 1e-8

    with pytest.raises(SystemExit, match="Settings: the docstring does not describe eps"):
        generate.fields_table(Settings)


def test_indented_code_of_a_docstring_becomes_a_block(generate):
    text = "Do this:\n\n    import a\n\n    def f(): ...\n\nThen that."
    assert generate.fenced(text) == (
        "Do this:\n\n```python\nimport a\n\ndef f(): ...\n```\n\nThen that."
    )
