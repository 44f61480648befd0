"""Test items on ranks with a GPU each."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.ranks(1, backend="nccl")
def test_one_rank_computes_on_its_gpu(rank):
    total = torch.ones(4, device=rank.device)
    torch.distributed.all_reduce(total)
    assert rank.device == torch.device("cuda", 0)
    assert total.tolist() == [1.0] * 4


@pytest.mark.multi_gpu
@pytest.mark.ranks(2, backend="nccl")
def test_two_ranks_add_up_on_their_gpus(rank):
    total = torch.full((4,), float(rank.index + 1), device=rank.device)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [3.0] * 4
    assert rank.gather(rank.device.index) == [0, 1]
