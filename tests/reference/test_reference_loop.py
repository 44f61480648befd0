"""The loop in detail: its ends, its bar, what it refuses, and other numbers of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bodies.loop import SAMPLES, TARGETS, Counted, is_equal, make, timeless, weights
from pytest_ranks import BadInputError
from pytest_ranks.reference import TrainConfig, cli


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
def test_what_cannot_be_is_one_sentence(fields, text):
    with pytest.raises(BadInputError) as caught:
        TrainConfig(**fields)
    assert str(caught.value) == text


def test_schedule_to_an_end_that_nobody_knows_is_refused(model):
    with pytest.raises(BadInputError) as caught:
        make(model, max_tokens=10, schedule="cosine").train()
    assert str(caught.value) == (
        "schedule='cosine' with max_tokens=10 needs samples with an attribute counted (the "
        "trained tokens of each), as JsonlDataset has; give them, or use schedule='constant'."
    )
    trainer = make(model, max_tokens=10)
    assert trainer.total_steps() is None
    assert trainer.train()[-1]["lr"] == 1e-2


def test_tokens_that_cannot_be_reached_are_refused(model):
    blank = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4
    with pytest.raises(BadInputError) as caught:
        make(model, blank, max_tokens=10).train()
    assert str(caught.value) == (
        "max_tokens=10 cannot be reached: an epoch of 4 samples trained no token; "
        "give labels other than -100."
    )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_other_numbers_of_ranks_go_on_where_that_is_declared(rank, tiny_model, strategy):
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


@pytest.mark.parametrize(
    ("fields", "total", "unit", "start"),
    [
        ({"max_steps": 7}, 7, "step", 0),
        ({"epochs": 2}, 6, "step", 0),
        ({"until_stopped": True}, None, "step", 0),
        ({"max_tokens": 99}, 99, "token", 0),
        ({"max_steps": 7, "resume_from": 2}, 7, "step", 2),
        ({"max_tokens": 99, "resume_from": 2}, 99, "token", sum(TARGETS[:8])),
    ],
    ids=str,
)
def test_progress_bar(model, tmp_path, fields, total, unit, start):
    if "resume_from" in fields:
        make(model, shuffle=False, max_steps=2, checkpoint_every=2, out_dir=tmp_path).train()
        fields = fields | {"resume_from": tmp_path}
    trainer = make(model, shuffle=False, **fields)
    trainer.setup()
    with cli.progress_bar(trainer) as bar:
        assert (bar.total, bar.unit, bar.initial) == (total, unit, start)
        trainer.on_step = cli.show_on(bar)
        trainer.on_step({"loss": 1.0, "lr": 0.1, "tokens": 30, "seconds": 2.0})
        assert bar.n == start + (30 if unit == "token" else 1)
        assert bar.postfix == "tokens/s=15, loss=1.0000, lr=1.00e-01"


def test_schedule_knows_the_last_step_of_a_run_to_tokens(model):
    trainer = make(model, Counted(SAMPLES), max_tokens=sum(TARGETS) + 1, schedule="linear")
    rates = [record["lr"] for record in trainer.train()]
    steps = len(rates)
    assert rates == pytest.approx([1e-2 * (1 - step / steps) for step in range(steps)])


def test_tokens_are_counted_on_over_a_resume(model, tmp_path):
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


@pytest.mark.parametrize("seed", range(4))
def test_steps_to_a_number_of_tokens_are_counted_in_the_order_of_each_epoch(model, seed):
    """Epochs draw in orders of their own, so that the step that reaches a number is another each time."""
    trainer = make(model, Counted(SAMPLES), max_tokens=1, micro_batch=2, seed=seed)
    windows = [
        trainer.order(epoch)[start : start + 2] for epoch in range(3) for start in range(0, 11, 2)
    ]
    reached = [sum(TARGETS[index] for index in window) for window in windows]
    for limit in range(1, 3 * sum(TARGETS) + 1):
        expected = next(n for n in range(1, 19) if sum(reached[:n]) >= limit)
        assert trainer.steps_to_tokens(limit, TARGETS) == expected
