"""What `--help` and `--markers` say of us, word for word.

After a wanted change: `pytest tests/plugin/test_golden_pages.py` shows the difference; write the
new page to the file that it names.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"


def test_help(pytester, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = pytester.runpytest_subprocess("--help").outlines
    start = lines.index("tests on ranks, hardware needs, conformance (pytest-ranks):")
    section = list(takewhile(bool, lines[start:]))
    settings = []
    is_ours = False
    for line in lines:
        is_name = line.startswith("  ") and line[2:3].strip() != ""
        is_ours = line.startswith("  ranks_") or (is_ours and bool(line) and not is_name)
        settings += [line] * is_ours
    page = "\n".join([*section, "", *settings]) + "\n"
    assert page == (DATA / "help.txt").read_text(), f"{DATA / 'help.txt'} differs"


def test_markers(pytester) -> None:
    ours = ("ranks(", "gpu(", "multi_gpu(", "trainium(", "requires(")
    lines = pytester.runpytest_subprocess("--markers").outlines
    prefixes = tuple(f"@pytest.mark.{name}" for name in ours)
    page = "\n\n".join(line for line in lines if line.startswith(prefixes)) + "\n"
    assert page == (DATA / "markers.txt").read_text(), f"{DATA / 'markers.txt'} differs"
