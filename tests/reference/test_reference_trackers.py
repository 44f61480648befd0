"""TensorBoard and Weights & Biases, the real ones, and trackers that fail."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bodies.loop import Kept, make
from pytest_ranks import BadInputError
from pytest_ranks.reference import TrainConfig, trackers


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


def test_tensorboard_has_every_number(model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fields = {"out_dir": tmp_path, "tensorboard": True, "checkpoint_every": 3}
    history = make(model, max_steps=4, **fields).train()
    rest = make(model, max_steps=5, resume_from=tmp_path / "checkpoint-3.pt", **fields).train()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens"):
        records, events = history[:3] + rest, read.Scalars(name)  # step 4 is there once
        assert [event.step for event in events] == [record["step"] for record in records]
        values = [event.value for event in events]
        assert values == pytest.approx([record[name] for record in records])  # in float32
    assert "tokens_per_second" in read.Tags()["scalars"]


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step, loss in ((1, 2.515625), (2, 1.265625)):
        tracker = trackers.WeightsAndBiases(tmp_path, config={"lr": "0.1"})
        tracker.log({"step": step, "loss": loss, "tokens": 8, "seconds": 2.0})
        tracker.close()
    wandb.teardown()  # its own process writes, and has written when it ends
    files = [*(tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    name = f"run-{(tmp_path / 'wandb_id').read_text()}.wandb"
    assert [path.name for path in files] == [name, name]
    contents = [path.read_bytes() for path in files]
    for value in (b"2.515625", b"1.265625"):
        assert [value in content for content in contents].count(True) == 1
    assert all(b"tokens_per_second" in content for content in contents)


@pytest.mark.parametrize("action", ["log", "close"])
def test_a_tracker_that_fails_is_told_once_and_left_out(model, caplog, action):
    kept, broken = Kept(), Kept()
    calls = []

    def fail(*_):
        calls.append(1)
        raise ConnectionError("no route to host")

    setattr(broken, action, fail)
    history = make(model, trackers=[broken, kept]).train()
    assert kept.records == history
    assert (kept.closed, len(calls)) == (1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"Kept failed in {action}() and gets no further records; training goes on: "
        "ConnectionError: no route to host"
    ]


def test_a_tracker_that_cannot_begin_is_told(model, tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    history = make(model, out_dir=tmp_path, tensorboard=True).train()
    assert len(history) == 5
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "tensorboard could not begin and gets no records; training goes on: "
    )


def test_a_package_that_is_missing_is_named_before_anything_is_done(model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInputError) as caught:
        make(model, out_dir=tmp_path, wandb=True)
    assert str(caught.value) == "wandb=True needs the package wandb: pip install wandb"
    with pytest.raises(BadInputError) as caught:
        TrainConfig(max_steps=1, tensorboard=True)
    assert str(caught.value) == ("tensorboard=True needs out_dir, the folder that its files go to.")
