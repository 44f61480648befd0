from __future__ import annotations

from array import array

import pytest
import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.collate import MaxTokensPerRankCollator, collate


def document(*ids, prompt=0):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids)[prompt:]}


def test_padded_rows_are_padded_by_length_not_by_token():
    """The end-of-text token 0 is also the padding token: real ones stay trained and attended."""
    batch = collate([[document(5, 6, 0)], [document(7, 0, 0, 8, 0, prompt=1)]], pad_id=0, packed=False)  # fmt: skip
    assert batch.input_ids.tolist() == [[5, 6, 0, 0, 0], [7, 0, 0, 8, 0]]
    assert batch.labels.tolist() == [[-100, 6, 0, -100, -100], [-100, 0, 0, 8, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.position_ids[:, :3].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.samples == 2


def test_packed_rows_restart_positions_and_drop_each_first_label():
    rows = [[document(5, 6, 7), document(8, 9, 3, 4, prompt=2)], [document(1, 2)]]
    batch = collate(rows, pad_id=0, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4], [1, 2, 0, 0, 0, 0, 0]]
    assert batch.labels[0].tolist() == [-100, 6, 7, -100, -100, 3, 4]
    assert batch.labels[1].tolist() == [-100, 2, -100, -100, -100, -100, -100]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.attention_mask is None
    assert batch.samples == 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_rank_without_samples_runs_a_row_without_targets(packed):
    batch = collate([], pad_id=3, packed=packed)
    assert batch.samples == 0
    assert (batch.labels == -100).all()
    assert batch.input_ids.numel() > 0


def test_a_layout_decides_positions_labels_and_mask():
    class Wrong:
        def positions(self, lengths, width):
            return list(range(width))

        def labels(self, row, width):
            return [1] * width

        def mask(self, lengths, width, *, packed):
            return torch.ones(len(lengths), width)

    batch = collate([[document(5, 6), document(7, 8)]], pad_id=0, packed=True, layout=Wrong())
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.labels.tolist() == [[1, 1, 1, 1]]
    assert batch.attention_mask.tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_collator_parts_of_all_ranks_make_the_batch():
    batch = [document(*range(1, 1 + n)) for n in (5, 9, 2, 7, 7)]
    parts = [MaxTokensPerRankCollator(10, rank=rank, world_size=2)(batch) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sum(part.samples for own in parts for part in own) == 5
    assert all(part.input_ids.shape[1] <= 10 for own in parts for part in own)


def test_collator_names_a_bad_sample():
    with pytest.raises(BadInputError, match="sample 1 has 12 tokens, more than the 10"):
        MaxTokensPerRankCollator(10)([document(1), document(*range(12))])
    with pytest.raises(BadInputError, match="sample 0 of the batch: the field 'labels' is missing"):
        MaxTokensPerRankCollator(10)([{"input_ids": [1]}])


@pytest.mark.parametrize("kind", [torch.tensor, tuple, lambda ids: array("i", ids)])
def test_samples_may_be_any_kind_of_integer_sequence(kind):
    kinds = {key: kind(value) for key, value in document(5, 6, 7, prompt=1).items()}
    found = collate([[kinds, kinds]], pad_id=0, packed=True)
    expected = collate([[document(5, 6, 7, prompt=1)] * 2], pad_id=0, packed=True)
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.labels, expected.labels)
    assert found.input_ids.dtype == found.labels.dtype == torch.int64
