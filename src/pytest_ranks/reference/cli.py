"""The command line: train a model folder on a JSONL file, alone or under torchrun.

python -m pytest_ranks.reference MODEL DATA.jsonl --out-dir OUT
torchrun --nproc-per-node 2 -m pytest_ranks.reference MODEL DATA.jsonl --out-dir OUT
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
import typer
from tqdm import tqdm
from typer import Argument, Option

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import checkpoint_files, preemption
from pytest_ranks.reference.cadence import ENDS
from pytest_ranks.reference.config import TrainConfig
from pytest_ranks.reference.data import JsonlDataset
from pytest_ranks.reference.folder_claim import claimed
from pytest_ranks.reference.loop_options import also_takes, loop_options
from pytest_ranks.reference.model import align, load_model, load_tokenizer
from pytest_ranks.reference.parallel import find_device
from pytest_ranks.reference.preemption import StopRequest
from pytest_ranks.reference.pretraining import Blocks
from pytest_ranks.reference.trackers import throughput
from pytest_ranks.reference.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

LINE = "JSONL: input_ids and labels, text, prompt and completion, or messages."
STRATEGIES = "single, ddp, fsdp2; auto: fsdp2 under torchrun, else single."
ORTHOGONAL = "Train this share of each weight's singular directions, orthogonal to the others."
TARGETS = "Layers that it splits, by name or pattern; again for more; default: all in blocks."
ATTENTIONS = "auto, flash_attention_2, varlen, sdpa or eager."
ADAPTED = "A layer's name; again for more; default: every linear layer but the head."
SOURCES = "FSDP2: full (all ranks load), broadcast (rank 0 loads) or sharded (each its rows)."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@also_takes(loop_options)
def train(
    model: Annotated[Path, Argument(metavar="MODEL", help="A folder that save_pretrained wrote.")],
    samples: Annotated[Path, Argument(metavar="DATA", help=LINE)],
    out_dir: Annotated[Path, Option(help="Metrics, checkpoints and the model go here.")],
    eval_data: Annotated[Path | None, Option(help="JSONL to evaluate on.")] = None,
    resize: Annotated[bool, Option(help="Let the embedding grow to the tokenizer.")] = True,
    vocabulary_multiple: Annotated[int | None, Option(help="Grow to a multiple of this.")] = None,
    strategy: Annotated[str, Option(help=STRATEGIES)] = "auto",
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    precision: Annotated[str, Option(help="fp32 or bf16.")] = "fp32",
    initialization: Annotated[str, Option(help=SOURCES)] = "full",
    activation_checkpointing: Annotated[bool, Option(help="Recompute activations.")] = False,
    liger: Annotated[bool, Option(help="Compute with Liger's kernels.")] = False,
    attention: Annotated[str, Option(help=ATTENTIONS)] = "auto",
    lora_rank: Annotated[int | None, Option(help="Train adapters of this rank, by peft.")] = None,
    lora_alpha: Annotated[float | None, Option(help="Twice the rank by default.")] = None,
    lora_targets: Annotated[list[str] | None, Option(help=ADAPTED)] = None,
    lora_dropout: Annotated[float, Option(help="On what goes into an adapter.")] = 0.0,
    lora_export: Annotated[str, Option(help="merged, or adapter.")] = "merged",
    orthogonal_rank_ratio: Annotated[float | None, Option(help=ORTHOGONAL)] = None,
    orthogonal_targets: Annotated[list[str] | None, Option(help=TARGETS)] = None,
    micro_batch: Annotated[int, Option(help="Rows a rank and forward.")] = 1,
    gradient_accumulation_steps: Annotated[int, Option(help="Forwards a step.")] = 1,
    max_tokens_per_rank: Annotated[int | None, Option(help="Pack by step: tokens a rank.")] = None,
    pack_length: Annotated[int | None, Option(help="Pack by rows: tokens a row.")] = None,
    block_length: Annotated[int | None, Option(help="Pretraining: cut blocks of tokens.")] = None,
    packer: Annotated[str, Option(help="level, lpt or greedy.")] = "lpt",
    epochs: Annotated[int | None, Option(help="Passes; 1 unless another end is given.")] = None,
    max_steps: Annotated[int | None, Option(help="Optimizer steps.")] = None,
    shuffle: Annotated[bool, Option(help="Another order each epoch.")] = True,
    tail: Annotated[str, Option(help="The short last batch: partial, drop, pad.")] = "partial",
    seed: Annotated[int, Option(help="Of data order and dropout.")] = 0,
    optimizer: Annotated[str, Option(help="adamw or sgd.")] = "adamw",
    lr: Annotated[float, Option(help="Peak learning rate.")] = 1e-4,
    beta1: Annotated[float, Option(help="AdamW's decay of the mean.")] = 0.9,
    beta2: Annotated[float, Option(help="AdamW's decay of the variance.")] = 0.95,
    eps: Annotated[float, Option(help="AdamW's denominator term.")] = 1e-8,
    weight_decay: Annotated[float, Option(help="On matrices only.")] = 0.0,
    schedule: Annotated[str, Option(help="constant, linear or cosine.")] = "constant",
    warmup_steps: Annotated[int, Option(help="Steps of rising learning rate.")] = 0,
    max_grad_norm: Annotated[float, Option(help="Clip to this; 0: off.")] = 1.0,
    eval_every: Annotated[int | None, Option(help="Steps; default: each epoch.")] = None,
    checkpoint_every: Annotated[int | None, Option(help="Steps; default: never.")] = None,
    resume_from: Annotated[Path | None, Option(help="A checkpoint, or a folder's newest.")] = None,
    **loop: Any,
) -> None:
    """Train MODEL on DATA; write OUT/metrics.jsonl and, at the end, OUT/model."""
    run_until_told({**locals(), **loop})


def run_until_told(given: dict[str, Any]) -> None:
    """Do what the command line says, unless a signal ends it; say what cannot be used.

    Raises:
        Exit: with status 2 where something cannot be used, 70 (EX_SOFTWARE) where training diverged,
            74 (EX_IOERR) where the disk is full or fails, 75 where the run was stopped.
    """
    given.pop("loop")
    with preemption.listen(StopRequest()) as stop:
        try:
            finished = run(given, stop)
        except BadInputError as error:
            tell(f"error: {error}")
            raise typer.Exit(2) from error
        except OSError as error:
            name = "" if error.filename is None else f"{error.filename}: "
            tell(f"error: {name}{error.strerror or error}; what was saved before is whole.")
            raise typer.Exit(os.EX_IOERR) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if not finished:
        raise typer.Exit(preemption.EXIT_STATUS)


def tell(text: str) -> None:
    """Say why a rank leaves.

    Until the ranks are joined all of them find the same, and the first of each machine says it. Later it
    may be one alone, whichever it is.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(text, err=True)
    elif dist.is_initialized() or os.environ.get("LOCAL_RANK") == "0":
        typer.echo(f"rank {rank}: {text}", err=True)


