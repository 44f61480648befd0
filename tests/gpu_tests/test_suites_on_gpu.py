"""The suites on real devices: the same checks that run on CPU ranks, with NCCL and CUDA kernels under them."""

from __future__ import annotations

import pytest

from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.conformance.runner import Session, run_check

REFERENCE = "pytest_ranks.subjects.reference:ReferenceTrainer"


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    session = Session(REFERENCE, tmp_path_factory.mktemp("runs"), device="cuda")
    yield session
    session.close()


def judge(session, name):
    ((check, setting, _),) = plan_for(session.capabilities, [name])
    return run_check(session, check, setting)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "subject.honours_job[single]",
        "loss.token_weights[single]",
        "loss.split_invariance[single]",
        "packing.targets_are_those_without_packing[single]",
        "mixed_precision.master_weights_are_fp32[single]",
        "mixed_precision.buffers_stay_fp32[single]",
        "mixed_precision.accumulates_in_fp32[single]",
        "subject.honours_job[fsdp2-1]",
        "loss.token_weights[fsdp2-1]",
        "gradient_sync.clipping_law[fsdp2-1]",
    ],
)
def test_a_check_holds_on_one_gpu(on_gpu, name):
    result = judge(on_gpu, name)
    assert result.outcome == "passed", result.text


@pytest.mark.gpu
@pytest.mark.parametrize("claim", ["single_sample", "small_batch"])
@pytest.mark.parametrize("setting", ["single", "fsdp2-1"])
def test_overfitting_on_one_gpu(on_gpu, claim, setting):
    result = judge(on_gpu, f"overfitting.{claim}[{setting}]")
    assert result.outcome == "passed", result.text


@pytest.mark.multi_gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "claim",
    [
        "subject.honours_job",
        "loss.token_weights",
        "gradient_sync.every_tensor",
        "gradient_sync.strategies_agree",
        "mixed_precision.gradients_are_reduced_in_fp32",
    ],
)
def test_a_check_holds_on_two_gpus(on_gpu, strategy, claim):
    result = judge(on_gpu, f"{claim}[{strategy}-2]")
    assert result.outcome == "passed", result.text
