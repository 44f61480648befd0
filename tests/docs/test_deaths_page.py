"""The page on deaths shows what its scenes print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("deaths", DOCS / "deaths.py")
assert spec is not None
assert spec.loader is not None
deaths = importlib.util.module_from_spec(spec)
spec.loader.exec_module(deaths)

TELLING = re.compile(
    r"(rank \d of \d failed|timed out after|reproduce:|test_train\.py::test_train: |\[exit status|"
    r".*(?:KeyboardInterrupt: while|SIGTERM came while))"
)


def telling(text):
    """Return the lines that say what happened, without where a line number may move."""
    return [line for line in text.splitlines() if TELLING.match(line)]


@pytest.mark.parametrize("name", deaths.SCENES)
def test_a_scene_prints_what_the_page_shows(name):
    page = deaths.PAGE.read_text(encoding="utf-8")
    shown = page.partition(f"<!-- death: {name} -->")[2].partition("<!-- end")[0]
    source, output = re.findall(r"```\w+\n(.*?)```", shown, re.DOTALL)
    assert source == deaths.SCENES[name]
    assert len(telling(output)) >= 2
    assert telling(deaths.played(name)) == telling(output)