def run(given: dict[str, Any], stop: StopRequest) -> bool:
    """Do what the command line says.

    Args:
        given: its arguments and options by name; what is no file is a field of `TrainConfig`.
        stop: ends the run before its end.

    Returns:
        Whether the run came to its end.

    Raises:
        BadInputError: a file, a folder or a value cannot be used.
    """
    files = {name: given.pop(name) for name in ("model", "samples", "eval_data", "block_length")}
    alignment = {"resize": given.pop("resize"), "multiple_of": given.pop("vocabulary_multiple")}
    config = make_config(given)
    check_folder(config, model=files["model"])
    assert config.out_dir is not None
    first = os.environ.get("RANK", "0") == "0"
    with claimed(config.out_dir) if first else nullcontext():
        return run_in_folder(config, files, alignment, stop)


def run_in_folder(
    config: TrainConfig, files: dict[str, Any], alignment: dict[str, Any], stop: StopRequest
) -> bool:
    """Load, train and export; return whether the run came to its end."""
    samples, eval_samples = load_data(files)
    torch.manual_seed(config.seed)
    empty = is_left_empty(config)
    model, tokenizer = load_aligned(files["model"], empty=empty, **alignment)
    checked = [fit_to(model, data, files["block_length"]) for data in (samples, eval_samples)]
    if config.strategy != "single":
        start_process_group(config.device)
    return train_and_export(
        Trainer(
            config,
            model=model,
            samples=checked[0],
            tokenizer=tokenizer,
            eval_samples=checked[1],
            weights=files["model"] if config.initialization == "sharded" else None,
            stop=stop,
        )
    )


