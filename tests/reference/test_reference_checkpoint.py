from __future__ import annotations

import json
import random

import pytest
import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import TrainConfig, Trainer
from pytest_ranks.reference.checkpoint import read_checkpoint
from pytest_ranks.reference.preemption import StopRequest


def settings(**fields):
    base = {"micro_batch": 2, "gradient_accumulation_steps": 2, "epochs": 2, "lr": 1e-2,
            "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "device": "cpu"}  # fmt: skip
    return TrainConfig(**(base | fields))


def trained(make_model, samples, **fields):
    model = make_model(attention_dropout=0.3)
    windows = []

    class Spy(Trainer):
        def train_step(self, window):
            windows.append(window)
            return super().train_step(window)

    history = Spy(settings(**fields), model=model, samples=samples).train()
    for record in history:
        del record["seconds"]
    return dict(model.named_parameters()), history, windows


@pytest.mark.parametrize(
    "fields",
    [{}, {"optimizer": "sgd"}, {"tail": "pad"}, {"tail": "drop"}, {"max_tokens_per_rank": 40}],
    ids=str,
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(make_model, samples, tmp_path, fields):
    whole, history, windows = trained(
        make_model, samples, checkpoint_every=1, out_dir=tmp_path, **fields
    )
    without_saving, *_ = trained(make_model, samples, **fields)
    assert all(torch.equal(whole[name], without_saving[name]) for name in whole)
    for step in range(1, len(history) + 1):
        resumed, tail, rest = trained(
            make_model, samples, resume_from=tmp_path / f"checkpoint-{step}.pt", **fields
        )
        assert rest == windows[step:]
        assert tail == history[step:]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_each_part_of_a_checkpoint_matters(make_model, samples, tmp_path):
    """Leave one part out and the resumed run is another: no part is there for show."""
    whole, _, _ = trained(make_model, samples, checkpoint_every=2, out_dir=tmp_path)
    path = tmp_path / "checkpoint-2.pt"
    state = read_checkpoint(path)
    cold = {
        "optimizer": {**state["optimizer"], "state": {}},
        "scheduler": {**state["scheduler"], "last_epoch": 0, "_step_count": 1},
        "progress": {**state["progress"], "cursor": 0},
        "random": [{**state["random"][0], "cpu": torch.Generator().manual_seed(9).get_state()}],
        "model": make_model().state_dict(),
    }
    for part, value in cold.items():
        torch.save(state | {part: value}, tmp_path / "partial.pt")
        resumed, _, _ = trained(make_model, samples, resume_from=tmp_path / "partial.pt")
        assert not all(torch.equal(whole[name], resumed[name]) for name in whole), part


def test_a_run_can_be_resumed_twice_and_from_a_folder(make_model, samples, tmp_path):
    whole, *_ = trained(make_model, samples, checkpoint_every=1, out_dir=tmp_path)
    for later in (3, 4, 5, 6):
        (tmp_path / f"checkpoint-{later}.pt").unlink()
    again = {"out_dir": tmp_path, "checkpoint_every": 2, "resume_from": tmp_path}
    trained(make_model, samples, **again)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        f"checkpoint-{step}.pt" for step in (1, 2, 4, 6)
    ]
    (tmp_path / "checkpoint-6.pt").unlink()
    resumed, tail, _ = trained(make_model, samples, **again)
    assert [record["step"] for record in tail] == [5, 6]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_write_leaves_the_checkpoint_before_it(make_model, samples, tmp_path):
    trained(make_model, samples, checkpoint_every=6, out_dir=tmp_path)
    path = tmp_path / "checkpoint-6.pt"
    before = path.read_bytes()

    class Unpicklable:
        def __reduce__(self):
            raise OSError("no space left on device")

    trainer = Trainer(settings(out_dir=tmp_path), model=make_model(), samples=samples)
    trainer.setup()
    trainer.settings = lambda: {"seed": Unpicklable()}
    with pytest.raises(OSError, match="no space left"):
        trainer.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"seed": 1}, "was trained with seed=0, this run has seed=1; use the same value"),
        ({"micro_batch": 4}, "was trained with micro_batch=2, this run has micro_batch=4"),
        ({"optimizer": "sgd"}, "was trained with optimizer='adamw', this run has optimizer='sgd'"),
        ({"lr": 0.5}, "was trained with lr=0.01, this run has lr=0.5"),
        ({"betas": (0.5, 0.95)}, "this run has betas=(0.5, 0.95)"),
        ({"eps": 1e-3}, "this run has eps=0.001"),
        ({"weight_decay": 0.5}, "this run has weight_decay=0.5"),
        ({"schedule": "linear"}, "this run has schedule='linear'"),
        ({"warmup_steps": 9}, "this run has warmup_steps=9"),
        ({"max_grad_norm": 9.0}, "this run has max_grad_norm=9.0"),
        ({"precision": "bf16"}, "this run has precision='bf16'"),
    ],
)
def test_run_that_would_go_on_otherwise_is_refused(make_model, samples, tmp_path, fields, text):
    trained(make_model, samples, checkpoint_every=3, out_dir=tmp_path)
    with pytest.raises(BadInputError) as caught:
        trained(make_model, samples, resume_from=tmp_path / "checkpoint-3.pt", **fields)
    assert text in str(caught.value)


