"""What is said of subjects that raise, die, hang, or return something else; and that the suite goes on."""

from __future__ import annotations

import os
import time

import pytest
import torch

from pytest_ranks.conformance import Capabilities, Trained, full_parameters
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.conformance.preload import PRELOAD
from pytest_ranks.conformance.runner import run_check
from pytest_ranks.conformance.self_check import SharedRanks
from pytest_ranks.launch.host import RankHost
from pytest_ranks.subjects.reference import ReferenceTrainer


class ReturnsNothing:
    capabilities = Capabilities()

    def train(self, job):
        return None


class Raises:
    capabilities = Capabilities()

    def train(self, job):
        raise ValueError("my trainer is broken")


class Dies:
    capabilities = Capabilities()

    def train(self, job):
        os._exit(3)


class LosesOne(ReferenceTrainer):
    capabilities = Capabilities()

    def train(self, job):
        trained = super().train(job)
        kept = dict(trained.parameters)
        del kept["model.embed_tokens.weight"]
        return Trained(parameters=kept, history=trained.history)


class Flattens(ReferenceTrainer):
    capabilities = Capabilities()

    def train(self, job):
        trained = super().train(job)
        flat = {name: value.flatten() for name, value in trained.parameters.items()}
        return Trained(parameters=flat, history=trained.history)


class NeverStops:
    capabilities = Capabilities()

    def train(self, job):
        time.sleep(600)


class TrainsNothing:
    capabilities = Capabilities()

    def train(self, job):
        return Trained(parameters=full_parameters(job.build_model()), history=[{"loss": 0.0}] * 2)


class OptimizesByHand:
    capabilities = Capabilities()

    def train(self, job):
        model = job.build_model().train()
        ids = torch.tensor([job.samples[0]["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        return Trained(parameters=full_parameters(model), history=[{"loss": 0.0}] * 2)


@pytest.fixture(scope="module")
def ranks():
    with RankHost(preload=PRELOAD) as host:
        yield host


def judge(subject, tmp_path, ranks, *names):
    session = SharedRanks(subject, tmp_path, ranks)
    return [
        run_check(session, check, setting, expected=reason)
        for check, setting, reason in plan_for(session.capabilities, names)
    ]


def test_a_subject_that_returns_nothing_is_an_adapter_error(tmp_path, ranks):
    (result,) = judge(ReturnsNothing, tmp_path, ranks, "subject")
    assert result.outcome == "adapter error"
    assert (
        "train returned NoneType on rank 0, expected Trained(parameters=..., history=[...])"
        in result.text
    )


def test_an_exception_is_shown_once_and_gates_the_rest_in_one_line(tmp_path, ranks):
    first, second = judge(Raises, tmp_path, ranks, "subject", "loss.targets")
    assert first.outcome == "failed"
    assert "ValueError: my trainer is broken" in first.text
    assert "in train" in first.text
    assert "rank_side" not in first.text, "no frame of ours"
    assert second.outcome == "adapter error"
    assert "\n" not in second.text
    assert second.text.startswith(
        "not run, since subject.honours_job[single] failed: train(job) MUST return"
    )


def test_a_death_is_named_by_its_exit_code(tmp_path, ranks):
    (result,) = judge(Dies, tmp_path, ranks, "subject")
    assert result.outcome == "failed"
    assert "exited with code 3" in result.text


def test_a_hang_ends_with_its_stack(tmp_path, ranks, monkeypatch):
    from pytest_ranks.conformance import runner

    plain = runner.Bench.job
    monkeypatch.setattr(
        runner.Bench, "job", lambda *args, **fields: plain(*args, timeout=2.0, **fields)
    )
    (result,) = judge(NeverStops, tmp_path, ranks, "subject")
    assert result.outcome == "failed"
    assert "2 s" in result.text
    assert "test_bad_subjects.py" in result.text
    assert "in train" in result.text


def test_a_model_that_is_never_called_is_an_adapter_error(tmp_path, ranks):
    (result,) = judge(TrainsNothing, tmp_path, ranks, "subject")
    assert result.outcome == "adapter error"
    assert "never called the job's model in training" in result.text


@pytest.mark.parametrize(
    ("subject", "found"), [(LosesOne, "none of that name"), (Flattens, "[16384]")]
)
def test_other_parameters_than_the_models_are_an_adapter_error(tmp_path, ranks, subject, found):
    (result,) = judge(subject, tmp_path, ranks, "loss.split_invariance")
    assert result.outcome == "adapter error"
    assert f"'model.embed_tokens.weight' has the shape [256, 64], found {found};" in result.text


def test_an_expected_failure_must_fail(tmp_path, ranks):
    session = SharedRanks("pytest_ranks.subjects.reference:ReferenceTrainer", tmp_path, ranks)
    ((check, setting, reason),) = plan_for(
        session.capabilities, ["loss.targets[single]"], {"loss.targets": "mylib#12"}
    )
    result = run_check(session, check, setting, expected=reason)
    assert result.outcome == "unexpected pass"
    assert "is in expected_failures (mylib#12): remove it there" in result.text


def test_without_a_torch_optimizer_nothing_is_judged(tmp_path, ranks):
    results = judge(OptimizesByHand, tmp_path, ranks, "subject", "loss.targets")
    assert [result.outcome for result in results] == ["inconclusive", "inconclusive"]
    assert "no torch optimizer took a step that the spies could see" in results[1].text
