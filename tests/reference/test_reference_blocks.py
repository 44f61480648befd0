from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_ranks.models import tiny_model
from pytest_ranks.reference.blocks import find_blocks, find_units, outermost


def names(model, parts):
    known = {id(part): name for name, part in model.named_modules()}
    return {known[id(part)] for part in parts}


def test_every_layer_of_a_declared_class_is_a_block():
    model = tiny_model("qwen3")
    assert set(model._no_split_modules) == {"Qwen3DecoderLayer"}
    assert names(model, find_blocks(model)) == {"model.layers.0", "model.layers.1"}


def test_a_family_that_declares_nothing_has_its_checkpointing_layers():
    model = tiny_model("biogpt")
    assert not model._no_split_modules
    assert names(model, find_blocks(model)) == {"biogpt.layers.0", "biogpt.layers.1"}


def test_a_declared_class_that_is_not_there_is_passed_over():
    model = tiny_model("qwen3_5")
    assert "Qwen3_5VisionBlock" in model._no_split_modules  # the text part has no such block
    assert names(model, find_blocks(model)) == {"model.layers.0", "model.layers.1"}


def test_a_model_without_declarations_is_one_unit():
    assert find_blocks(nn.Sequential(nn.Linear(1, 1))) == []


def test_inner_blocks_come_before_outer_ones_and_can_be_left_out():
    model = tiny_model("mamba")
    blocks = find_blocks(model)
    order = [name for block in blocks for name in names(model, [block])]
    layer, mixer = "backbone.layers.1", "backbone.layers.1.mixer"
    assert order.index(mixer) < order.index(layer)
    assert names(model, outermost(blocks)) == {"backbone.layers.0", "backbone.layers.1"}


def test_a_block_that_shares_a_parameter_with_the_outside_is_no_unit():
    model = tiny_model("bert")
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    blocks, units = names(model, find_blocks(model)), names(model, find_units(model))
    assert blocks - units == {"bert.embeddings"}
    assert units == {"bert.encoder.layer.0", "bert.encoder.layer.1"}


def test_parameters_shared_within_a_block_do_not_matter():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 2, bias=False)
            self.other = nn.Linear(2, 2, bias=False)
            self.other.weight = self.one.weight

    model = nn.ModuleList([Block(), Block()])
    model._no_split_modules = ["Block"]
    assert len(find_units(model)) == 2
    model[1].one.weight = model[0].one.weight
    assert find_units(model) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize("family", ["bert", "zamba", "mbart", "gpt2"])
def test_ties_survive_sharding(rank, family):
    from pytest_ranks.reference.parallel import World, precision_policy, shard

    model = tiny_model(family)

    def groups():
        named = [*model.named_parameters(remove_duplicate=False)]
        return {frozenset(n for n, q in named if q is p) for _, p in named}

    before = groups()
    assert any(len(group) > 1 for group in before)
    world = World(rank=rank.index, size=rank.world_size, device=torch.device("cpu"))
    shard(model, world, precision_policy("fp32"))
    assert groups() == before
