"""From a folder to a model that is ready to train: alignment, sharding, precision, optimizer.

Every claim is a number: what two real ranks hold after a step is compared with the definition of
that step, computed here without the trainer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import CausalLMOutput

from pytest_ranks.reference import TrainConfig, Trainer
from pytest_ranks.reference.alignment import align
from pytest_ranks.reference.blocks import find_blocks, find_units
from pytest_ranks.reference.checkpoint import full_on_cpu

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"),
    *("bloom", "opt", "mixtral", "qwen3_moe", "mamba", "granite", "falcon", "bert", "biogpt"),
)
"""Dense, mixtures of experts, state spaces, tied and untied, nested blocks, none declared."""
UNEVEN = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3}
UNEVEN |= {"num_key_value_heads": 1, "head_dim": 12, "vocab_size": 321}
SAMPLES = [
    {"input_ids": [*range(10, 10 + size)], "labels": [-100, *range(11, 10 + size)]}
    for size in (9, 4, 7, 12)
]
LR = 0.1


def without_dropout(model):
    """Turn every dropout off: two runs of one model must be comparable."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or isinstance(module, torch.nn.Dropout)
            ):
                setattr(module, name, 0.0)
    return model


def plain_step(model, samples):
    """Make one SGD step by its definition: one sample at a time, unsharded, in one process."""
    model = copy.deepcopy(model).train()
    tokens = sum(len(sample["labels"]) - 1 for sample in samples)
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        chances = logits[:-1].log_softmax(-1)
        (-chances.gather(1, ids[0, 1:, None]).sum() / tokens).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad
    return dict(model.named_parameters())


def trainer_of(model, *, samples=SAMPLES, weights=None, **fields):
    base = {"optimizer": "sgd", "lr": LR, "max_steps": 1, "max_grad_norm": None, "device": "cpu"}
    base |= {"micro_batch": 2, "strategy": "fsdp2", "shuffle": False}
    config = TrainConfig(**(base | fields))
    return Trainer(config, model=model, samples=samples, weights=weights)


def whole(model):
    return {name: full_on_cpu(p.detach()) for name, p in model.named_parameters()}


def difference(found, wanted, before):
    """Return the largest error relative to how far the whole model moved."""
    moved = torch.cat([(wanted[name] - before[name]).flatten() for name in before])
    missed = torch.cat([(found[name] - wanted[name]).flatten() for name in before])
    return (missed.norm() / moved.norm()).item()


class TestAlignModelAndTokenizer:
    """Tokenizer and model agree, and what the model had learnt is not touched."""

    @pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
    def test_vocabulary_resizing(self, tiny_model, family):
        model = tiny_model(family)
        tokenizer = model.tokenizer
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        tied = head.weight is embedding.weight
        rows = embedding.num_embeddings
        changes = align(model, tokenizer, multiple_of=8)
        assert changes == [f"embedding grown from {rows} to {rows + 8} rows"]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter[: len(old[name])], old[name]), name
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (head.weight is embedding.weight) is tied
        assert embedding.num_embeddings == head.out_features == model.config.vocab_size == rows + 8
        ids = torch.tensor([tokenizer("<think>").input_ids])
        assert torch.isfinite(model(input_ids=ids).logits).all()

    def test_special_tokens_alignment(self, tiny_model):
        model = tiny_model("llama")
        for owner in (model.config, model.generation_config):
            owner.eos_token_id, owner.pad_token_id = 1, None
        changes = align(model, model.tokenizer)
        assert changes == [
            "config.pad_token_id None -> 256",
            "generation_config.pad_token_id None -> 256",
            "config.eos_token_id 1 -> 258",
            "generation_config.eos_token_id 1 -> 258",
        ]

    def test_pad_token_that_ends_text_is_trained(self, tiny_model):
        """The token pads with its neighbours' id; the sample's own end is a target all the same."""
        model = tiny_model("llama")
        tokenizer = model.tokenizer
        tokenizer.pad_token = None
        align(model, tokenizer)
        eos = tokenizer.eos_token_id
        assert tokenizer.pad_token_id == model.config.pad_token_id == eos
        samples = [{"input_ids": ids, "labels": ids} for ids in ([7, 8, eos], [7, 8, 9, 10, eos])]
        config = TrainConfig(max_steps=1, micro_batch=2, device="cpu")
        trainer = Trainer(config, model=model, samples=samples, tokenizer=tokenizer)
        assert trainer.pad_id == eos
        assert trainer.train()[0]["tokens"] == 2 + 4
        batch = trainer.collate([[sample] for sample in samples])
        ended = [row[row != -100].tolist()[-1] for row in batch.labels]
        assert ended == [eos, eos]
        assert (batch.labels == eos).sum() == 2
        assert (batch.input_ids == eos).sum() == 4


