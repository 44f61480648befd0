"""The page about the JSON report names each field that the document has, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pytest_ranks.report import records

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json_report.md"


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("The document", records.SessionRecord),
        ("An item", records.ItemRecord),
        ("A rank", records.RankRecord),
    ],
)
def test_a_table_has_the_fields_of_its_record(title, kind):
    section = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in fields(kind))


def test_the_version_of_the_page_is_that_of_the_document():
    assert f"| `schema_version` | number | {records.SCHEMA_VERSION}: this page |" in (
        PAGE.read_text()
    )
