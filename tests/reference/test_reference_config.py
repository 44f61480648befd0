from __future__ import annotations

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import TrainConfig


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tail": "dorp"}, "use one of 'partial', 'drop', 'pad'. Did you mean 'drop'?"),
        ({"strategy": "fsdp"}, "Did you mean 'fsdp2'?"),
        ({"optimizer": "lion"}, "optimizer='lion' is not known; use one of 'adamw', 'sgd'."),
        ({"micro_batch": 0}, "micro_batch=0 is not a whole number of at least 1."),
        ({"micro_batch": 2.0}, "micro_batch=2.0 is not a whole number"),
        ({"micro_batch": None}, "micro_batch=None is not a whole number"),
        ({"micro_batch": True}, "micro_batch=True is not a whole number"),
        ({"max_steps": 0}, "max_steps=0 is not a whole number of at least 1."),
        ({"warmup_steps": -1}, "warmup_steps=-1 is not a whole number of at least 0."),
        ({"seed": 2**70}, f"seed={2**70} is more than {2**62}, the largest."),
        ({"lr": float("nan")}, "lr=nan is not a finite number of at least 0."),
        ({"lr": "1e-3"}, "lr='1e-3' is not a finite number"),
        ({"max_grad_norm": 0}, "use None to turn it off"),
        ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) are not two numbers in [0, 1)."),
        ({"betas": (0.9,)}, "are not two numbers"),
        ({"epochs": 1}, "found max_steps=1 and epochs=1; give exactly one"),
        ({"max_steps": None}, "found max_steps=None and epochs=None; give exactly one"),
        (
            {"max_tokens_per_rank": 8, "pack_length": 8},
            "a batch is packed by step or by rows, not both",
        ),
        ({"checkpoint_every": 2}, "checkpoint_every=2 needs out_dir"),
    ],
)
def test_bad_field_is_one_clear_sentence(fields, text):
    with pytest.raises(BadInputError) as caught:
        TrainConfig(**({"max_steps": 1} | fields))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_packed_says_whether_rows_hold_several_documents():
    assert not TrainConfig(max_steps=1).packed
    assert TrainConfig(max_steps=1, pack_length=8).packed
    assert TrainConfig(max_steps=1, max_tokens_per_rank=8).packed
