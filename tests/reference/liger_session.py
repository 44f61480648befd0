"""What Liger's kernels compute in Triton's interpreter, beside plain torch; run by test_reference_liger.

The process is started with TRITON_INTERPRET=1, since triton reads it when it is imported.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

from bodies.liger import compare_liger_losses, kernels_in
from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import liger, loss

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
         "initializer_range": 0.2}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip


def build(family):
    torch.manual_seed(0)
    settings = GPT2 if family == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(family, **settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def make_samples():
    source = random.Random(0)
    made = []
    for length in (9, 3, 6, 2):
        ids = [source.randrange(64) for _ in range(length)]
        prompt = source.randrange(length - 1)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def plain_numbers(result):
    report = result.pop("report")
    return result | {"used": report.used, "left": report.left}


def compare_sums(rows, *, masked=False):
    torch.manual_seed(rows)
    labels = torch.randint(0, 33, (rows, 5))
    labels[0, 2] = -100
    if masked:
        labels[:] = -100
    found, gradients = {}, []
    for name, summed in (("plain", loss), ("liger", liger)):
        torch.manual_seed(1)
        scores = torch.randn(rows, 5, 33, requires_grad=True)
        total = summed.shifted_cross_entropy_sum(scores * 3, labels)
        (total * 0.7).backward()
        found[name] = total.item()
        gradients.append(scores.grad)
    return found | {"gradient_error": (gradients[0] - gradients[1]).abs().max().item()}


def seen_changes(change):
    """Return what of the process is another after a change to one model."""
    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = [getattr(modeling_llama, name) for name in names]
    forwards = [
        kind.forward
        for kind in vars(modeling_llama).values()
        if isinstance(kind, type) and hasattr(kind, "forward")
    ]
    function = nn.functional.cross_entropy
    change(build("llama"))
    after = [
        kind.forward
        for kind in vars(modeling_llama).values()
        if isinstance(kind, type) and hasattr(kind, "forward")
    ]
    found = []
    if before != [getattr(modeling_llama, name) for name in names]:
        found.append("module")
    elif forwards != after:
        found.append("classes")
    if function is not nn.functional.cross_entropy:
        found.append("cross_entropy")
    return found


def liger_own(model):
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = {name: getattr(modeling_llama, name) for name in names}
    try:
        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


def find_leaks():
    ours = seen_changes(liger.apply_kernels)
    running = []

    def control(model):
        running.append(liger_own(model))
        next(running[0])

    theirs = seen_changes(control)
    running[0].close()
    return {"ours": ours, "control": theirs}


def interleave(q, k, cos, sin):
    def turn(x):
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

    return turn(q), turn(k)


apply_rotary_pos_emb = interleave


def bf16_in_the_interpreter():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 4, 8).bfloat16(), torch.randn(1, 1, 4, 8).bfloat16()
    half = torch.randn(1, 4, 4)
    angles = torch.cat([half, half], dim=-1)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    want = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)[0]
    got = liger.functions().liger_rope(q.clone(), k.clone(), cos, sin)[0]
    try:
        liger.check_available(torch.device("cpu"), precision="bf16")
    except BadInputError as refusal:
        error = str(refusal)
    return {"error": error, "rope_difference": (got - want).float().abs().max().item()}


class Interleaved(nn.Module):
    """RoPE of another layout: neighbours are turned, not halves."""

    head_dim = 8

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def main(out):
    torch.set_num_threads(1)
    ids = torch.arange(8)[None]
    bystander = build("llama")
    before = bystander(ids).logits
    samples = make_samples()
    families = {
        family: plain_numbers(compare_liger_losses(build(family), samples, device="cpu"))
        for family in ("llama", "qwen3", "gemma", "gpt2")
    }
    variants = {
        "packed": {"max_tokens_per_rank": 12},
        "recomputed": {"activation_checkpointing": True},
        "orthogonal": {"orthogonal_rank_ratio": 0.25},
        "adapters": {"lora_rank": 2},
    }
    if importlib.util.find_spec("peft") is None:
        del variants["adapters"]
    patched = build("llama")
    liger.apply_kernels(patched)
    leaks = find_leaks()
    later = build("llama")
    logits = (bystander(ids).logits, later(ids).logits)
    found = {
        "families": families,
        "variants": {
            name: plain_numbers(
                compare_liger_losses(build("llama"), samples, device="cpu", max_steps=2, **fields)
            )
            for name, fields in variants.items()
        },
        "leaks": leaks,
        "before_and_after_equal": all(torch.equal(one, before) for one in logits)
        and not any(kernels_in(one) for one in logits),
        "copy_has_kernels": bool(kernels_in(copy.deepcopy(patched)(ids).logits)),
        "interleaved": liger.apply_kernels(Interleaved()).left["rope"],
        "bf16": bf16_in_the_interpreter(),
        "losses": {
            "loss": compare_sums(3),
            "one_row": compare_sums(1),
            "masked": compare_sums(2, masked=True),
        },
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
