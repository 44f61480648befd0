"""Small runs of the reference's loop, what they saved, and how they are interrupted."""

from __future__ import annotations

import copy
import os
import random

import torch

# Imported here, so that ranks are forked from a process that has it.
import transformers.models.llama.modeling_llama  # noqa: F401

from pytest_ranks.reference import TrainConfig, Trainer, checkpoint_files

VOCABULARY = 64


def made_samples(count=11):
    """Uneven lengths, prompts of uneven length: no two ranks ever have the same number of targets."""
    source = random.Random(3)
    made = []
    for _ in range(count):
        ids = [source.randrange(VOCABULARY) for _ in range(source.randint(3, 24))]
        prompt = source.randrange(len(ids) - 1)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


SAMPLES = made_samples()

TARGETS = [sum(label != -100 for label in sample["labels"][1:]) for sample in SAMPLES]


class Counted(list):
    """Samples that know their targets, as those of a JSONL file do."""

    @property
    def counted(self):
        return [sum(label != -100 for label in sample["labels"][1:]) for sample in self]


def make(
    model, samples=SAMPLES, *, trainer=Trainer, eval_samples=None, stop=None, trackers=(), **fields
):
    """Build a trainer on a copy of the model."""
    fields = {"micro_batch": 4, "lr": 1e-2, "device": "cpu"} | fields
    if not {"epochs", "max_tokens", "until_stopped"} & fields.keys():
        fields.setdefault("max_steps", 5)
    return trainer(
        TrainConfig(**fields),
        model=copy.deepcopy(model),
        samples=samples,
        eval_samples=eval_samples,
        stop=stop,
        own_trackers=trackers,
    )


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in history
    ]


def mean_loss(model, samples):
    """The mean loss of all targets in float64, one sample at a time, and the model it was taken of.

    By definition: shares nothing with the trainer, neither padding nor packing nor counting.
    """
    exact = copy.deepcopy(model).double().eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        logits = exact(input_ids=torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(sample["labels"]):
            if place and label != -100:
                total, count = total - logits[place - 1, label], count + 1
    return total / count, exact


SAVING = {"epochs": 2, "schedule": "cosine", "weight_decay": 0.1}


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def best_of(folder):
    """The step that `checkpoint-best.pt` stands for."""
    link = folder / checkpoint_files.BEST
    return int(os.readlink(link).split("-")[1].removesuffix(".pt")) if link.exists() else None


PHASES = ("setup", "micro-batch", "step", "evaluation", "log", "save")


def stopping_at(phase, ask):
    """A trainer that calls `ask` in the middle of one phase of its third step."""

    class Interrupted(Trainer):
        def at(self, here):
            if here == phase and (here == "setup" or self.steps_taken in (2, 3)):
                ask()

        def setup(self):
            self.at("setup")
            super().setup()

        def backward(self, scaled):
            super().backward(scaled)
            if self.steps_taken == 2:
                self.at("micro-batch")

        def step(self):
            super().step()
            if self.steps_taken == 2:
                self.at("step")

        def evaluate(self):
            if self.steps_taken == 3:
                self.at("evaluation")
            return super().evaluate()

        def log(self, record):
            super().log(record)
            if record["step"] == 3:
                self.at("log")

        def save(self, path):
            super().save(path)
            if self.steps_taken == 3:
                self.at("save")

    return Interrupted


class Kept:
    """A tracker that keeps what it is shown."""

    def __init__(self):
        self.records, self.closed = [], 0

    def log(self, record):
        self.records.append(record)

    def close(self):
        self.closed += 1
