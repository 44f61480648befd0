"""The training loop: when it ends, evaluates and saves; what it writes; how it stops and goes on."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from bodies.loop import (
    PHASES,
    SAMPLES,
    SAVING,
    TARGETS,
    Counted,
    Kept,
    is_equal,
    make,
    mean_loss,
    names,
    stopping_at,
    timeless,
    weights,
)
from bodies.torchrun import end, finish, one_of, start, torchrun, wait_for
from pytest_ranks.models import tiny_model as tiny
from pytest_ranks.reference import (
    TrainConfig,
    Trainer,
    checkpoint_files,
    cli,
    parallel,
    preemption,
    trackers,
)
from pytest_ranks.reference.checkpoint import find_checkpoint, read_checkpoint
from pytest_ranks.reference.data import JsonlDataset
from pytest_ranks.reference.model import load_model
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


class TestTrainFunction:
    """One optimizer step is the gradient of sum(token losses) / global token count."""

    @pytest.mark.ranks([1, 2])
    def test_update_is_the_mean_over_all_tokens_of_all_ranks(self, rank, tiny_model):
        model = tiny_model("llama", vocab_size=320)
        strategy = "ddp" if rank.world_size > 1 else "single"
        fields = {"optimizer": "sgd", "lr": 0.5, "max_grad_norm": None, "shuffle": False}
        fields |= {"strategy": strategy, "max_steps": 1, "micro_batch": 1}
        trainer = make(model, gradient_accumulation_steps=8 // rank.world_size, **fields)
        record = trainer.train()[0]
        loss, exact = mean_loss(model, SAMPLES[:8])
        loss.backward()
        assert record["tokens"] == sum(TARGETS[:8])
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
        found, start = weights(trainer), dict(model.named_parameters())
        for name, parameter in exact.named_parameters():
            want = -0.5 * parameter.grad
            got = found[name].double() - start[name].detach().double()
            assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6, name
            assert want.norm() > 0, name

    @pytest.mark.ranks(2)
    def test_every_rank_reports_the_same_loss_of_all_ranks(self, rank, tiny_model):
        trainer = make(tiny_model("llama", vocab_size=320), strategy="ddp", micro_batch=2)
        history = trainer.train()
        theirs = rank.gather(timeless(history))
        assert theirs[0] == theirs[1]
        assert len(theirs[0]) == 5

    def test_a_loss_that_is_not_a_number_is_shown(self, model, tmp_path):
        with torch.no_grad():
            model.lm_head.weight[0] = math.nan
        trainer = make(model, max_steps=1, out_dir=tmp_path)
        assert math.isnan(trainer.train()[0]["loss"])
        line = (tmp_path / "metrics.jsonl").read_text()
        assert math.isnan(json.loads(line)["loss"])


class TestBatchProcessing:
    """What one epoch draws, and what is made of a last batch that is short."""

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("packing", [{}, {"max_tokens_per_rank": 40}], ids=["rows", "packed"])
    def test_each_sample_is_trained_once_an_epoch_over_both_ranks(self, rank, tiny_model, packing):
        class Spy(Trainer):
            drawn = ()

            def sample(self, index, samples):
                self.drawn = (*self.drawn, index)
                return super().sample(index, samples)

        model = tiny_model("llama", vocab_size=320)
        trainer = make(model, trainer=Spy, strategy="ddp", epochs=1, micro_batch=2, **packing)
        history = trainer.train()
        mine, theirs = rank.gather(trainer.drawn)
        assert sorted(mine + theirs) == list(range(11))
        assert [record["samples"] for record in history] == [4, 4, 3]
        assert sum(record["tokens"] for record in history) == sum(TARGETS)

    def test_a_batch_without_targets_makes_no_step(self, model):
        blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
        trainer = make(model, blank, max_steps=2, weight_decay=0.1)
        history = trainer.train()
        assert [record["tokens"] for record in history] == [0, 0]
        assert is_equal(weights(trainer), dict(model.named_parameters()))


class TestTrainingModes:
    """Epochs, steps, tokens, or no end at all: exactly one."""

    @pytest.mark.parametrize(
        ("fields", "steps", "epochs"),
        [({"max_steps": 4}, 4, 1), ({"epochs": 2}, 6, 1), ({"epochs": 2, "tail": "drop"}, 4, 1)],
        ids=str,
    )
    def test_steps_and_epochs(self, model, fields, steps, epochs):
        trainer = make(model, **fields)
        assert trainer.total_steps() == steps
        history = trainer.train()
        assert [record["step"] for record in history] == list(range(1, steps + 1))
        assert history[-1]["epoch"] == epochs

    @pytest.mark.parametrize("limit", [1, sum(TARGETS[:4]), sum(TARGETS) + 1, 3 * sum(TARGETS)])
    def test_tokens_end_with_the_step_that_reaches_them(self, model, limit):
        trainer = make(model, Counted(SAMPLES), max_tokens=limit, shuffle=False)
        expected = trainer.total_steps()
        history = trainer.train()
        trained = [record["tokens"] for record in history]
        assert sum(trained) >= limit > sum(trained[:-1])
        assert expected == len(history)

    def test_a_run_without_end_goes_on_until_it_is_asked_to_stop(self, model):
        stop = StopRequest()
        trainer = make(model, until_stopped=True, stop=stop)
        trainer.on_step = lambda record: record["step"] == 8 and stop.request("enough")
        assert trainer.total_steps() is None
        history = trainer.train()
        assert [record["epoch"] for record in history] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert trainer.stopping
        assert not trainer.finished()
        assert stop.reason == "enough"


class TestValidation:
    """Exact token means, no sample twice, and no trace in the training."""

    @pytest.mark.ranks([1, 2])
    @pytest.mark.parametrize("packing", [{}, {"pack_length": 48}], ids=["rows", "packed"])
    def test_seven_samples_are_each_counted_once(self, rank, tiny_model, packing):
        model = tiny_model("llama", vocab_size=320)
        strategy = "ddp" if rank.world_size > 1 else "single"
        trainer = make(
            model,
            strategy=strategy,
            micro_batch=2,
            eval_samples=SAMPLES[:7],
            max_steps=1,
            **packing,
        )
        trainer.setup()
        assert trainer.evaluate() == pytest.approx(
            mean_loss(model, SAMPLES[:7])[0].item(), rel=1e-6
        )

    def test_training_goes_on_as_if_there_had_been_none(self, model):
        without = make(model, epochs=2)
        plain = timeless(without.train())
        evaluating = make(
            model, epochs=2, eval_every=1, eval_samples=SAMPLES[:7], eval_at_start=True
        )
        history = timeless(evaluating.train())
        assert is_equal(weights(without), weights(evaluating))
        assert [record.pop("eval_loss") > 0 for record in history] == [True] * 6
        assert history == plain
        assert evaluating.model.training


class TestCheckpointing:
    """Every checkpoint is one from which the run ends as if it had never stopped."""

    @pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside training"])
    def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(self, model, tmp_path, beside):
        fields = {"out_dir": tmp_path, "async_checkpoints": beside, "checkpoint_every": 1}
        whole = make(model, **SAVING, **fields)
        history = timeless(whole.train())
        assert names(tmp_path) == [f"checkpoint-{step}.pt" for step in range(1, 7)]
        for step in range(1, 7):
            path = tmp_path / f"checkpoint-{step}.pt"
            resumed = make(model, resume_from=path, **SAVING)
            assert timeless(resumed.train()) == history[step:]
            assert is_equal(weights(resumed), weights(whole))

    @pytest.mark.parametrize(
        ("fields", "steps"),
        [
            ({"checkpoint_every": 4}, [4]),
            ({"checkpoint_each_epoch": True}, [3, 6]),
            ({"checkpoint_every_samples": 5}, [2, 3, 4, 6]),  # 4 8 11 15 19 22 samples
            ({"checkpoint_every_samples": 8}, [2, 5]),
            ({"checkpoint_every_samples": 22}, [6]),
            ({"checkpoint_every": 3, "checkpoint_each_epoch": True}, [3, 6]),
            ({}, []),
        ],
        ids=str,
    )
    def test_cadence(self, model, tmp_path, fields, steps):
        saved = []

        class Spy(Trainer):
            def save(self, path):
                saved.append(path.name)
                super().save(path)

        make(model, trainer=Spy, out_dir=tmp_path, epochs=2, **fields).train()
        assert saved == [f"checkpoint-{step}.pt" for step in steps]  # no moment twice
        assert names(tmp_path) == sorted(saved)


class TestPreemption:
    """A request to stop, at any phase and on any rank, ends all ranks alike, and loses nothing."""

    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
    def test_a_signal_at_any_phase(self, model, tmp_path, phase, name):
        fields = {"epochs": 3, "eval_every": 1, "eval_samples": SAMPLES[:7], "schedule": "cosine"}
        fields |= {"micro_batch": 2, "gradient_accumulation_steps": 2}
        whole = make(model, **fields)
        history = timeless(whole.train())

        def ask():
            signal.raise_signal(signal.Signals[name])

        every = {"checkpoint_every": 3} if phase == "save" else {}
        before = signal.getsignal(signal.Signals[name])
        with preemption.listen(StopRequest()) as stop:
            trainer = make(
                model,
                trainer=stopping_at(phase, ask),
                stop=stop,
                out_dir=tmp_path,
                **every,
                **fields,
            )
            trainer.train()
        assert signal.getsignal(signal.Signals[name]) is before
        assert stop.reason == name
        assert trainer.stopping
        assert not trainer.finished()
        # Seen at the next collective, of which each step has two: at once, or after one more step.
        reached = {"setup": 0, "log": 4, "save": 4}.get(phase, 3)
        assert trainer.steps_taken == reached
        assert names(tmp_path)[-1] == f"checkpoint-{reached}.pt"
        resumed = make(model, resume_from=tmp_path, **fields)
        rest = timeless(resumed.train())
        assert rest == history[reached:]
        assert is_equal(weights(resumed), weights(whole))
        notes = {"setup": None, "evaluation": "evaluation cut short: the run was asked to stop"}
        expected = notes.get(phase, "no evaluation: the run was asked to stop")
        if reached:
            assert trainer.history[-1]["note"] == expected
            assert "eval_loss" not in trainer.history[-1]

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize(
        ("strategy", "which"), [("ddp", 0), ("ddp", 1), ("ddp", None), ("fsdp2", 1)]
    )
    def test_one_rank_asks_and_all_stop_at_the_same_step(self, rank, tiny_model, strategy, which):
        model, folder = tiny_model("llama", vocab_size=320), rank.shared_tmp_path
        fields = {
            "strategy": strategy,
            "micro_batch": 2,
            "eval_every": 1,
            "eval_samples": SAMPLES[:7],
        }
        for number, phase in enumerate(PHASES):
            stop = StopRequest()

            def ask(stop=stop):
                if which in (None, rank.index):
                    stop.request("test")

            out_dir = folder / f"{number}"
            options = {"out_dir": out_dir, "checkpoint_every": 3} | fields
            trainer = make(
                model, trainer=stopping_at(phase, ask), stop=stop, until_stopped=True, **options
            )
            trainer.train()
            reached = {"setup": 0, "log": 4, "save": 4}.get(phase, 3)
            assert rank.gather((trainer.steps_taken, trainer.stopping)) == [(reached, True)] * 2
            assert find_checkpoint(out_dir).name == f"checkpoint-{reached}.pt"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A saved tiny model and generated JSONL, as the command line takes them."""
    folder = tmp_path_factory.mktemp("job")
    tiny("llama", vocab_size=320, attention_dropout=0.2).save(folder / "model")
    tiny("llama", vocab_size=320).save(folder / "plain")
    lines = [json.dumps(sample) + "\n" for sample in SAMPLES]
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


