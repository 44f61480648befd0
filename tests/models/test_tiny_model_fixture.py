"""The `tiny_model` fixture, and the benchmark that tries every family."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

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


def test_benchmark_reports_what_it_misses() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--family", "gpt2", "musicgen"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr  # half is less than the reach of 0.9
    gpt2, musicgen, total, missed = done.stdout.splitlines()[1:]
    assert gpt2.split()[0] == "gpt2"
    assert 100_000 < int(gpt2.split()[1]) < 1_000_000
    assert gpt2.endswith("[1/2]")
    assert "is no text model that stands alone" in musicgen
    assert total == "reached 1 of 2 families (50.0%)"
    assert missed.startswith("  musicgen: ")


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, imported; what it sets for its own process is put back."""
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    spec = spec_from_file_location("tiny_models_benchmark", BENCHMARK)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_benchmark_passes_when_all_are_reached(
    benchmark_module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark_module.main(["--family", "gpt2", "emu3"]) == 0
    assert "reached 2 of 2 families (100.0%)" in capsys.readouterr().out


def test_benchmark_keeps_its_deadline(benchmark_module: ModuleType) -> None:
    trial = benchmark_module.try_family("gpt2", deadline=0.001)
    assert trial.trouble == "DeadlineError: not done after 0.001 s"
