"""The how-to page about tiny models: its examples run and print what they say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "tiny_models.md"


def test_examples_print_what_the_page_says() -> None:
    result = doctest.testfile(
        str(PAGE), module_relative=False, encoding="utf-8", optionflags=doctest.ELLIPSIS
    )
    assert result.attempted >= 15
    assert result.failed == 0


def test_the_test_on_the_page_passes(pytester: pytest.Pytester) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    pytester.makepyfile("\n\n".join(blocks))
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
