"""The training loop: when it ends, evaluates and saves; what it writes; how it stops and goes on."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402

from pytest_ranks import BadInputError  # noqa: E402
from pytest_ranks.reference import TrainConfig, Trainer, checkpoint_files, preemption  # noqa: E402
from pytest_ranks.reference.checkpoint import find_checkpoint, read_checkpoint  # noqa: E402
from pytest_ranks.reference.preemption import StopRequest  # noqa: E402

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


def make(model, samples=SAMPLES, *, trainer=Trainer, eval_samples=None, stop=None, **fields):
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
    )


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(history):
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in history
    ]


def token_losses(model, sample):
    """The loss of each target, one sample at a time, in float64: shares nothing with the trainer."""
    exact = copy.deepcopy(model).double().eval()
    ids = torch.tensor([sample["input_ids"]])
    logits = exact(input_ids=ids).logits[0].double().log_softmax(-1)
    return [
        -logits[place - 1, label]
        for place, label in enumerate(sample["labels"])
        if place and label != -100
    ], exact


def mean_loss(model, samples):
    losses = [float(loss.detach()) for sample in samples for loss in token_losses(model, sample)[0]]
    return sum(losses) / len(losses)


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
        exact = copy.deepcopy(model).double().eval()
        total, count = 0.0, sum(TARGETS[:8])
        for sample in SAMPLES[:8]:
            logits = exact(input_ids=torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
            for place, label in enumerate(sample["labels"]):
                if place and label != -100:
                    total = total - logits[place - 1, label]
        (total / count).backward()
        assert record["tokens"] == count
        assert record["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-6)
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

    def test_schedule_knows_the_last_step_of_a_run_to_tokens(self, model):
        trainer = make(model, Counted(SAMPLES), max_tokens=sum(TARGETS) + 1, schedule="linear")
        rates = [record["lr"] for record in trainer.train()]
        steps = len(rates)
        assert rates == pytest.approx([1e-2 * (1 - step / steps) for step in range(steps)])

    def test_schedule_to_an_end_that_nobody_knows_is_refused(self, model):
        with pytest.raises(BadInputError) as caught:
            make(model, max_tokens=10, schedule="cosine").train()
        assert str(caught.value) == (
            "schedule='cosine' with max_tokens=10 needs samples with an attribute counted (the "
            "trained tokens of each), as JsonlDataset has; give them, or use schedule='constant'."
        )
        trainer = make(model, max_tokens=10)
        assert trainer.total_steps() is None
        assert trainer.train()[-1]["lr"] == 1e-2

    def test_tokens_that_cannot_be_reached_are_refused(self, model):
        blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
        with pytest.raises(BadInputError) as caught:
            make(model, blank, max_tokens=10).train()
        assert str(caught.value) == (
            "max_tokens=10 cannot be reached: an epoch of 4 samples trained no token; "
            "give labels other than -100."
        )

    def test_tokens_are_counted_on_over_a_resume(self, model, tmp_path):
        fields = {"max_tokens": 2 * sum(TARGETS) - 1, "checkpoint_every": 1}
        whole = make(model, out_dir=tmp_path, **fields)
        history = timeless(whole.train())
        for step in range(1, len(history) + 1):  # among them the end of an epoch
            resumed = make(
                model,
                resume_from=tmp_path / f"checkpoint-{step}.pt",
                **fields | {"checkpoint_every": None},
            )
            assert timeless(resumed.train()) == history[step:]
            assert is_equal(weights(resumed), weights(whole))

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

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            (
                {},
                "found max_steps=None and epochs=None; give exactly one of them "
                "(or of max_tokens and until_stopped), it says when training ends.",
            ),
            (
                {"max_tokens": 5, "until_stopped": True},
                "found max_tokens=5 and until_stopped=True; give exactly one of them, it says when training ends.",
            ),
            ({"max_tokens": 0}, "max_tokens=0 is not a whole number of at least 1."),
            (
                {"until_stopped": True, "schedule": "linear"},
                "schedule='linear' ends at the last step, and until_stopped=True has none; "
                "use schedule='constant', or give max_steps, epochs or max_tokens.",
            ),
            (
                {"epochs": 1, "validation_split": 1.0},
                "validation_split=1.0 is not a share of at least 0 and below 1.",
            ),
            (
                {"epochs": 1, "validation_split": "0.1"},
                "validation_split='0.1' is not a share of at least 0 and below 1.",
            ),
            (
                {"epochs": 1, "keep_checkpoints": 0, "out_dir": "x"},
                "keep_checkpoints=0 is not a whole number of at least 1.",
            ),
            *(
                (
                    {"epochs": 1, name: value},
                    f"{name}={value!r} needs out_dir, the folder that checkpoints go to.",
                )
                for name, value in (
                    ("checkpoint_every", 2),
                    ("checkpoint_every_samples", 2),
                    ("checkpoint_each_epoch", True),
                    ("checkpoint_best", True),
                    ("keep_checkpoints", 2),
                    ("async_checkpoints", True),
                )
            ),
        ],
    )
    def test_what_cannot_be_is_one_sentence(self, fields, text):
        with pytest.raises(BadInputError) as caught:
            TrainConfig(**fields)
        assert str(caught.value) == text


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
        assert trainer.evaluate() == pytest.approx(mean_loss(model, SAMPLES[:7]), rel=1e-6)

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

    def test_evaluation_before_the_first_step_is_of_the_model_as_it_came(self, model, tmp_path):
        fields = {"eval_at_start": True, "eval_samples": SAMPLES[:7], "out_dir": tmp_path}
        history = make(model, max_steps=2, checkpoint_every=1, **fields).train()
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2]
        assert lines[0]["eval_loss"] == pytest.approx(mean_loss(model, SAMPLES[:7]), rel=1e-6)
        assert lines[1:] == history
        make(model, max_steps=3, resume_from=tmp_path, **fields).train()
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2, 3]

    def test_held_out_samples_are_never_trained(self, model):
        drawn = {"train": [], "eval": []}

        class Spy(Trainer):
            def sample(self, index, samples):
                which = "train" if samples is self.samples else "eval"
                drawn[which].append(samples.indices[index])
                return super().sample(index, samples)

        samples = [dict(sample) for sample in SAMPLES]
        trainer = make(model, samples, trainer=Spy, epochs=1, validation_split=0.3, seed=5)
        history = trainer.train()
        assert len(drawn["eval"]) == 3
        assert sorted(drawn["train"] + drawn["eval"]) == list(range(11))
        held = [SAMPLES[index] for index in drawn["eval"]]
        assert history[-1]["eval_loss"] == pytest.approx(mean_loss(trainer.model, held), rel=1e-6)
        again = make(model, samples, epochs=1, validation_split=0.3, seed=5)
        assert again.eval_samples.indices == drawn["eval"]
        other = make(model, samples, epochs=1, validation_split=0.3, seed=6)
        assert other.eval_samples.indices != drawn["eval"]
        assert again.samples.name(0) == f"sample {again.samples.indices[0]}"

    def test_parts_know_what_the_whole_knows(self, model):
        trainer = make(model, Counted(SAMPLES), max_tokens=9, validation_split=0.01)
        assert trainer.samples.counted == [TARGETS[index] for index in trainer.samples.indices]
        assert len(trainer.eval_samples) == 1
        assert trainer.total_steps() >= 1

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            (
                {"validation_split": 0.99},
                "validation_split=0.99 of 11 samples leaves none to train on; give more samples or a smaller share.",
            ),
            (
                {"validation_split": 0.5, "eval_samples": SAMPLES},
                "validation_split=0.5 and samples to evaluate on were both given; give one of them.",
            ),
            (
                {"eval_at_start": True},
                "eval_at_start=True needs samples to evaluate on; "
                "give eval_samples (--eval-data), or validation_split.",
            ),
            (
                {"checkpoint_best": True, "out_dir": "x"},
                "checkpoint_best=True needs samples to evaluate on; "
                "give eval_samples (--eval-data), or validation_split.",
            ),
        ],
    )
    def test_what_cannot_be_evaluated_is_refused(self, model, fields, text):
        with pytest.raises(BadInputError) as caught:
            make(model, **fields)
        assert str(caught.value) == text


SAVING = {"epochs": 2, "schedule": "cosine", "weight_decay": 0.1}


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


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

    @pytest.mark.parametrize("keep", [1, 2])
    def test_the_best_is_kept_whatever_its_age(self, model, tmp_path, keep):
        losses = iter([5.0, 3.0, 4.0, math.nan, 2.0, 6.0, 7.0, 8.0, 9.0])

        class Scripted(Trainer):
            def evaluate(self):
                super().evaluate()
                return next(losses)

        fields = {"checkpoint_every": 1, "checkpoint_best": True, "keep_checkpoints": keep}
        fields |= {"eval_every": 1, "eval_samples": SAMPLES[:2], "out_dir": tmp_path}
        trainer = make(model, trainer=Scripted, max_steps=8, **fields)
        seen = []
        trainer.on_step = lambda _: seen.append((names(tmp_path), best_of(tmp_path)))
        trainer.train()
        # After steps 2, 4 and 7, told at the record of the next one.
        newest = [f"checkpoint-{step}.pt" for step in range(9 - keep, 9)]
        assert names(tmp_path) == sorted(["checkpoint-5.pt", "checkpoint-best.pt", *newest])
        assert best_of(tmp_path) == 5
        assert [best for _, best in seen] == [None, 1, 2, 2, 2, 5, 5, 5]
        assert "checkpoint-2.pt" in seen[4][0]
        assert "checkpoint-2.pt" not in seen[-1][0]
        resumed = make(model, trainer=Scripted, max_steps=9, resume_from=tmp_path, **fields)
        resumed.train()  # 9.0 is not the best of the run: its memory came back with it
        assert best_of(tmp_path) == 5
        assert (resumed.progress.best_loss, resumed.progress.best_step) == (2.0, 5)

    def test_best_checkpoints_alone(self, model, tmp_path):
        losses = iter([3.0, 2.0, 2.0, 1.0])

        class Scripted(Trainer):
            def evaluate(self):
                return next(losses)

        fields = {"checkpoint_best": True, "eval_every": 1, "eval_samples": SAMPLES[:2]}
        make(model, trainer=Scripted, max_steps=4, out_dir=tmp_path, **fields).train()
        assert names(tmp_path) == [f"checkpoint-{which}.pt" for which in (1, 2, 4, "best")]
        assert best_of(tmp_path) == 4

    def test_later_checkpoints_of_another_run_are_not_counted_when_pruning(self, tmp_path):
        for step in (2, 4, 6, 50):
            (tmp_path / f"checkpoint-{step}.pt").write_bytes(b"")
        checkpoint_files.prune(tmp_path, newest=6, keep=1, protected={2})
        assert names(tmp_path) == ["checkpoint-2.pt", "checkpoint-50.pt", "checkpoint-6.pt"]

    @pytest.fixture
    def two(self, model, tmp_path):
        """A folder with the checkpoints of steps 2 and 4."""
        make(
            model, out_dir=tmp_path, checkpoint_every=2, **SAVING | {"epochs": None, "max_steps": 4}
        ).train()
        return tmp_path

    @pytest.mark.parametrize("damage", ["empty", "half", "short by one", "bit", "other"])
    def test_a_damaged_newest_is_skipped_and_that_is_told(self, two, caplog, damage):
        path = two / "checkpoint-4.pt"
        content = path.read_bytes()
        middle = content.index(read_checkpoint(path)["model"]["lm_head.weight"].numpy().tobytes())
        flipped = bytearray(content)
        flipped[middle + 100] ^= 1
        path.write_bytes(
            {
                "empty": b"",
                "half": content[: len(content) // 2],
                "short by one": content[:-80],
                "bit": bytes(flipped),
                "other": b"something else",
            }[damage]
        )
        assert find_checkpoint(two) == two / "checkpoint-2.pt"
        (record,) = caplog.records
        assert record.getMessage().startswith(f"skipped a checkpoint: {path} is not a readable")
        if damage == "bit":
            assert record.getMessage().endswith(
                "(its bytes are not those that were written: the checksum differs)."
            )
        (two / "checkpoint-2.pt").write_bytes(b"")
        with pytest.raises(BadInputError) as caught:
            find_checkpoint(two)
        assert str(caught.value) == (
            f"the folder {two} has 2 checkpoints, and none can be read; start without resume_from."
        )

    def test_a_checkpoint_can_be_loaded_by_torch_alone(self, two):
        state = torch.load(two / "checkpoint-4.pt", weights_only=True)
        assert state["progress"]["step"] == 4

    def test_a_file_without_a_checksum_is_read_as_it_is(self, two):
        path = two / "checkpoint-4.pt"
        torch.save(read_checkpoint(path), path)
        assert find_checkpoint(two) == path

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_a_crash_at_any_byte_leaves_the_one_before(self, two, model):
        """The process ends after so many bytes, with all its buffers unwritten."""
        path, before = two / "checkpoint-2.pt", (two / "checkpoint-2.pt").read_bytes()
        state = read_checkpoint(two / "checkpoint-4.pt")
        size = (two / "checkpoint-4.pt").stat().st_size
        (two / "checkpoint-4.pt").unlink()
        offsets = sorted({*range(0, size, size // 23), 1, 63, size - 72, size - 71, size - 1})
        for offset in offsets:
            crash(two / "checkpoint-4.pt", state, after=offset)
            assert names(two) == ["checkpoint-2.pt"]
            assert path.read_bytes() == before
            assert find_checkpoint(two) == path
        for phase in ("fsync", "replace"):
            crash(two / "checkpoint-4.pt", state, at=phase)
            assert names(two) == ["checkpoint-2.pt"]
        crash(two / "checkpoint-4.pt", state, at="sync_folder")
        assert find_checkpoint(two) == two / "checkpoint-4.pt"

    def test_old_ones_are_deleted_only_when_the_new_one_is_there(self, two, model, monkeypatch):
        def fail(state, file):
            file.write(b"a part")
            raise OSError("no space left on device")

        monkeypatch.setattr(torch, "save", fail)
        fields = {"out_dir": two, "resume_from": two, "max_steps": 5, "keep_checkpoints": 1}
        with pytest.raises(OSError, match="no space left"):
            make(model, checkpoint_every=1, **fields).train()
        assert names(two) == ["checkpoint-2.pt", "checkpoint-4.pt"]

    def test_a_file_written_beside_training_holds_the_moment_it_was_asked_for(
        self, model, tmp_path, monkeypatch
    ):
        """The write of step 1 is held until step 3 is done, and all weights have moved."""
        fields = {"max_steps": 4, "weight_decay": 0.1}
        make(model, out_dir=tmp_path / "one", checkpoint_every=1, **fields).train()
        moved, save = threading.Event(), checkpoint_files.write_checkpoint
        started = []

        def held(path, state):
            started.append((path.name, threading.current_thread() is threading.main_thread()))
            assert moved.wait(60)
            save(path, state)

        monkeypatch.setattr(checkpoint_files, "write_checkpoint", held)
        options = {
            "out_dir": tmp_path / "two",
            "async_checkpoints": True,
            "checkpoint_each_epoch": True,
        }
        trainer = make(model, SAMPLES[:4], **options, **fields | {"max_steps": None, "epochs": 1})
        trainer.on_step = None
        trainer = make(
            model,
            checkpoint_every_samples=4,
            **options | {"checkpoint_each_epoch": False},
            **fields,
        )
        trainer.saving_due = lambda **_: trainer.steps_taken == 1
        trainer.on_step = lambda record: record["step"] == 3 and moved.set()
        trainer.train()
        assert started == [("checkpoint-1.pt", False)]
        one, two = (tmp_path / name / "checkpoint-1.pt" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()

    def test_what_goes_wrong_beside_training_ends_it(self, model, tmp_path, monkeypatch):
        failed = threading.Event()

        def fail(path, state):
            failed.set()
            raise OSError("no space left on device")

        monkeypatch.setattr(checkpoint_files, "write_checkpoint", fail)
        trainer = make(
            model, out_dir=tmp_path, async_checkpoints=True, checkpoint_every=2, max_steps=50
        )
        trainer.on_step = lambda record: record["step"] == 3 and failed.wait(60)
        with pytest.raises(OSError, match="no space left"):
            trainer.train()
        assert 3 <= len(trainer.history) <= 4

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_other_numbers_of_ranks_go_on_where_that_is_declared(self, rank, tiny_model, strategy):
        """Two ranks resume what one wrote: the same samples in the same steps, and the same numbers."""
        model, folder = tiny_model("llama", vocab_size=320), rank.shared_tmp_path
        alone = {"max_steps": 5, "micro_batch": 2, "gradient_accumulation_steps": 2, "lr": 1e-3}
        if rank.index == 0:
            with dist_hidden():
                whole = make(model, out_dir=folder, checkpoint_every=2, **alone)
                history = timeless(whole.train())
        rank.barrier()
        path = folder / "checkpoint-2.pt"
        together = alone | {"strategy": strategy, "gradient_accumulation_steps": 1}
        with pytest.raises(BadInputError) as caught:
            make(model, resume_from=path, **together).train()
        assert str(caught.value) == (
            f"{path} was written by 1 ranks and cannot be continued exactly by 2; use as many "
            "ranks, or elastic=True."
        )
        with pytest.raises(BadInputError, match="with global_batch=4, this run has global_batch=8"):
            make(model, resume_from=path, elastic=True, **together | {"micro_batch": 4}).train()
        resumed = make(model, resume_from=path, elastic=True, **together)
        rest = resumed.train()
        assert [record["step"] for record in rest] == [3, 4, 5]
        if rank.index == 0:
            assert [r["tokens"] for r in rest] == [r["tokens"] for r in history[2:]]
            losses = [record["loss"] for record in rest]
            assert losses == pytest.approx([record["loss"] for record in history[2:]], rel=1e-4)
        draws = rank.gather(torch.rand(1).item())
        assert draws[0] != draws[1]

    @pytest.mark.ranks(2)
    def test_all_ranks_take_the_checkpoint_that_rank_0_found(self, rank, tiny_model, monkeypatch):
        """A file system may show a new file to one machine before it shows it to another."""
        model, folder = tiny_model("llama", vocab_size=320), rank.shared_tmp_path
        fields = {"strategy": "ddp", "micro_batch": 2, "out_dir": folder}
        make(model, checkpoint_every=1, max_steps=3, **fields).train()
        if rank.index == 1:
            monkeypatch.setattr(checkpoint_files, "saved_steps", lambda _: [1])
        resumed = make(model, max_steps=4, resume_from=folder, **fields)
        assert [record["step"] for record in resumed.train()] == [4]
        with pytest.raises(BadInputError, match="has no checkpoint-<step>"):
            make(model, resume_from=folder.parent, **fields).train()


def best_of(folder):
    """The step that `checkpoint-best.pt` stands for."""
    link = folder / checkpoint_files.BEST
    return int(os.readlink(link).split("-")[1].removesuffix(".pt")) if link.exists() else None


def crash(path, state, *, after=None, at=None):
    """Write a checkpoint in a process that ends in the middle, at once and without any cleaning up."""
    child = os.fork()
    if child == 0:
        try:
            write = os.write

            class Dying(checkpoint_files.DigestWriter):
                written = 0

                def write(self, data):
                    data = bytes(data)
                    if after is not None and self.written + len(data) > after:
                        self.flush()
                        write(self.fileno(), data[: after - self.written])
                        os._exit(9)
                    self.written += len(data)
                    return super().write(data)

            def end(*_):
                os._exit(9)

            checkpoint_files.DigestWriter = Dying
            if at == "fsync":
                checkpoint_files.os.fsync = end
            elif at == "replace":
                checkpoint_files.Path.replace = end
            elif at == "sync_folder":
                checkpoint_files.sync_folder = end
            checkpoint_files.write_checkpoint(path, state)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def dist_hidden():
    """Train alone on a rank, as if there were no process group."""
    patch = pytest.MonkeyPatch()
    patch.setattr(dist, "is_initialized", lambda: False)

    class Context:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            patch.undo()

    return Context()


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
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    @pytest.mark.parametrize("which", [0, 1, None])
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

    @pytest.mark.ranks(2)
    def test_agreeing_takes_no_further_collective(self, rank, tiny_model, monkeypatch):
        calls = []
        reduce = dist.all_reduce

        def counted(tensor, *args, **kwargs):
            calls.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(dist, "all_reduce", counted)
        trainer = make(tiny_model("llama", vocab_size=320), strategy="ddp", max_steps=3)
        trainer.train()
        assert calls == [2] + [2, 2] * 3  # before the first step; then tokens and loss of each

    def test_a_batch_without_targets_does_not_delay_it(self, model):
        blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
        trainer = make(model, blank, until_stopped=True)
        trainer.on_step = lambda record: record["step"] == 2 and trainer.stop.request("test")
        assert len(trainer.train()) == 3

    def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_first_once_more(self):
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

    def test_what_a_signal_prints(self, capfd):
        with preemption.listen(StopRequest()):
            signal.raise_signal(signal.SIGUSR1)
        assert capfd.readouterr().err == (
            "\nSIGUSR1: the run ends after this step, with a checkpoint; again to end at once\n"
        )

    def test_the_step_that_completes_the_run_is_its_end(self, model):
        trainer = make(model, max_steps=3)
        trainer.on_step = lambda record: record["step"] == 2 and trainer.stop.request("test")
        trainer.train()
        assert trainer.finished()