def test_a_longer_run_is_another_where_the_schedule_falls_to_its_end(make_model, samples, tmp_path):
    for schedule in ("constant", "cosine"):
        fields = {"schedule": schedule, "out_dir": tmp_path / schedule, "epochs": None}
        trained(make_model, samples, max_steps=2, checkpoint_every=2, **fields)
        more = {"max_steps": 3, "resume_from": tmp_path / schedule, **fields}
        if schedule == "constant":
            assert [record["step"] for record in trained(make_model, samples, **more)[1]] == [3]
            continue
        with pytest.raises(BadInputError, match="with schedule_ends_at=2, this run has schedule_e"):
            trained(make_model, samples, **more)


def test_other_data_models_and_files_are_refused(make_model, samples, tmp_path):
    trained(make_model, samples, checkpoint_every=3, out_dir=tmp_path)
    path = tmp_path / "checkpoint-3.pt"
    with pytest.raises(BadInputError, match="with samples=11, this run has samples=10"):
        trained(make_model, samples[:10], resume_from=path)
    with pytest.raises(BadInputError, match=r"another model: 9 names differ, 'model\.layers\.1\."):
        trained(lambda **_: make_model(num_hidden_layers=1), samples, resume_from=path)
    with pytest.raises(BadInputError, match=r"has shape \[64, 32\], expected \[48, 32\]"):
        trained(lambda **_: make_model(intermediate_size=48), samples, resume_from=path)
    with pytest.raises(BadInputError, match=r"there is no checkpoint .*none\.pt"):
        trained(make_model, samples, resume_from=tmp_path / "none.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"has no checkpoint-<step>\.pt to resume from"):
        trained(make_model, samples, resume_from=tmp_path / "empty")
    (tmp_path / "torn.pt").write_bytes(b"not a checkpoint")  # torch advises to run what is in it
    with pytest.raises(BadInputError, match=r"\(it is no archive of plain tensors\)\.$"):
        trained(make_model, samples, resume_from=tmp_path / "torn.pt")
    for content in (b"", path.read_bytes()[:1000]):
        (tmp_path / "torn.pt").write_bytes(content)
        with pytest.raises(BadInputError, match=r"torn\.pt is not a readable checkpoint"):
            trained(make_model, samples, resume_from=tmp_path / "torn.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(BadInputError, match=r"other\.pt is not a checkpoint of this trainer"):
        trained(make_model, samples, resume_from=tmp_path / "other.pt")


def test_checkpoint_of_more_ranks_is_refused(make_model, samples, tmp_path):
    trained(make_model, samples, checkpoint_every=3, out_dir=tmp_path)
    state = read_checkpoint(tmp_path / "checkpoint-3.pt")
    torch.save(state | {"random": state["random"] * 2}, tmp_path / "two.pt")
    with pytest.raises(BadInputError, match="written by 2 ranks and cannot be continued exactly"):
        trained(make_model, samples, resume_from=tmp_path / "two.pt")


def test_a_moment_is_saved_once_in_each_folder(make_model, samples, tmp_path):
    """A run that is stopped before its first step has its checkpoint, whichever folder it came from."""
    saved = []

    class Spy(Trainer):
        def save(self, path):
            saved.append(path)
            super().save(path)

    trained(make_model, samples, checkpoint_every=2, out_dir=tmp_path / "one")
    path = tmp_path / "one" / "checkpoint-2.pt"
    for folder, expected in (("one", []), ("two", [tmp_path / "two" / "checkpoint-2.pt"])):
        stop = StopRequest()
        stop.request("test")
        fields = {"resume_from": path, "out_dir": tmp_path / folder}
        model = make_model(attention_dropout=0.3)
        Spy(settings(**fields), model=model, samples=samples, stop=stop).train()
        assert saved == expected


def test_randomness_of_python_goes_on_too(make_model, samples, tmp_path):
    """Samples may be made with it, masked here and there."""

    def drawn(**fields):
        seen = []

        class Noisy(Trainer):
            def sample(self, index, samples):
                seen.append(random.random())
                return super().sample(index, samples)

        Noisy(settings(**fields), model=make_model(), samples=samples).train()
        return seen

    random.seed(3)
    whole = drawn(out_dir=tmp_path, checkpoint_every=3)
    random.seed(4)
    assert drawn(resume_from=tmp_path / "checkpoint-3.pt") == whole[11:]
