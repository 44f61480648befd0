"""What the suites ask a subject to train: model, samples, batch layout, optimizer, steps, seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_ranks.errors import BadInputError
from pytest_ranks.models.corpora import EOS_ID, IGNORE, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DATA_FORMATS = ("tokens", "text", "prompt_completion", "messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """The optimizer of a job, in torch's terms.

    Attributes:
        name: "sgd" (no momentum) or "adamw".
        lr: learning rate.
        betas: AdamW's two decay rates.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay (0: off).
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run, said completely: what a subject must train on, and how.

    Attributes:
        model: which of the suites' models it is: "ledger", "ledger_table" or "llama".
        model_dir: the model's directory, for `from_pretrained` (a "ledger_table" has none: use
            `build_model`).
        tokenizer_dir: a tokenizer whose words are the ids ("t5 t6"), for trainers that want text.
        samples: `{"input_ids": [...], "labels": [...]}` each; labels are unshifted, -100 is not
            trained.
        augmented: each reading of a sample uses torch's random numbers, as augmentation does; there is
            nothing for the subject to do about it.
        pad_token_id: the padding id; on purpose the end-of-sequence id too.
        micro_batch: samples a rank and forward.
        gradient_accumulation_steps: forwards an optimizer step.
        world_size: data-parallel ranks.
        max_tokens_per_rank: packing by step: the global batch is packed into forwards of at most so
            many tokens a rank.
        pack_length: packing by rows: samples are joined into rows of at most so many tokens.
        max_steps: optimizer steps to take; None when `epochs` says how long.
        epochs: passes over the samples; None when `max_steps` says how long.
        shuffle: draw the samples in an order that depends on seed and epoch.
        seed: of shuffling, dropout and whatever else is random.
        optimizer: which optimizer with which numbers.
        schedule: "constant" or "linear" (to zero at the last step).
        warmup_steps: steps of linear warm-up; 0 is off.
        max_grad_norm: clip the global gradient norm to it; None is off.
        precision: "fp32", or "bf16" for mixed precision: compute in bf16, fp32 weights and
            reductions.
        dropout: the attention dropout that `build_model()` and `model_dir` are already made with.
        activation_checkpointing: recompute activations in backward.
        strategy: "single", "ddp" or "fsdp2".
        parallel: other mesh sizes by name, e.g. {"tp": 2}.
        device: "cpu" or "cuda".
        eval_samples: samples to evaluate on; empty is off.
        checkpoint_every: save every so many steps; None is off.
        resume_from: a checkpoint to continue; None starts afresh.
        out_dir: a folder of this run's own.
        timeout: seconds the run may take.
        lora: LoRA settings; None is full training.
    """

    model: str = "ledger"
    model_dir: str = ""
    tokenizer_dir: str = ""
    samples: Sequence[Sample] = ()
    augmented: bool = False
    pad_token_id: int = EOS_ID
    micro_batch: int = 1
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    max_tokens_per_rank: int | None = None
    pack_length: int | None = None
    max_steps: int | None = 1
    epochs: int | None = None
    shuffle: bool = False
    seed: int = 11
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    dropout: float = 0.0
    activation_checkpointing: bool = False
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    parallel: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    eval_samples: tuple[Sample, ...] = ()
    checkpoint_every: int | None = None
    resume_from: str | None = None
    out_dir: str = ""
    timeout: float = 120.0
    lora: Mapping[str, Any] | None = None

    @property
    def global_batch(self) -> int:
        """Samples an optimizer step, over all ranks and micro-batches."""
        return self.micro_batch * self.gradient_accumulation_steps * self.world_size

    def build_model(self) -> Any:
        """Build the job's model on the CPU in float32: fresh, and equal on every rank."""
        if self.model == "ledger_table":
            from pytest_ranks.models.ledger import LedgerTable

            return LedgerTable()
        import torch
        from transformers import AutoModelForCausalLM

        from pytest_ranks.models.ledger import quiet

        with quiet():
            return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)

    def write_data(self, path: str | Path, *, format: str = "tokens") -> Path:
        """Write the samples as JSONL.

        Args:
            path: the file.
            format: "tokens" (`input_ids`, `labels`), "text" (`text`), "prompt_completion"
                (`prompt`, `completion`) or "messages" (`messages` of roles user and assistant). The
                three texts read back to the same ids with the tokenizer of `tokenizer_dir`; a
                sample's end-of-sequence token is part of its text.

        Raises:
            BadInputError: for another format, or when a sample has labels that the format cannot
                say.
        """
        if format not in DATA_FORMATS:
            raise BadInputError(
                f"format: found {format!r}, expected one of {', '.join(DATA_FORMATS)}"
            )
        lines = [
            json.dumps(_record(sample, format, index)) for index, sample in enumerate(self.samples)
        ]
        Path(path).write_text("\n".join(lines) + "\n")
        return Path(path)

    def key(self) -> str:
        """Return a name for this job that equal jobs share (its folder does not count)."""
        data = dataclasses.asdict(dataclasses.replace(self, out_dir=""))
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _words(ids: list[int]) -> str:
    return " ".join(f"t{token}" for token in ids)


def _record(sample: Sample, data_format: str, index: int) -> dict[str, Any]:
    ids, labels = sample["input_ids"], sample["labels"]
    if data_format == "tokens":
        return {"input_ids": ids, "labels": labels}
    prompt = next((place for place, label in enumerate(labels) if label != IGNORE), len(labels))
    if IGNORE in labels[prompt:] or (data_format == "text" and prompt > 0):
        raise BadInputError(
            f"sample {index}: its labels are masked in places that format {data_format!r} cannot say"
        )
    if data_format == "text":
        return {"text": _words(ids)}
    if data_format == "prompt_completion":
        return {"prompt": _words(ids[:prompt]), "completion": _words(ids[prompt:])}
    return {
        "messages": [
            {"role": "user", "content": _words(ids[:prompt])},
            {"role": "assistant", "content": _words(ids[prompt:])},
        ]
    }