class TestWrapFSDP2:
    """Every family is cut by its own declarations, and trains as if it were whole."""

    @pytest.mark.ranks(2)
    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # BERT's logits
    @pytest.mark.parametrize("family", FAMILIES)
    def test_wrap_families(self, rank, tiny_model, family):
        model = without_dropout(tiny_model(family))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wanted = plain_step(model, SAMPLES)
        units = {id(unit) for unit in find_units(model)}
        layers = model.config.get_text_config().num_hidden_layers
        assert len(units) >= layers
        trainer = trainer_of(model)
        trainer.train()
        wrapped = {id(part) for part in model.modules() if isinstance(part, FSDPModule)}
        assert wrapped == units | {id(model)}
        assert all(isinstance(p, DTensor) for p in model.parameters())
        held = sum(p.to_local().numel() for p in model.parameters())
        everything = sum(p.numel() for p in model.parameters())
        assert 0.4 * everything < held < 0.6 * everything
        assert difference(whole(model), wanted, before) < 1e-5  # seen: at most 2e-6

    @pytest.mark.ranks([2, 3])
    def test_dimensions_that_do_not_divide(self, rank, tiny_model):
        model = tiny_model("llama", **UNEVEN)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        samples = (SAMPLES * 2)[: 2 * rank.world_size]
        wanted = plain_step(model, samples)
        trainer_of(model, samples=samples).train()
        first = model.get_input_embeddings().weight
        shares = [None] * rank.world_size
        torch.distributed.all_gather_object(shares, first.to_local().shape[0])
        assert sum(shares) == 321
        assert len(set(shares)) > 1 or rank.world_size == 3
        assert difference(whole(model), wanted, before) < 1e-5

    @pytest.mark.ranks(2)
    def test_reduction_is_in_float32(self, rank, tiny_model):
        """A sum of two bf16 values is seldom one itself; after a bf16 reduction every one is."""
        model = tiny_model("llama")
        kept = {}

        class Watching(Trainer):
            def step(self):
                kept.update({n: full_on_cpu(p.grad) for n, p in self.model.named_parameters()})
                super().step()

        config = trainer_of(model, precision="bf16").config
        seen = set()
        watch = lambda _module, _args, out: seen.add(out.dtype)  # noqa: E731
        model.model.layers[0].mlp.register_forward_hook(watch)
        model.lm_head.register_forward_hook(watch)
        Watching(config, model=model, samples=SAMPLES).train()
        assert seen == {torch.bfloat16}  # the root's parameters too, not only the blocks'
        for name, gradient in kept.items():
            values = gradient[gradient != 0]
            exact = (values == values.bfloat16().float()).float().mean().item()
            assert exact < 0.9, f"{name}: {exact:.3f} of the values are exact in bf16"
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    @pytest.mark.ranks(2)
    def test_no_layers(self, rank):
        """A model that declares no blocks is one unit; nothing is refused, all of it is sharded."""

        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(50, 50)

            def forward(self, input_ids):
                return CausalLMOutput(logits=self.table(input_ids))

        torch.manual_seed(0)
        model = Plain()
        before = {"table.weight": model.table.weight.detach().clone()}
        assert find_blocks(model) == []
        trainer_of(model).train()
        assert [type(part) for part in model.modules() if isinstance(part, FSDPModule)] == [
            type(model)
        ]
        assert isinstance(model.table.weight, DTensor)
        assert not torch.equal(whole(model)["table.weight"], before["table.weight"])


