from __future__ import annotations

import json

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.data import JsonlDataset, check_sample, count_targets, measure
from pytest_ranks.reference.loader import data_loader

GOOD = '{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}'


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_reads_samples_in_file_order_and_ignores_other_fields(tmp_path):
    more = json.dumps({"input_ids": [4], "labels": [4], "len": 9, "text": "a\u2028b"})
    dataset = JsonlDataset(write(tmp_path / "a.jsonl", GOOD, "", more.replace("\\u2028", "\u2028")))
    assert [list(dataset[index]["input_ids"]) for index in range(len(dataset))] == [[1, 2, 3], [4]]
    assert dataset.lengths == [3, 1]
    assert dataset.largest_id == 4


def test_the_first_label_never_counts():
    assert count_targets({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}) == 2
    assert count_targets({"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}) == 1
    assert count_targets({"input_ids": [1], "labels": [1]}) == 0


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"input_ids": [1, 2', "not JSON (Expecting ',' delimiter, column 20)"),
        ("[1, 2]", "expected an object with 'input_ids' and 'labels', found list."),
        ('{"input_ids": [1]}', "the field 'labels' is missing; found 'input_ids'."),
        ('{"text": "a", "labels": []}', "'input_ids' is missing; found 'text', 'labels'."),
        ("{}", "the field 'input_ids' is missing; found none."),
        ('{"input_ids": 3, "labels": [1]}', "'input_ids' is 3; expected a list"),
        ('{"input_ids": null, "labels": [1]}', "'input_ids' is None; expected a list"),
        ('{"input_ids": [], "labels": []}', "'input_ids' is empty; leave the sample out."),
        ('{"input_ids": [1, 2], "labels": [1]}', "2 input_ids and 1 labels; expected as many"),
        ('{"input_ids": [1, 2.0], "labels": [1, 2]}', "input_ids[1] is 2.0; expected a token id"),
        ('{"input_ids": [1, 4294967296], "labels": [1, 2]}', "input_ids[1] is 4294967296; expec"),
        ('{"input_ids": [1, true], "labels": [1, 2]}', "input_ids[1] is True; expected a token id"),
        ('{"input_ids": [1, "2"], "labels": [1, 2]}', "input_ids[1] is '2'; expected a token id"),
        ('{"input_ids": [1, -100], "labels": [1, 2]}', "input_ids[1] is -100; expected a token id"),
        (
            '{"input_ids": [1, 2], "labels": [-1, 2]}',
            "labels[0] is -1; expected a token id: ",
        ),
    ],
)
def test_bad_line_is_named_with_file_and_line(tmp_path, line, text):
    path = write(tmp_path / "bad.jsonl", GOOD, line)
    with pytest.raises(BadInputError) as caught:
        JsonlDataset(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_and_empty_files_are_named(tmp_path):
    with pytest.raises(BadInputError, match=r"none\.jsonl cannot be read: No such file"):
        JsonlDataset(tmp_path / "none.jsonl")
    with pytest.raises(BadInputError, match="holds no samples; expected one"):
        JsonlDataset(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInputError, match="is not UTF-8 text"):
        JsonlDataset(tmp_path / "binary.jsonl")


def test_a_file_that_trains_nothing_is_refused(tmp_path):
    line = '{"input_ids": [5, 6], "labels": [5, -100]}\n'
    with pytest.raises(BadInputError, match="has no label to train on: all are -100"):
        JsonlDataset(write(tmp_path / "masked.jsonl", line * 2))


def test_lengths_are_asked_for_without_drawing_a_sample():
    class Lazy(list):
        lengths = (3, 4)

        def __getitem__(self, index):
            raise AssertionError("a sample was drawn")

    assert measure(Lazy([None, None]), 4) == [3, 4]


def test_overlong_sample_is_named_with_its_file(tmp_path):
    short = '{"input_ids": [1], "labels": [1]}'
    dataset = JsonlDataset(write(tmp_path / "a.jsonl", short, "", GOOD))
    with pytest.raises(BadInputError, match=r"a\.jsonl, line 3 has 3 tokens, more than the 2 "):
        measure(dataset, 2)


def test_a_tensor_like_sample_is_a_sample():
    import torch

    sample = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}
    assert check_sample(sample, where="sample 0") is sample


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loader_gives_every_sample_once_and_all_ranks_as_many_micro_batches(samples, world_size):
    loaders = [
        data_loader(samples, global_batch=4, max_tokens_per_rank=40, rank=rank,
                    world_size=world_size, seed=3)
        for rank in range(world_size)
    ]  # fmt: skip
    drawn, counted = 0, 0
    for steps in zip(*loaders, strict=True):
        assert len({len(micro_batches) for micro_batches in steps}) == 1
        for batch in (batch for micro_batches in steps for batch in micro_batches):
            assert batch.input_ids.shape[1] <= 40
            drawn += batch.samples
            counted += int((batch.labels[:, 1:] != -100).sum())
    assert drawn == len(samples)
    assert counted == sum(count_targets(sample) for sample in samples)


def test_loader_follows_the_sampler_epoch(samples):
    loader = data_loader(samples, global_batch=11, max_tokens_per_rank=400)

    def first_ids():
        return [batch.input_ids.tolist() for step in loader for batch in step]

    epoch_0 = first_ids()
    assert first_ids() == epoch_0
    loader.sampler.set_epoch(1)
    assert first_ids() != epoch_0


def test_loading_processes_give_the_same_batches(samples):
    def batches(workers):
        loader = data_loader(samples, global_batch=4, max_tokens_per_rank=40, workers=workers)
        return [batch.input_ids.tolist() for step in loader for batch in step]

    assert batches(workers=1) == batches(workers=0)


def test_loader_refuses_an_empty_set():
    with pytest.raises(BadInputError, match="no samples to load"):
        data_loader([], global_batch=1, max_tokens_per_rank=8)
