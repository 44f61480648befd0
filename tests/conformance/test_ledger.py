from __future__ import annotations

import pytest
import torch

from pytest_ranks.models.corpora import EOS_ID, IGNORE, unique_token_corpus
from pytest_ranks.models.ledger import LedgerTable, id_tokenizer, ledger_llama, read_ledger

CORPUS = unique_token_corpus(vocab_size=256)


def batch_of(corpus):
    width = max(len(sample["input_ids"]) for sample in corpus.samples)
    pad = [width - len(sample["input_ids"]) for sample in corpus.samples]
    rows = list(zip(corpus.samples, pad, strict=True))
    return {
        "input_ids": torch.tensor([s["input_ids"] + [EOS_ID] * p for s, p in rows]),
        "attention_mask": torch.tensor([[1] * len(s["input_ids"]) + [0] * p for s, p in rows]),
        "labels": torch.tensor([s["labels"] + [IGNORE] * p for s, p in rows]),
    }


def one_step(model, batch, *, lr=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model(**batch).loss.backward()
    optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("build", [ledger_llama, LedgerTable])
@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_one_step_of_a_right_loss_reads_one_over_n_everywhere(build, lr):
    ledger = read_ledger(one_step(build(), batch_of(CORPUS), lr=lr), lr=lr).detach()
    wanted = torch.zeros_like(ledger)
    targets = CORPUS.targets()
    for (token, target), times in targets.items():
        wanted[token, target] = times / sum(targets.values())
    assert (ledger - wanted).abs().max() * sum(targets.values()) < 1e-6


def test_only_the_head_of_the_ledger_llama_moves_in_the_first_step():
    before = {name: value.detach().clone() for name, value in ledger_llama().named_parameters()}
    after = one_step(ledger_llama(), batch_of(CORPUS))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "lm_head.weight"
    ]


def test_padding_that_is_trained_shows_as_a_weight_of_the_padding_token():
    batch = batch_of(CORPUS)
    batch["labels"] = torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])
    ledger = read_ledger(one_step(ledger_llama(), batch))
    assert ledger[EOS_ID, EOS_ID] > 0.1


def test_two_targets_after_one_token_are_read_apart():
    batch = {"input_ids": torch.tensor([[5, 6], [5, 7]]), "labels": torch.tensor([[5, 6], [5, 7]])}
    ledger = read_ledger(one_step(LedgerTable(), batch)).detach()
    assert torch.allclose(ledger[5, [6, 7]], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert float(ledger[5].abs().sum()) == pytest.approx(1.0, abs=1e-6)


def test_the_id_tokenizer_reads_its_own_words():
    tokenizer = id_tokenizer(pad_id=0)
    assert tokenizer("t5 t6 t1").input_ids == [5, 6, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, EOS_ID)