class TestSetupModel:
    """Masters in float32, activations that are recomputed, ranks that start alike."""

    def test_half_precision_files_train_as_float32_masters(self, tiny_model, tmp_path):
        from pytest_ranks.reference.model import load_model

        stored = tiny_model("llama").bfloat16()
        stored.save_pretrained(tmp_path)
        model, _ = load_model(tmp_path)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for name, parameter in stored.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter.float())
        trainer = trainer_of(model, strategy="single", micro_batch=4, precision="bf16", lr=1e-5)
        trainer.train()
        moved = sum((p != stored.get_parameter(n)).sum() for n, p in model.named_parameters())
        rounded = sum(
            (p.bfloat16() != stored.get_parameter(n)).sum() for n, p in model.named_parameters()
        )
        assert moved > 20 * rounded  # what float32 keeps of such a step, bfloat16 would lose
        states = trainer.optimizer.state.values()
        assert all(v.dtype == torch.float32 for s in states for v in s.values() if v.ndim)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_model_given_in_half_precision_gets_masters(self, tiny_model, dtype):
        model = tiny_model("llama").to(dtype)
        trainer_of(model, strategy="single", micro_batch=4, optimizer="adamw").train()
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_recomputed_activations_give_the_same_gradients(
        self, rank, tiny_model, family, strategy
    ):
        """With dropout: the recomputed forward must draw the mask that the loss was made with."""
        dropout = {"attention_dropout": 0.5} if family == "llama" else {"resid_pdrop": 0.5}

        def trained(*, recompute):
            model = tiny_model(family, **dropout)
            trainer_of(model, strategy=strategy, activation_checkpointing=recompute).train()
            return whole(model)

        kept, recomputed = trained(recompute=False), trained(recompute=True)
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept)

    def test_another_mask_in_the_backward_pass_is_seen(self, tiny_model, monkeypatch):
        """Prove that the comparison above has power: without the RNG state it would fail."""
        from pytest_ranks.reference import parallel

        original = parallel.checkpoint

        def forgetful(*args, preserve_rng_state, **kwargs):
            return original(*args, preserve_rng_state=False, **kwargs)

        def trained():
            model = tiny_model("llama", attention_dropout=0.5)
            fields = {"strategy": "single", "micro_batch": 4}
            trainer_of(model, activation_checkpointing=True, **fields).train()
            return whole(model)

        kept = trained()
        monkeypatch.setattr(parallel, "checkpoint", forgetful)
        forgotten = trained()
        assert not all(torch.equal(kept[name], forgotten[name]) for name in kept)


