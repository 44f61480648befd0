from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit comparisons need sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model():
    def make(**overrides):
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))

    return make


@pytest.fixture
def samples():
    """Uneven lengths, prompts of any length, one sample without targets, one of a single token."""
    source = random.Random(0)
    made = []
    for _ in range(11):
        ids = [source.randrange(VOCABULARY) for _ in range(source.randint(2, 30))]
        prompt = source.randrange(len(ids))
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    made[4]["labels"] = [-100] * len(made[4]["labels"])
    made[7] = {"input_ids": [5], "labels": [5]}
    return made


def sgd_steps(model, windows, *, lr=0.1, max_grad_norm=None):
    """Train in float64, one sample at a time, by the definition: the mean over a window's tokens.

    Shares nothing with the trainer: no padding, no packing, no accumulation of counts.
    Returns the parameters and, for each window, its loss and its gradient norm.
    """
    model = copy.deepcopy(model).double()
    losses, norms = [], []
    for window in windows:
        model.zero_grad()
        total, tokens = 0.0, 0
        for sample in window:
            ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
            logits = model(input_ids=ids).logits[0].double()
            for place in range(1, len(labels)):
                if labels[place] != -100:
                    total = total - logits[place - 1].log_softmax(-1)[labels[place]]
                    tokens += 1
        if not tokens:
            losses.append(0.0)
            norms.append(0.0)
            continue
        (total / tokens).backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
        factor = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
        with torch.no_grad():
            for parameter in parameters:
                parameter -= lr * factor * parameter.grad
        losses.append(float(total.detach()) / tokens)
        norms.append(norm)
    return dict(model.named_parameters()), losses, norms


def update_error(before, found, oracle):
    """Return the largest relative error of one tensor's update, and of all of them together."""
    errors, sizes = {}, {}
    for name, start in before.items():
        want = oracle[name].detach() - start.double()
        got = found[name].detach().double() - start.double()
        errors[name], sizes[name] = (got - want).norm().item(), want.norm().item()
    total = math.hypot(*errors.values()) / math.hypot(*sizes.values())
    return max(total, *(errors[name] / sizes[name] for name in errors))


@pytest.fixture
def sgd_oracle():
    return sgd_steps


@pytest.fixture
def relative_error():
    return update_error
