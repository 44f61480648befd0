from __future__ import annotations

import dataclasses

import pytest
import torch

from pytest_ranks.conformance import oracle
from pytest_ranks.conformance.check import Setting, all_checks
from pytest_ranks.conformance.materials import tiny_llama
from pytest_ranks.conformance.runner import Session, run_check
from pytest_ranks.models.corpora import unique_token_corpus

CORPUS = unique_token_corpus(vocab_size=256)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def weights(llama):
    return {name: value.detach() for name, value in llama.named_parameters()}


def test_logits_are_those_of_transformers(llama, weights):
    ids = CORPUS.samples[1]["input_ids"]
    with torch.no_grad():
        theirs = llama(input_ids=torch.tensor([ids])).logits[0].double()
    ours = oracle.llama_logits(
        {name: value.double() for name, value in weights.items()}, llama.config, ids
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-6


def test_the_gradient_is_that_of_one_batch_through_transformers(llama, weights):
    wanted, loss = oracle.gradient(weights, llama.config, CORPUS.samples)
    total, count = 0.0, sum(CORPUS.targets().values())
    llama.zero_grad()
    for sample in CORPUS.samples:
        logits = llama(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
        part = torch.nn.functional.cross_entropy(
            logits, torch.tensor(sample["labels"][1:]), reduction="sum"
        )
        (part / count).backward()
        total += part.item()
    found = {name: value.grad.clone() for name, value in llama.named_parameters()}
    assert oracle.relative_error(found, wanted) < 2e-6
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_sample_gradients_add_up_to_the_gradient(llama, weights):
    wanted, _ = oracle.gradient(weights, llama.config, CORPUS.samples)
    count = sum(CORPUS.targets().values())
    parts = [oracle.summed_gradient(weights, llama.config, sample) for sample in CORPUS.samples]
    added = {name: sum(part[name] for part in parts) / count for name in wanted}
    assert oracle.relative_error(added, wanted) < 1e-12


def test_a_sequence_mean_is_another_gradient(llama, weights):
    token, _ = oracle.gradient(weights, llama.config, CORPUS.samples)
    sequence, _ = oracle.gradient(weights, llama.config, CORPUS.samples, weighting="sequence")
    assert oracle.relative_error(sequence, token) > 0.1


def test_a_factor_is_found_and_what_is_left_of_it():
    wanted = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    found = {"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([0.0])}
    assert oracle.best_factor(found, wanted) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))
    assert oracle.worst_tensor(found, wanted) == ("a", pytest.approx(0.5))


def test_a_check_computes_with_one_thread_and_leaves_the_others(tmp_path):
    """Small tensors on several threads cost a busy machine twenty times the processor time."""
    seen = []

    def run(_bench):
        seen.append(torch.get_num_threads())

    check = dataclasses.replace(all_checks()["subject.honours_job"], run=run)
    session = Session("pytest_ranks.subjects.reference:ReferenceTrainer", tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = run_check(session, check, Setting(strategy="single", world_size=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        session.close()
    assert seen == [1]
    assert result.outcome == "passed"
