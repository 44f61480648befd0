"""Build every causal language model family of the installed transformers tiny, and train it a step.

    python benchmarks/tiny_models.py                          all families; fails below --reach
    python benchmarks/tiny_models.py --family llama mixtral   some

A family counts as reached when it is built below the budget of parameters, twice with equal bits,
its loss and all gradients are finite, most parameters have a gradient, and what `.save` writes
loads again with equal logits. One process, one thread, a deadline a family, a line as each is done.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import dataclasses
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import RanksError
from pytest_ranks.models import causal_lm_families, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

PARAMETER_BUDGET = 1_000_000
LEAST_SHARE_WITH_GRADIENT = 0.5
REACH = 0.9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of one family; `trouble` is empty when it was reached."""

    family: str
    parameters: int = 0
    loss: float = float("nan")
    share_with_gradient: float = 0.0
    is_causal: bool = False
    seconds: float = 0.0
    trouble: str = ""


class DeadlineError(BaseException):
    """The family took longer than its deadline; no handler of ordinary errors on the way takes it for its own."""


def try_family(family: str, *, deadline: float) -> Trial:
    """Build, train, save and reload one family.

    Args:
        family: a model type.
        deadline: seconds for all of it.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        with _alarm(deadline):
            trouble = next(_troubles(family, found), "")
    except RanksError as error:
        trouble = str(error)
    except (Exception, DeadlineError) as error:
        trouble = f"{type(error).__name__}: {' '.join(str(error).split())}"
    seconds = time.perf_counter() - started
    return Trial(family=family, seconds=seconds, trouble=trouble, **found)


def _troubles(family: str, found: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a family, in the order in which it is noticed."""
    model = tiny_model(family, seed=1)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    if found["parameters"] >= PARAMETER_BUDGET:
        yield f"{found['parameters']} parameters"
    with _garbage_in_fresh_memory():
        unequal = _unequal(model, tiny_model(family, seed=1))
    if unequal:
        yield f"built twice, unequal bits: {unequal}"
    batch = _batch()
    loss = model(**batch, labels=batch["input_ids"]).loss
    found["loss"] = loss.item()
    if not torch.isfinite(loss):
        yield f"loss is {loss.item()}"
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
    if broken:
        yield f"gradient not finite: {broken[0]} and {len(broken) - 1} more"
    text = [name for name, _ in model.named_parameters() if not _is_other_modality(name)]
    found["share_with_gradient"] = len([n for n in text if n in gradients]) / len(text)
    if found["share_with_gradient"] < LEAST_SHARE_WITH_GRADIENT:
        yield f"only {found['share_with_gradient']:.0%} of the parameters have a gradient"
    found["is_causal"] = _is_causal(model)
    yield from _reload_troubles(model, batch)


def _is_other_modality(name: str) -> bool:
    """Text alone gives no gradient to a vision or audio tower, nor to attention over an encoder."""
    words = (
        "vision",
        "visual",
        "audio",
        "image",
        "vq",
        "multi_modal",
        "cross_attn",
        "encoder_attn",
    )
    return any(word in name for word in words)


@contextmanager
def _garbage_in_fresh_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN: weights that a family never initialises then show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _unequal(one: torch.nn.Module, two: torch.nn.Module) -> str:
    others = two.state_dict()
    return next((k for k, v in one.state_dict().items() if not torch.equal(v, others[k])), "")


def _batch() -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`: int64 [2, 48], bytes only."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 256, (2, 48), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _is_causal(model: Any) -> bool:
    """Return whether logits depend on earlier tokens alone (cpmant, reformer, xlnet: not)."""
    batch = _batch()
    position = batch["input_ids"].shape[1] // 2
    model.eval()
    with torch.no_grad():
        before = _seeded(model, batch)
        batch["input_ids"][:, position] = (batch["input_ids"][:, position] + 1) % 256
        after = _seeded(model, batch)
    model.train()
    return torch.allclose(before[:, :position], after[:, :position], atol=1e-5)


def _reload_troubles(model: Any, batch: dict[str, torch.Tensor]) -> Iterator[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        logits = [_seeded(m.eval(), batch) for m in (model, again)]
    if logits[0].shape != logits[1].shape or not torch.equal(*logits):
        unequal = _unequal(model, again)
        yield f"reloaded, unequal logits (first unequal tensor: {unequal or 'none'})"
    text = "naïve 漢字 <eos>"
    if tokenizer(text).input_ids != model.tokenizer(text).input_ids:
        yield f"reloaded, another tokenizer: {type(tokenizer).__name__}"


def _seeded(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits; reformer draws random hashes in every forward."""
    torch.manual_seed(0)
    logits: torch.Tensor = model(**batch).logits
    return logits


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise DeadlineError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str] | None = None) -> int:
    """Print a line a family and the share reached; return 1 where that is too little."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", nargs="+", default=None, help="only these")
    parser.add_argument("--deadline", type=float, default=60, help="seconds a family (60)")
    parser.add_argument("--reach", type=float, default=REACH, help="least share reached (0.9)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    families = options.family or causal_lm_families()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trials = _try_all(families, deadline=options.deadline)
    return _conclude(trials, reach=options.reach)


def _try_all(families: Sequence[str], *, deadline: float) -> list[Trial]:
    """Print a line a family as soon as it is done."""
    trials = []
    print(
        f"{'family':<26}{'parameters':>11}{'loss':>8}{'gradient':>9}{'causal':>7}{'s':>7}  trouble"
    )
    for number, family in enumerate(families, 1):
        trial = try_family(family, deadline=deadline)
        trials.append(trial)
        print(
            f"{family:<26}{trial.parameters:>11}{trial.loss:>8.3f}"
            f"{trial.share_with_gradient:>9.0%}{'yes' if trial.is_causal else 'no':>7}{trial.seconds:>7.2f}"
            f"  {trial.trouble[:300]}  [{number}/{len(families)}]",
            flush=True,
        )
    return trials


def _conclude(trials: list[Trial], *, reach: float) -> int:
    """Print the share reached and what was missed; return the exit status."""
    reached = [trial for trial in trials if not trial.trouble]
    share = len(reached) / len(trials)
    print(f"reached {len(reached)} of {len(trials)} families ({share:.1%})")
    for trial in trials:
        if trial.trouble:
            print(f"  {trial.family}: {trial.trouble}")
    return 0 if share >= reach else 1


if __name__ == "__main__":
    sys.exit(main())