def make_config(given: dict[str, Any]) -> TrainConfig:
    """Turn options into a configuration; three of them have forms that only a shell needs."""
    under_torchrun = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    options = dict(given)
    if options["strategy"] == "auto":
        options["strategy"] = "fsdp2" if under_torchrun else "single"
    elif options["strategy"] in ("ddp", "fsdp2") and not under_torchrun:
        raise BadInputError(
            f"--strategy={options['strategy']} needs torchrun: "
            "torchrun --nproc-per-node 2 -m pytest_ranks.reference ..."
        )
    elif options["strategy"] == "single" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInputError(
            f"--strategy=single under torchrun would train {os.environ['WORLD_SIZE']} separate "
            "models; use ddp or fsdp2."
        )
    if all(options[name] in (None, False) for name in ENDS):
        options["epochs"] = 1
    options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    options["lora_targets"] = tuple(options["lora_targets"] or ()) or None
    options["orthogonal_targets"] = tuple(options["orthogonal_targets"] or ()) or None
    options["max_grad_norm"] = options["max_grad_norm"] or None
    return TrainConfig(**options)


def check_folder(config: TrainConfig, *, model: Path | None = None) -> None:
    """Refuse to write over another run, or over the model that the run starts from.

    Raises:
        BadInputError: the output folder is a file, cannot be made or written to, holds a run that
            this one does not resume, or has the model at the place of the trained one.
    """
    assert config.out_dir is not None
    folder = Path(config.out_dir)
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"--out-dir={folder} is a file; expected a folder.")
    if model is not None and model.resolve() == (folder / "model").resolve():
        raise BadInputError(
            f"--out-dir={folder}: the trained model would be written over {model}, which the run "
            "starts from; choose another folder."
        )
    saved = folder.exists() and checkpoint_files.saved_steps(folder)
    if (saved or (folder / "metrics.jsonl").exists()) and not is_resumed(config, folder):
        raise BadInputError(
            f"--out-dir={folder} holds another run; choose another folder, or "
            + (f"go on with that run: --resume-from {folder}" if saved else "remove that one.")
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--out-dir={folder} cannot be made: {error.strerror}.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInputError(f"--out-dir={folder} cannot be written to by this user.")


def is_resumed(config: TrainConfig, folder: Path) -> bool:
    """Whether the run goes on from a checkpoint in this folder."""
    if config.resume_from is None:
        return False
    given = Path(config.resume_from)
    return folder.resolve() == (given if given.is_dir() else given.parent).resolve()


def is_left_empty(config: TrainConfig) -> bool:
    """Whether this process's model gets its values when it is sharded."""
    first = os.environ.get("RANK", "0") == "0"
    return config.initialization == "sharded" or (
        config.initialization == "broadcast" and not first
    )


def load_aligned(
    folder: Path, *, empty: bool = False, resize: bool = True, multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Load model and tokenizer, and tell what had to change for them to agree."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = load_model(folder, empty=empty)
    changes = []
    if tokenizer is not None:
        changes = align(model, tokenizer, resize=resize, multiple_of=multiple_of)
    if os.environ.get("RANK", "0") == "0":
        for change in changes:
            typer.echo(f"model: {change}", err=True)
    return model, tokenizer


def load_data(files: dict[str, Any]) -> tuple[JsonlDataset, JsonlDataset | None]:
    """Read and check the data before the model is loaded, which takes longer."""
    tokenizer = load_tokenizer(files["model"])
    samples = JsonlDataset(files["samples"], tokenizer=tokenizer)
    if files["eval_data"] is None:
        return samples, None
    return samples, JsonlDataset(files["eval_data"], tokenizer=tokenizer)


def fit_to(model: Any, samples: JsonlDataset | None, block_length: int | None) -> Any:
    """Return what to train on: the samples, or blocks of them.

    Raises:
        BadInputError: the model has no embedding for a token, or no position.
    """
    if samples is None:
        return None
    samples.check_vocabulary(model.get_input_embeddings().weight.shape[0])
    positions = getattr(model.config, "max_position_embeddings", None)
    if block_length is None:
        samples.check_positions(positions)
        return samples
    if positions is not None and block_length > positions:
        raise BadInputError(
            f"--block-length={block_length} is more than the {positions} positions of the model."
        )
    return Blocks(samples, block_length)


def start_process_group(device: str) -> None:
    """Join the ranks that torchrun started, with the backend of the device."""
    found = find_device(device)
    on_device = found if found.type != "cpu" else None
    backend = dist.get_default_backend_for_device(found.type)
    dist.init_process_group(backend, device_id=on_device)


def train_and_export(trainer: Trainer) -> bool:
    """Train with a progress bar on rank 0, then write the model folder.

    Returns:
        Whether the run came to its end; only then is there a model folder.
    """
    trainer.setup()
    first_rank = trainer.world.rank == 0
    if first_rank and trainer.kernels is not None:
        typer.echo(trainer.kernels, err=True)
    with progress_bar(trainer) as bar:
        trainer.on_step = show_on(bar)
        history = trainer.train()
    assert trainer.config.out_dir is not None
    out_dir = Path(trainer.config.out_dir)
    tokens = sum(record["tokens"] for record in history)
    found = [record["loss"] for record in history if record["tokens"]]
    losses = f", loss {found[0]:.4f} -> {found[-1]:.4f}" if found else ""
    done = f"{len(history)} steps, {tokens} trained tokens{losses}; "
    if trainer.diverged_at is not None:
        if first_rank:
            tell(
                f"error: {done}the loss or the gradient of step {trainer.diverged_at} is not finite, so "
                "neither a model nor a checkpoint is written from it on; resume from one before it, "
                "with a smaller learning rate or without the samples of that step."
            )
        raise typer.Exit(os.EX_SOFTWARE)
    if trainer.stopping and not trainer.finished():
        done += f"stopped after step {trainer.steps_taken}, go on with --resume-from {out_dir}"
    else:
        exported = trainer.export(out_dir / "model")
        done += f"model in {exported}, metrics in {out_dir / 'metrics.jsonl'}"
    if first_rank:
        typer.echo(done)
    return not trainer.stopping or trainer.finished()


def progress_bar(trainer: Trainer) -> tqdm[Any]:
    """Return a bar towards the run's end: in tokens where that ends it, else in steps."""
    tokens = trainer.config.max_tokens
    return tqdm(
        total=trainer.total_steps() if tokens is None else tokens,
        initial=trainer.steps_taken if tokens is None else trainer.tokens_trained,
        unit="step" if tokens is None else "token",
        disable=trainer.world.rank != 0,
    )


def show_on(bar: tqdm[Any]) -> Callable[[dict[str, Any]], None]:
    """Return a callback that moves the bar on and shows the step's loss and learning rate."""

    def show(record: dict[str, Any]) -> None:
        speed = throughput(record)
        shown = {} if speed is None else {"tokens/s": f"{speed:.0f}"}
        shown |= {"loss": f"{record['loss']:.4f}", "lr": f"{record['lr']:.2e}"}
        bar.set_postfix(shown, refresh=False)
        bar.update(record["tokens"] if bar.unit == "token" else 1)

    return show
