"""Models whose parameters, after one plain SGD step, are a ledger of what was trained.

Shape letters: B rows, T positions, V vocabulary.

Both models start with logits that are zero everywhere, and the logits after an input token `a`
depend on one vector of parameters that no other token touches. The gradient of a weighted cross
entropy at a position with input `a`, target `t` and weight `w` on that vector is `w * (1/V -
onehot(t))`. After one SGD step at learning rate 1 on a corpus whose input tokens are unique, that
vector therefore holds which target was trained after `a`, and with which weight. The entry of a
token id that is never a target holds `-(sum of weights)/V`: subtracting it makes the reading exact
even where several targets were trained after one input token.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytest_ranks.models.corpora import EOS_ID, NULL_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

LEDGER_VOCAB = 256
"""A square, so that the embedding's scale sqrt(V) = 16 is exact in every float format."""


def ledger_config(vocab_size: int = LEDGER_VOCAB) -> Any:
    """Return the configuration of the one-layer ledger Llama (hidden size = vocabulary size)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=vocab_size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-12,  # the ledger's scale is 1/sqrt(1 + eps): keep it far below the tolerance
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        dtype="float32",
    )


def ledger_llama(vocab_size: int = LEDGER_VOCAB) -> Any:
    """Build a one-layer Llama that is a ledger: `o_proj`, `down_proj`, `lm_head` zero, embedding sqrt(V) I.

    The blocks add nothing to the residual stream, and RMSNorm leaves `sqrt(V) e_a` as it is, so the
    logits after `a` are `sqrt(V) * lm_head[:, a]`.
    """
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(ledger_config(vocab_size))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(vocab_size**0.5 * torch.eye(vocab_size))
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def _cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """Return transformers' causal loss: the mean over targets, or their sum over `count` where that is given."""
    flat = logits[:, :-1].float().flatten(0, 1)
    target = labels[:, 1:].flatten()
    if count is None:
        return nn.functional.cross_entropy(flat, target)
    return nn.functional.cross_entropy(flat, target, reduction="sum") / count


class LedgerTable(nn.Module):
    """A V x V table as a causal language model whose forward takes no `**kwargs`: `logits = table[input_ids]`.

    It has what trainers look for in a transformers model (a config, an output with `loss` and
    `logits`), but neither blocks nor `num_items_in_batch`, so a trainer that needs the model's help
    to count tokens cannot get it here.
    """

    accepts_loss_kwargs = False

    def __init__(self, vocab_size: int = LEDGER_VOCAB) -> None:
        super().__init__()
        self.config = ledger_config(vocab_size)
        self.lm_head = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.lm_head.weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        """Return the logits `[B, T, V]` and, with labels, the mean cross entropy over the targets."""
        from transformers.modeling_outputs import CausalLMOutput

        del attention_mask
        logits = self.lm_head(input_ids)
        loss = None if labels is None else _cross_entropy(logits, labels, None)
        return CausalLMOutput(loss=loss, logits=logits)


def read_ledger(
    parameters: dict[str, Tensor], *, before: dict[str, Tensor] | None = None, lr: float = 1.0
) -> Tensor:
    """Read the weight with which each target was trained after each input token.

    Args:
        parameters: full tensors after the step (names of `ledger_llama` or `LedgerTable`).
        before: the parameters before the step; None means the initial ones, whose ledger is zero.
        lr: the SGD learning rate of the step.

    Returns:
        float64 [V, V]: row = input token, column = target token.

    Raises:
        KeyError: when there is no `lm_head.weight`.
    """
    weight = parameters["lm_head.weight"].double()
    if before is not None:
        weight = weight - before["lm_head.weight"].double()
    if (
        "model.embed_tokens.weight" in parameters
    ):  # Llama: column a belongs to input token a, scaled by sqrt(V)
        weight = weight.T / weight.shape[1] ** 0.5
    return (weight - weight[:, NULL_ID : NULL_ID + 1]) / lr


def id_tokenizer(vocab_size: int = LEDGER_VOCAB, *, pad_id: int = EOS_ID) -> Any:
    """Return a word-level tokenizer whose words are the ids: `t5 t6` reads as [5, 6]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"t{index}": index for index in range(vocab_size)}
    core = Tokenizer(WordLevel(words, unk_token=f"t{NULL_ID}"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=f"t{pad_id}",
        eos_token=f"t{EOS_ID}",
        unk_token=f"t{NULL_ID}",
        model_max_length=512,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars for models that load in milliseconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
