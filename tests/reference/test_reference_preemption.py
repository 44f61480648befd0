"""Requests to stop in detail: signals, and how ranks agree on one."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from bodies.loop import make
from pytest_ranks.reference import Trainer, preemption
from pytest_ranks.reference.preemption import StopRequest


@pytest.fixture(autouse=True)
def _one_thread():
    """Bit-for-bit comparisons need sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=320, attention_dropout=0.2)


@pytest.mark.ranks(2)
def test_agreeing_takes_no_further_collective(rank, tiny_model, monkeypatch):
    calls = []
    reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counted)
    trainer = make(tiny_model("llama", vocab_size=320), strategy="ddp", max_steps=3)
    trainer.train()
    assert calls == [2] + [2, 2] * 3  # before the first step; then tokens and loss of each


def test_a_batch_without_targets_does_not_delay_it(model):
    blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
    trainer = make(model, blank, until_stopped=True)
    trainer.on_step = lambda record: record["step"] == 2 and trainer.stop.request("test")
    assert len(trainer.train()) == 3


def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_first_once_more():
    killed, now = [], [100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
        with preemption.listen(StopRequest(), clock=lambda: now[0]) as stop:
            signal.raise_signal(signal.SIGTERM)
            now[0] += 1.9
            signal.raise_signal(signal.SIGINT)
            assert (killed, stop.reason) == ([], "SIGTERM")
            now[0] += 0.2
            signal.raise_signal(signal.SIGINT)
            assert killed == [(os.getpid(), signal.SIGINT)]
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_what_a_signal_prints(capfd):
    with preemption.listen(StopRequest()):
        signal.raise_signal(signal.SIGUSR1)
    assert capfd.readouterr().err == (
        "\nSIGUSR1: the run ends after this step, with a checkpoint; again to end at once\n"
    )


def test_the_step_that_completes_the_run_is_its_end(model):
    trainer = make(model, max_steps=3)
    trainer.on_step = lambda record: record["step"] == 2 and trainer.stop.request("test")
    trainer.train()
    assert trainer.finished()


def test_a_moment_that_is_saved_is_not_saved_again(model, tmp_path):
    """The run is asked to stop in a step that is saved anyway; then before its next step."""
    saved = []

    class Spy(Trainer):
        def save(self, path):
            saved.append(path.name)
            super().save(path)

    fields = {"trainer": Spy, "until_stopped": True, "checkpoint_every": 3, "out_dir": tmp_path}
    trainer = make(model, **fields)
    trainer.on_step = lambda record: record["step"] == 2 and trainer.stop.request("test")
    trainer.train()
    assert saved == ["checkpoint-3.pt"]
    resumed = make(model, resume_from=tmp_path, **fields)
    resumed.stop.request("test")
    assert resumed.train() == []
    assert saved == ["checkpoint-3.pt"]
    elsewhere = make(model, resume_from=tmp_path, **fields | {"out_dir": tmp_path / "other"})
    elsewhere.stop.request("test")
    elsewhere.train()
    assert saved == ["checkpoint-3.pt"] * 2
