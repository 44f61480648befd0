"""Deaths in the middle of training, and the runs that go on after them; run by test_reference_faults."""

from __future__ import annotations

import os
import random
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_ranks import BadInputError, RankFailure, inject_faults, step
from pytest_ranks.reference import TrainConfig, Trainer
from pytest_ranks.reference.checkpoint import find_checkpoint, read_checkpoint

STEPS = 5


def make_trainer(folder, *, strategy="ddp", **fields):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.2,
        )
    )
    source = random.Random(0)
    ids = [[source.randrange(32) for _ in range(source.randint(3, 9))] for _ in range(7)]
    config = TrainConfig(
        strategy=strategy,
        micro_batch=2,
        max_steps=STEPS,
        lr=1e-2,
        schedule="cosine",
        checkpoint_every=1,
        out_dir=folder,
        device="cpu",
        **fields,
    )
    return Trainer(config, model=model, samples=[{"input_ids": one, "labels": one} for one in ids])


def train(folder, **fields):
    history = make_trainer(folder, **fields).train()
    for record in history:
        del record["seconds"]
    return history


def is_the_same(folder, whole):
    """Compare the last checkpoints: parameters, moments, schedule, progress, random states."""
    one, other = (read_checkpoint(place / f"checkpoint-{STEPS}.pt") for place in (folder, whole))
    leaves, others = (torch.utils._pytree.tree_leaves(state) for state in (one, other))
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


class Agent:
    """What an elastic launcher does: ranks meet anew for each generation of the world."""

    def __init__(self, rank):
        self.rank = rank
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )

    def join(self, generation, members):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"generation{generation}", self.store),
            rank=members.index(self.rank.index),
            world_size=len(members),
        )

    def call_for_help(self):
        self.store.set("failed", "")

    def wait_for_a_call(self):
        self.store.wait(["failed"], timedelta(seconds=60))


@pytest.mark.ranks(3, expect_deaths={1: "SIGKILL"})
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_spare_takes_over(rank, faults, strategy, when):
    """Rank 1 dies in the middle of step 3; ranks 0 and 2 go on from the checkpoint of step 2."""
    whole, folder = (rank.shared_tmp_path / name for name in ("whole", "interrupted"))
    agent = Agent(rank)
    faults.kill(rank=1, at=step(STEPS + 3, when=when))
    if rank.index == 2:
        agent.wait_for_a_call()
    else:
        agent.join(0, [0, 1])
        history = train(whole, strategy=strategy)
        with pytest.raises(RuntimeError):
            train(folder, strategy=strategy)
        agent.call_for_help()
    assert find_checkpoint(folder).name == "checkpoint-2.pt"
    agent.join(1, [0, 2])
    resumed = train(folder, strategy=strategy, resume_from=folder)
    assert [record["step"] for record in resumed] == [3, 4, 5]
    if rank.index == 0:
        assert resumed == history[2:]
    assert is_the_same(folder, whole)


@pytest.mark.ranks(3, expect_deaths={0: "SIGKILL"})
def test_a_torn_checkpoint_is_not_taken_for_a_whole_one(rank, faults, monkeypatch):
    """Rank 0 dies when it has written half of its second checkpoint."""
    whole, folder = (rank.shared_tmp_path / name for name in ("whole", "interrupted"))
    agent = Agent(rank)
    if rank.index == 2:
        agent.wait_for_a_call()
    else:
        agent.join(0, [0, 1])
        train(whole)
        save = torch.save

        def save_half(state, file, **options):
            save(state, file, **options)
            if isinstance(state, dict) and state["progress"]["step"] == 2:
                file.truncate(file.tell() // 2)
                faults.kill(rank=0)

        monkeypatch.setattr(torch, "save", save_half)
        with pytest.raises(RuntimeError):
            train(folder)
        monkeypatch.undo()
        agent.call_for_help()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".checkpoint-2.pt.unfinished", "checkpoint-1.pt", "metrics.jsonl"]
    with pytest.raises(BadInputError, match="is not a readable checkpoint"):
        read_checkpoint(folder / names[0])
    agent.join(1, [1, 2])
    assert [one["step"] for one in train(folder, resume_from=folder)] == [2, 3, 4, 5]
    assert is_the_same(folder, whole)


def train_until_killed(folder):
    with inject_faults() as faults:
        faults.kill(rank=1, at="all_reduce#12")
        train(folder)


def test_a_new_world_resumes(launch, tmp_path):
    launch(train, world_size=2, args=(tmp_path / "whole",))
    folder = tmp_path / "interrupted"
    with pytest.raises(RankFailure, match="died of SIGKILL"):
        launch(train_until_killed, world_size=2, args=(folder,))
    reached = int(find_checkpoint(folder).stem.partition("-")[2])
    assert 1 <= reached < STEPS
    launch(train, world_size=2, args=(folder,), kwargs={"resume_from": folder})
    assert is_the_same(folder, tmp_path / "whole")