OPTIONS = ("model", "data.jsonl", "--device", "cpu", "--lr", 0.01, "--checkpoint-every", 1)


def steps_of(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def train_whole(job, steps):
    """On every rank: what the command line does, without it and without an interruption."""
    model, tokenizer = load_model(job / "model")
    fields = {"strategy": "ddp", "micro_batch": 2, "lr": 0.01, "device": "cpu", "max_steps": steps}
    config = TrainConfig(checkpoint_every=steps, out_dir=job / "whole", **fields)
    samples = JsonlDataset(job / "data.jsonl")
    Trainer(config, model=model, tokenizer=tokenizer, samples=samples).train()


class TestMainCLI:
    """`torchrun -m pytest_ranks.reference`, interrupted gently and not gently."""

    @pytest.mark.slow
    def test_a_run_that_was_killed_and_stopped_went_as_the_uninterrupted_one(self, job, launch):
        """Kill -9 of all, resumed, SIGTERM to torchrun: the same weights as without, bit for bit."""
        options = (*OPTIONS, "--micro-batch", 2, "--strategy", "ddp", "--keep-checkpoints", 3)
        options = (*options, "--out-dir", job / "out", "--until-stopped")
        out, run = job / "out", start(*options, launcher=torchrun(2), folder=job)
        try:
            wait_for(run, (out / "checkpoint-2.pt").exists)
        finally:
            end(run)
        killed = int(find_checkpoint(out).stem.split("-")[1])
        assert killed >= 2

        run = start(*options, "--resume-from", out, launcher=torchrun(2), folder=job)
        try:
            wait_for(run, (out / f"checkpoint-{killed + 4}.pt").exists)
            os.kill(run.pid, signal.SIGTERM)
            _, said = finish(run)
        finally:
            end(run)
        assert said.count("SIGTERM: the run ends after this step, with a checkpoint;") == 2
        stopped = int(find_checkpoint(out).stem.split("-")[1])
        assert f"{stopped - killed} steps, " in said
        assert f"stopped after step {stopped}, go on with --resume-from {out}" in said
        assert f"{killed}step [" in said  # where the bar goes on
        assert steps_of(out) == list(range(1, stopped + 1))
        assert not (out / "model").exists()

        launch(train_whole, world_size=2, args=(job, stopped))
        one, whole = (read_checkpoint(f / f"checkpoint-{stopped}.pt") for f in (out, job / "whole"))
        for state in (one, whole):
            for each in state["random"]:
                del each["python"]  # not seeded: nothing in training draws from it
        for part in ("model", "optimizer", "scheduler", "progress", "random"):
            leaves, others = (
                torch.utils._pytree.tree_leaves(state[part]) for state in (one, whole)
            )
            assert len(leaves) == len(others) > 0
            for leaf, other in zip(leaves, others, strict=True):
                assert torch.equal(leaf, other) if torch.is_tensor(leaf) else leaf == other, part
        assert not is_equal(one["model"], load_model(job / "model")[0].state_dict())

    def test_status_of_a_run_that_was_stopped_is_75(self, job, monkeypatch):
        """The bar's callback stands for whatever the process is at when the signal comes."""

        def show_on(bar):
            return lambda record: record["step"] == 2 and signal.raise_signal(signal.SIGTERM)

        monkeypatch.chdir(job)
        monkeypatch.setattr(cli, "show_on", show_on)
        arguments = [*map(str, OPTIONS), "--out-dir", "stopped", "--epochs", "9"]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 75
        assert "3 steps, " in result.stdout
        assert "stopped after step 3, go on with --resume-from stopped" in result.stdout
        assert find_checkpoint(job / "stopped").name == "checkpoint-3.pt"


class TestMetricsLogging:
    """A record a step, on disk at once; trackers that show it, and that cannot end the run."""

    def test_each_record_is_in_the_file_before_the_next_step(self, model, tmp_path):
        path, seen = tmp_path / "metrics.jsonl", []
        trainer = make(model, out_dir=tmp_path)
        trainer.on_step = lambda _: seen.append(path.read_text())
        history = trainer.train()
        for count, text in enumerate(seen, start=1):
            assert [json.loads(line) for line in text.splitlines()] == history[:count]

    def test_a_torn_last_line_is_written_again(self, model, tmp_path):
        fields = {"out_dir": tmp_path, "checkpoint_every": 1}
        make(model, max_steps=3, **fields).train()
        path = tmp_path / "metrics.jsonl"
        path.write_text(path.read_text()[:-20])
        (tmp_path / "checkpoint-3.pt").unlink()
        make(model, max_steps=4, resume_from=tmp_path, **fields).train()
        assert steps_of(tmp_path) == [1, 2, 3, 4]

    def test_throughput_is_that_of_a_clock_that_never_goes_back(self, model):
        kept = Kept()
        trainer = make(model, trackers=[kept])
        trainer.clock = iter(range(0, 1000, 4)).__next__
        history = trainer.train()
        assert [record["seconds"] for record in history] == [4] * 5
        assert kept.records == history
        assert kept.closed == 1
        found = [trackers.numbers(record)["tokens_per_second"] for record in history]
        assert found == [record["tokens"] / 4 for record in history]
        assert "tokens_per_second" not in trackers.numbers({"step": 0, "eval_loss": 1.0})


class TestMultiNode:
    """Who writes is RANK 0 of all nodes; who computes where is the LOCAL_RANK of each."""

    @pytest.mark.ranks(4)
    def test_rank_0_alone_writes_though_each_node_has_a_local_rank_0(
        self, rank, tiny_model, monkeypatch
    ):
        monkeypatch.setenv("LOCAL_RANK", str(rank.index % 2))
        folder, kept, said, written = rank.shared_tmp_path, Kept(), [], []
        write = checkpoint_files.write_checkpoint
        monkeypatch.setattr(
            checkpoint_files, "write_checkpoint", lambda *a: (written.append(1), write(*a))
        )
        fields = {"strategy": "ddp", "micro_batch": 1, "out_dir": folder, "checkpoint_every": 1}
        model = tiny_model("llama", vocab_size=320)
        trainer = make(model, trackers=[kept], max_steps=2, **fields)
        trainer.on_step = said.append
        trainer.train()
        model.config.name_or_path = ""
        monkeypatch.setattr(
            type(model), "save_pretrained", lambda *_, **__: written.append("model")
        )
        trainer.export(folder / "model")
        counts = (len(kept.records), len(said), written)
        assert rank.gather(counts) == [(2, 2, [1, 1, "model"])] + [(0, 0, [])] * 3
        assert steps_of(folder) == [1, 2]
        assert len(read_checkpoint(find_checkpoint(folder))["random"]) == 4

    @pytest.mark.ranks(4)
    def test_the_device_is_that_of_the_local_rank(self, rank, monkeypatch):
        chosen = []
        monkeypatch.setenv("LOCAL_RANK", str(rank.index % 2))
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        found = parallel.find_device("cuda")
        assert rank.gather(found.index) == [0, 1, 0, 1]
        assert chosen == [found]

    @pytest.mark.slow
    def test_two_nodes_of_two_ranks_train_as_one_process(self, job):
        """Two launchers that meet at a store; the port is the one that the store was given."""
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        options = ("plain", *OPTIONS[1:], "--max-steps", 4, "--strategy", "fsdp2")
        started = [
            start(
                *(*options, "--out-dir", job / "nodes"),
                launcher=one_of(2, ranks=2, port=store.port, job="loop"),
                folder=job,
            )
            for _ in range(2)
        ]
        try:
            said = [finish(run) for run in started]
        finally:
            for run in started:
                end(run)
        assert [status for status, _ in said] == [0, 0], said
        assert sorted(text.count("4 steps, ") for _, text in said) == [0, 1]
        assert sorted(text.count("| 4/4 [") > 0 for _, text in said) == [False, True]
        assert steps_of(job / "nodes") == [1, 2, 3, 4]
        assert len(read_checkpoint(job / "nodes" / "checkpoint-4.pt")["random"]) == 4
        model, _ = load_model(job / "plain")
        alone = make(model, max_steps=4, micro_batch=4).train()
        text = (job / "nodes" / "metrics.jsonl").read_text()
        together = [json.loads(line) for line in text.splitlines()]
        for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-2), ("tokens", 0)):
            values = [record[name] for record in together]
            assert values == pytest.approx([record[name] for record in alone], rel=tolerance)
