"""The `tiny_model` fixture, and the benchmark that tries every family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tiny_models.py"

# As it looks to Python where the distribution is not installed.
WITHOUT_TRANSFORMERS = """
import sys
from importlib import metadata

version_of = metadata.version

def version(name):
    if name == "transformers":
        raise metadata.PackageNotFoundError(name)
    return version_of(name)

sys.modules["transformers"] = None
metadata.version = version
metadata.packages_distributions = dict
"""


def test_the_fixture_builds(tiny_model) -> None:
    model = tiny_model("qwen3", num_hidden_layers=1)
    assert model.config.num_hidden_layers == 1
    assert model.tokenizer("a").input_ids == [97]


def test_without_transformers_the_fixture_skips_with_the_reason(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(WITHOUT_TRANSFORMERS)
    pytester.makepyfile("def test_model(tiny_model): tiny_model()")
    result = pytester.runpytest_subprocess("-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs transformers, found none*"])


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_benchmark_reaches_and_misses() -> None:
    done = run_benchmark("--family", "gpt2", "musicgen", "--reach", "0.5")
    assert done.returncode == 0, done.stderr
    gpt2, musicgen, total, missed = done.stdout.splitlines()[1:]
    assert gpt2.split()[0] == "gpt2"
    assert 100_000 < int(gpt2.split()[1]) < 1_000_000
    assert gpt2.endswith("[1/2]")
    assert "is no text model that stands alone" in musicgen
    assert total == "reached 1 of 2 families (50.0%)"
    assert missed.startswith("  musicgen: ")


def test_benchmark_fails_below_its_reach_and_keeps_its_deadline() -> None:
    done = run_benchmark("--family", "gpt2", "--deadline", "0.001")
    assert done.returncode == 1
    assert "not done after 0.001 s" in done.stdout
    assert "reached 0 of 1 families (0.0%)" in done.stdout
