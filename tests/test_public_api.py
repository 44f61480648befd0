"""The names that users import: they change only on purpose."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pytest_ranks
from pytest_ranks import conformance, models

PUBLIC = {
    pytest_ranks: (
        "BadInputError Faults Launcher RankContext RankFailure RankTimeout RanksError ScriptResult "
        "UnavailableError check_trainer current_rank inject_faults parametrize_with_checks step "
        "tiny_model"
    ),
    conformance: (
        "Capabilities CheckResult Finding Job Optimizer Subject Trained check_trainer "
        "full_parameters parametrize_with_checks"
    ),
    models: "byte_tokenizer causal_lm_families tiny_model",
}


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_the_public_names_are_these_and_exist(package):
    assert sorted(package.__all__) == sorted(PUBLIC[package].split())
    for name in package.__all__:
        assert getattr(package, name).__name__ == name


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_another_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = package.nonsense


def test_importing_the_packages_imports_nothing_heavy():
    script = (
        "import sys, pytest_ranks, pytest_ranks.conformance, pytest_ranks.models;"
        "print([name for name in ('torch', 'numpy', 'transformers', 'asyncio') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
