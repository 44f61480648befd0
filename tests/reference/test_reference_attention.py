from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import tiny_model
from pytest_ranks.reference import TrainConfig, Trainer, attention
from pytest_ranks.reference.checkpoint import full_on_cpu
from pytest_ranks.reference.model import keeps_documents_apart

CPU = torch.device("cpu")
KEYWORDS = frozenset({"input_ids", "position_ids", "attention_mask", "use_cache"})
SAMPLES = [{"input_ids": [*range(1, n)], "labels": [*range(1, n)]} for n in (6, 9, 4, 12)]
FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "granite", "mixtral")


def choose(model, name, *, device=CPU, precision="fp32"):
    return attention.choose_attention(
        model, name, device=device, precision=precision, keywords=KEYWORDS
    )


def trainer_of(model, **fields):
    base = {"optimizer": "sgd", "lr": 0.1, "max_steps": 2, "micro_batch": 4, "device": "cpu"}
    base |= {"max_tokens_per_rank": 40}
    return Trainer(TrainConfig(**(base | fields)), model=model, samples=SAMPLES)


@pytest.mark.parametrize(
    ("rows", "bounds", "longest"),
    [
        ([[0, 1, 2, 3]], [0, 4], 4),
        ([[0, 1, 0, 0, 1, 2]], [0, 2, 3, 6], 3),
        ([[0, 1, 2], [0, 1, 0]], [0, 3, 5, 6], 3),
        ([[5, 6, 7], [8, 9, 10]], [0, 3, 6], 3),  # rows end documents, whatever their positions
        ([[0], [0]], [0, 1, 2], 1),
        ([[0, 1, 2, 2, 3]], [0, 3, 5], 3),
    ],
)
def test_bounds_are_where_positions_restart(rows, bounds, longest):
    found, size = attention.document_bounds(torch.tensor(rows))
    assert (found.tolist(), size) == (bounds, longest)
    assert found.dtype == torch.int32


@pytest.mark.parametrize("name", ["varlen", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_answers_alike_and_isolates(family, name):
    model = tiny_model(family)
    assert model.config._attn_implementation == "sdpa"
    used = choose(model, name)
    assert model.config._attn_implementation == used
    assert keeps_documents_apart(model, KEYWORDS)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_document_by_document_is_the_masked_whole(window, heads):
    """Against the definition: scores, a mask over the whole row, softmax; in float64."""
    torch.manual_seed(0)
    lengths = (3, 9, 1, 6)
    total = sum(lengths)
    query, key, value = (torch.randn(2, n, total, 8).double() for n in (4, heads, heads))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    layer = torch.nn.Module()
    found, _ = attention.varlen_attention(
        layer, query, key, value, None, scaling=0.3, position_ids=positions, sliding_window=window
    )
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    behind = torch.arange(total)[:, None] - torch.arange(total)
    seen = (owner[:, None] == owner) & (behind >= 0)
    if window is not None:
        seen &= behind < window
    group = 4 // heads
    scores = 0.3 * query @ key.repeat_interleave(group, 1).transpose(-1, -2)
    chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = (chances @ value.repeat_interleave(group, 1)).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(found)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), (query, key, value))
    gradients = torch.autograd.grad((found * weights).sum(), (query, key, value))
    for one, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_training_is_the_same_with_each(packed, recompute):
    results = {}
    for name in ("auto", "varlen", "eager"):
        model = tiny_model("llama")
        fields = {} if packed else {"max_tokens_per_rank": None}
        trainer = trainer_of(model, attention=name, activation_checkpointing=recompute, **fields)
        losses = [record["loss"] for record in trainer.train()]
        results[name] = losses, {n: p.detach() for n, p in model.named_parameters()}
    losses, parameters = results.pop("auto")
    for found_losses, found in results.values():
        assert found_losses == pytest.approx(losses, rel=1e-5)
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("initialization", ["full", "broadcast"])
def test_sharded_models_train_the_same_with_it(rank, initialization):
    trained = []
    for name in ("sdpa", "varlen"):
        model = tiny_model("llama")
        fields = {"strategy": "fsdp2", "micro_batch": 2, "initialization": initialization}
        trainer_of(model, attention=name, **fields).train()
        trained.append({n: full_on_cpu(p.detach()) for n, p in model.named_parameters()})
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-5)


