"""The models, tokenizers and samples that jobs are made of, written once into a session's folder."""

from __future__ import annotations

import fcntl
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.conformance.findings import AdapterError
from pytest_ranks.conformance.oracle import Weights, summed_gradient
from pytest_ranks.models.corpora import EOS_ID
from pytest_ranks.models.ledger import LEDGER_VOCAB, LedgerTable, id_tokenizer, ledger_llama, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pytest_ranks.models.corpora import Corpus


def tiny_llama(*, dropout: float = 0.0) -> Any:
    """Build the Llama whose update is compared with the oracle's: 2 layers, grouped queries, no zeros anywhere.

    Its vocabulary is the ledger's, so that one corpus serves both. Weights are larger than
    transformers' default (std 0.02), for logits that differ from uniform.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LEDGER_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,
        attention_dropout=dropout,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM(config)


_BUILDING = threading.RLock()
"""Seeds are global: two threads that build models at once give each other's weights."""


class Materials:
    """Models and tokenizers of one session, on disk for trainers and in memory for oracles.

    Args:
        folder: shared by everything that takes part in the session (also by xdist's workers).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._initial: dict[tuple[str, float], dict[str, Tensor]] = {}
        self._gradients: dict[int, tuple[Corpus, list[Weights]]] = {}

    def model_dir(self, model: str, *, dropout: float = 0.0) -> str:
        """Return the directory of a model, written at the first request; empty for the table, which has none."""
        if model == "ledger_table":
            return ""

        def write(path: Path) -> None:
            built = ledger_llama() if model == "ledger" else tiny_llama(dropout=dropout)
            with quiet():
                built.save_pretrained(path)

        return self._once(f"{model}-dropout{dropout:g}", write)

    def tokenizer_dir(self, pad_id: int) -> str:
        """Return the directory of a tokenizer whose words are the ids."""
        return self._once(
            f"tokenizer-pad{pad_id}", lambda path: id_tokenizer(pad_id=pad_id).save_pretrained(path)
        )

    def initial(self, model: str, *, dropout: float = 0.0) -> dict[str, Tensor]:
        """Return a model's parameters before training, by name."""
        key = (model, dropout)
        with _BUILDING:
            if key not in self._initial:
                builders = {"ledger": ledger_llama, "ledger_table": LedgerTable}
                built = builders.get(model, tiny_llama)()
                self._initial[key] = {
                    name: value.detach().clone() for name, value in built.named_parameters()
                }
        return self._initial[key]

    def compare_shapes(self, model: str, trained: dict[str, Tensor]) -> None:
        """Compare names and shapes of trained parameters with the model's own.

        Raises:
            AdapterError: one is missing, or has another shape.
        """
        for name, value in self.initial(model).items():
            found = list(trained[name].shape) if name in trained else "none of that name"
            if found != list(value.shape):
                raise AdapterError(
                    f"the returned parameters have to be the job's model's: {name!r} has the shape "
                    f"{list(value.shape)}, found {found}; full_parameters(model) returns them"
                )

    def config(self) -> Any:
        """Return the tiny Llama's configuration, for the oracle."""
        with _BUILDING:
            return tiny_llama().config

    def sample_gradients(self, corpus: Corpus) -> list[Weights]:
        """Return the small Llama's float64 gradient of each sample's summed loss, computed once a corpus."""
        key = id(corpus)
        if key not in self._gradients:
            weights, config = self.initial("llama"), self.config()
            gradients = [summed_gradient(weights, config, sample) for sample in corpus.samples]
            self._gradients[key] = (corpus, gradients)  # kept, so that no other gets its id
        return self._gradients[key][1]

    def _once(self, name: str, write: Any) -> str:
        target = self.folder / "models" / name
        with _BUILDING, locked(self.folder / "models" / f"{name}.lock"):
            if not (target / "done").exists():
                write(target)
                (target / "done").touch()
        return str(target)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock, so that of several processes one does the work and the others read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
