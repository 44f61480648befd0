"""Checkpoint files that are torn, flipped, pruned, or written beside training."""

from __future__ import annotations

import math
import os
import threading

import pytest
import torch

from bodies.loop import SAMPLES, SAVING, best_of, make, names
from pytest_ranks import BadInputError
from pytest_ranks.reference import Trainer, checkpoint_files
from pytest_ranks.reference.checkpoint import find_checkpoint, read_checkpoint


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


@pytest.fixture
def two(model, tmp_path):
    """A folder with the checkpoints of steps 2 and 4."""
    fields = {"epochs": None, "max_steps": 4, "schedule": "constant"}
    make(model, out_dir=tmp_path, checkpoint_every=2, **SAVING | fields).train()
    return tmp_path


def test_later_checkpoints_of_another_run_are_not_counted_when_pruning(tmp_path):
    for step in (2, 4, 6, 50):
        (tmp_path / f"checkpoint-{step}.pt").write_bytes(b"")
    checkpoint_files.prune(tmp_path, newest=6, keep=1, protected={2})
    assert names(tmp_path) == ["checkpoint-2.pt", "checkpoint-50.pt", "checkpoint-6.pt"]


@pytest.mark.parametrize("damage", ["empty", "half", "short by one", "bit", "other"])
def test_a_damaged_newest_is_skipped_and_that_is_told(two, caplog, damage):
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


def test_a_checkpoint_can_be_loaded_by_torch_alone(two):
    state = torch.load(two / "checkpoint-4.pt", weights_only=True)
    assert state["progress"]["step"] == 4


def test_a_file_without_a_checksum_is_read_as_it_is(two):
    path = two / "checkpoint-4.pt"
    torch.save(read_checkpoint(path), path)
    assert find_checkpoint(two) == path


def test_old_ones_are_deleted_only_when_the_new_one_is_there(two, model, monkeypatch):
    def fail(state, file):
        file.write(b"a part")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    fields = {"out_dir": two, "resume_from": two, "keep_checkpoints": 1}
    fields |= {"max_steps": 5, "weight_decay": SAVING["weight_decay"]}
    with pytest.raises(OSError, match="no space left"):
        make(model, checkpoint_every=1, **fields).train()
    assert names(two) == ["checkpoint-2.pt", "checkpoint-4.pt"]


def test_a_file_written_beside_training_holds_the_moment_it_was_asked_for(
    model, tmp_path, monkeypatch
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
    trainer = make(model, out_dir=tmp_path / "two", async_checkpoints=True, **fields)
    trainer.saving_due = lambda **_: trainer.steps_taken == 1
    trainer.on_step = lambda record: record["step"] == 3 and moved.set()
    trainer.train()
    assert started == [("checkpoint-1.pt", False)]
    one, two = (tmp_path / name / "checkpoint-1.pt" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_what_goes_wrong_beside_training_ends_it(model, tmp_path, monkeypatch):
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


def test_best_checkpoints_alone(model, tmp_path):
    losses = iter([math.nan, 2.0, 2.0, 1.0])

    class Scripted(Trainer):
        def evaluate(self):
            return next(losses)

    fields = {"checkpoint_best": True, "eval_every": 1, "eval_samples": SAMPLES[:2]}
    make(model, trainer=Scripted, max_steps=4, out_dir=tmp_path, **fields).train()
    assert names(tmp_path) == [f"checkpoint-{which}.pt" for which in (2, 4, "best")]
    assert best_of(tmp_path) == 4


@pytest.mark.ranks(2)
def test_all_ranks_take_the_checkpoint_that_rank_0_found(rank, tiny_model, monkeypatch):
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


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_crash_at_any_byte_leaves_the_one_before(two, model):
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


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_is_kept_whatever_its_age(model, tmp_path, keep):
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