def attend_across(module, query, key, value, attention_mask, *, scaling=None, **_rest):
    """Attend as one who never heard of documents: causal over the whole row."""
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, 1) for each in (key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return found.transpose(1, 2), None


def attend_by_single_rows(module, query, key, value, attention_mask, **rest):
    """Look for documents in batches of one row only, as transformers does before flash-attn."""
    attend = attention.varlen_attention if len(query) == 1 else attend_across
    return attend(module, query, key, value, attention_mask, **rest)


def attend_to_nothing(module, query, key, value, attention_mask, **rest):
    return torch.full_like(query, torch.nan).transpose(1, 2), None


@pytest.fixture
def register():
    names = []

    def register_attention(attend):
        names.append(attend.__name__)
        AttentionInterface.register(attend.__name__, attend)
        return attend.__name__

    yield register_attention
    for name in names:
        AttentionInterface._global_mapping.pop(name)


@pytest.fixture
def leaking(register):
    return register(attend_across)


def test_an_attention_that_leaks_does_not_pack(leaking):
    model = tiny_model("llama")
    model.set_attn_implementation(leaking)
    assert not keeps_documents_apart(model, KEYWORDS)
    with pytest.raises(
        BadInputError, match="LlamaForCausalLM does not keep packed documents apart"
    ):
        trainer_of(model).train()
    trainer_of(model, max_tokens_per_rank=None).train()  # one document a row cannot leak


def test_an_attention_that_leaks_is_refused_when_it_is_compared(leaking, monkeypatch):
    monkeypatch.setattr(attention, "register_varlen", lambda: leaking)
    model = tiny_model("llama")
    with pytest.raises(BadInputError) as caught:
        choose(model, "varlen")
    text = str(caught.value)
    assert text.startswith(
        "attention='varlen' is not for LlamaForCausalLM: its logits differ from those with 'sdpa' "
    )
    assert text.endswith("of the largest, expected at most 1e-04; use attention='sdpa'.")
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_that_gives_nan_is_refused_when_it_is_compared(register, monkeypatch):
    name = register(attend_to_nothing)
    monkeypatch.setattr(attention, "register_varlen", lambda: name)
    model = tiny_model("llama")
    with pytest.raises(BadInputError, match="differ from those with 'sdpa' by nan of the largest"):
        choose(model, "varlen")
    assert model.config._attn_implementation == "sdpa"


def test_an_attention_that_knows_documents_in_one_row_only_packs_one_row(register):
    name = register(attend_by_single_rows)
    fields = {"max_tokens_per_rank": None, "pack_length": 16}

    def make():
        model = tiny_model("llama")
        model.set_attn_implementation(name)
        return model

    with pytest.raises(BadInputError) as caught:
        trainer_of(make(), micro_batch=2, **fields).train()
    assert str(caught.value) == (
        "pack_length: LlamaForCausalLM keeps packed documents apart in one row and not in the "
        "micro_batch=2 rows of one forward, as with flash-attn; use micro_batch=1 with more "
        "gradient_accumulation_steps, or attention='sdpa'."
    )
    trainer_of(make(), micro_batch=1, gradient_accumulation_steps=4, **fields).train()
    trainer_of(make(), micro_batch=4).train()  # packed by step: always one row a forward
    trainer_of(tiny_model("llama"), micro_batch=2, **fields).train()


def test_under_autocast_the_kernel_gets_one_half_precision_dtype(monkeypatch):
    """Rotary embeddings leave query and key in float32; the kernel on CUDA takes no such mixture."""
    plain, seen = attention._attend_one_by_one, set()

    def watching(query, key, value, *rest, **named):
        seen.update({query.dtype, key.dtype, value.dtype})
        return plain(query, key, value, *rest, **named)

    monkeypatch.setattr(attention, "_attend_one_by_one", watching)
    trainer = trainer_of(tiny_model("llama"), attention="varlen", precision="bf16")
    trainer.setup()
    seen.clear()
    trainer.train()
    assert seen == {torch.bfloat16}


def test_what_the_kernel_lacks_is_refused_by_name():
    with pytest.raises(BadInputError) as caught:
        choose(tiny_model("gpt_oss"), "varlen")
    assert str(caught.value) == (
        "attention='varlen': GptOssAttention asks for s_aux, which variable-length attention does "
        "not have; use attention='sdpa' or 'eager'."
    )
    with pytest.raises(BadInputError, match="LlamaAttention asks for dropout"):
        trainer_of(tiny_model("llama", attention_dropout=0.1), attention="varlen").train()


def test_families_that_do_not_ask_transformers_for_their_attention_are_refused():
    with pytest.raises(BadInputError) as caught:
        choose(tiny_model("bloom"), "varlen")
    assert str(caught.value) == (
        "attention='varlen' is not for BloomForCausalLM: the family has an attention of its own, "
        "'eager'; use attention='auto'."
    )


def test_backends_that_are_not_there_are_named(monkeypatch):
    import transformers.utils

    model = tiny_model("llama")
    with pytest.raises(BadInputError) as caught:
        choose(model, "flash_attention_2")
    assert str(caught.value) == (
        "attention='flash_attention_2' needs a CUDA device, this process computes on 'cpu'; use "
        "attention='sdpa'."
    )
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    gpu = torch.device("cuda", 0)
    assert attention.missing_for_kernel("flash_attention_2", gpu, "bf16") == (
        "needs flash-attn, which is not installed: pip install 'pytest-ranks[flash]'"
    )
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    wanted = "computes in half precision on 'cuda', found precision='fp32'"
    assert attention.missing_for_kernel("flash_attention_2", gpu, "fp32") == wanted
    assert attention.missing_for_kernel("varlen", gpu, "fp32") == wanted
    assert attention.missing_for_kernel("varlen", gpu, "bf16") == ""
    assert attention.missing_for_kernel("sdpa", gpu, "fp32") == ""


def test_auto_keeps_what_the_model_was_loaded_with():
    for given in ("sdpa", "eager"):
        model = tiny_model("llama", attn_implementation=given)
        assert choose(model, "auto") == given
        assert model.config._attn_implementation == given


def test_a_model_of_ones_own_has_its_own_attention():
    model = torch.nn.Linear(1, 1)
    assert choose(model, "auto") == ""
    with pytest.raises(BadInputError) as caught:
        choose(model, "eager")
    assert str(caught.value) == (
        "attention='eager': Linear is no transformers model and has one attention only; use "
        "attention='auto'."
    )


def test_the_kernel_takes_what_it_is_given():
    """On the meta device: no CUDA here computes it, but its arguments are those of the kernel."""
    query, key, value = (torch.empty(1, 4, 10, 16, device="meta") for _ in range(3))
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    flat = [each.transpose(1, 2).flatten(0, 1).half() for each in (query, key, value)]
    found = attention._attend_by_kernel(
        *flat, bounds.to("meta"), 6, scale=0.25, window=3, causal=True
    )
    assert found.shape == (10, 4, 16)
    assert found.dtype == torch.float16