class TestSetupTrainingComponents:
    """Optimizer and schedule are built on what is trained."""

    @pytest.mark.ranks(2)
    def test_optimizer_holds_the_sharded_parameters(self, rank, tiny_model):
        model = tiny_model("llama")
        trainer = trainer_of(model, optimizer="adamw", weight_decay=0.1)
        trainer.setup()
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert all(isinstance(p, DTensor) for p in held)
        trainer.train()
        moments = trainer.optimizer.state[model.lm_head.weight]["exp_avg"]
        assert moments.to_local().shape == model.lm_head.weight.to_local().shape
        assert moments.dtype == torch.float32

    def test_decay_falls_on_matrices_only(self, tiny_model):
        model = tiny_model("qwen2")
        trainer = trainer_of(model, strategy="single", weight_decay=0.1, optimizer="adamw")
        trainer.setup()
        decayed = {
            id(p): group["weight_decay"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }
        for name, parameter in model.named_parameters():
            assert decayed[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name

    def test_schedule_follows_its_formula(self, tiny_model):
        trainer = trainer_of(
            tiny_model(), strategy="single", schedule="linear", warmup_steps=2, max_steps=6
        )
        rates = [record["lr"] for record in trainer.train()]
        assert rates == pytest.approx([0, LR / 2, LR, LR * 3 / 4, LR / 2, LR / 4])


class TestMetaInitialization:
    """Ranks that never hold the model end with the bits that they would have had."""

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
    def test_every_tensor_on_every_rank(self, rank, tiny_model, tmp_path, family):
        from pytest_ranks.reference.model import load_model

        folders = [str(tmp_path)]
        torch.distributed.broadcast_object_list(folders)
        if rank.index == 0:
            tiny_model(family).save(folders[0])
        torch.distributed.barrier()
        results = {}
        for way in ("full", "broadcast", "sharded"):
            empty = way == "sharded" or (way == "broadcast" and rank.index > 0)
            model, _ = load_model(folders[0], empty=empty)
            weights = folders[0] if way == "sharded" else None
            model = without_dropout(model)
            trainer = trainer_of(model, weights=weights, initialization=way)
            trainer.setup()
            named = [*model.named_parameters(), *model.named_buffers()]
            start = {name: full_on_cpu(tensor.detach()).clone() for name, tensor in named}
            trainer.train()
            results[way] = (start, whole(model))
        for way in ("broadcast", "sharded"):
            for wanted, found in zip(results["full"], results[way], strict=True):
                assert wanted.keys() == found.keys()
                assert all(torch.equal(found[name], wanted[name]) for name in wanted), way
        assert any("inv_freq" in name for name in results["full"][0]) is (family == "llama")


class TestAttention:
    """Whatever computes attention, packed documents stay apart and training is the same."""

    @pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", "flash_attention_2"])
    def test_packed_documents_are_isolated(self, tiny_model, attention):
        """The flip test on the model as it trains; then a step, against documents one by one."""
        from pytest_ranks.reference.attention import missing_for_kernel
        from pytest_ranks.reference.model import keeps_documents_apart

        if reason := missing_for_kernel(attention, torch.device("cpu"), "fp32"):
            pytest.skip(f"{attention} {reason}")
        model = tiny_model("llama")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wanted = plain_step(model, SAMPLES)
        fields = {"strategy": "single", "micro_batch": 4, "max_tokens_per_rank": 40}
        trainer = trainer_of(model, attention=attention, **fields)
        trainer.train()
        assert attention in model.config._attn_implementation
        assert keeps_documents_apart(model, trainer.keywords)
        assert difference(whole(model), wanted, before) < 1e-5


class TestLora:
    """Adapters are trained, the model beside them is not."""

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_base_keeps_its_bits(self, rank, tiny_model, strategy, recompute):
        pytest.importorskip("peft", reason="needs peft")
        model = tiny_model("llama")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = trainer_of(
            model, strategy=strategy, activation_checkpointing=recompute, lora_rank=4
        )
        trainer.train()
        found = whole(model)
        adapters = {name for name in found if ".lora_A." in name or ".lora_B." in name}
        assert len(adapters) == 2 * 7 * model.config.num_hidden_layers
        for name in adapters:
            assert ".lora_A." in name or found[name].abs().max() > 0, name
        kept = {name.replace(".base_layer.", "."): found[name] for name in found.keys() - adapters}
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[name], value) for name, value in before.items())


class TestIntegration:
    """A folder goes in, a folder comes out."""

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
    def test_end_to_end(self, rank, tiny_model, tmp_path_factory, family):
        from pytest_ranks.reference.model import load_model

        folders = [str(tmp_path_factory.mktemp("model")) if rank.index == 0 else None]
        torch.distributed.broadcast_object_list(folders)
        if rank.index == 0:
            tiny_model(family).save(folders[0])
        torch.distributed.barrier()
        model, tokenizer = load_model(folders[0])
        align(model, tokenizer, multiple_of=8)
        trainer = trainer_of(without_dropout(model), max_steps=12, lr=5e-3, optimizer="adamw")
        trainer.tokenizer = tokenizer
        history = trainer.train()
        assert history[-1]["loss"] < 0.8 * history[0]["loss"]
        exported = trainer.export(folders[0] + "/trained")
        again, _ = load_model(exported)
        trained = whole(model)
        assert all(torch.equal(trained[name], p) for name, p in again.named_parameters())

    def test_model_device_placement(self, tiny_model):
        found = torch.accelerator.current_accelerator(check_available=True)
        wanted = found.type if found is not None else "cpu"
        trainer = trainer_of(tiny_model(), strategy="single", device="auto", micro_batch=4)
        trainer.train()
        assert {p.device.type for p in trainer.model.parameters()} == {wanted}
