"""The command line's options of the loop: when it ends, evaluates and saves."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

if TYPE_CHECKING:
    from collections.abc import Callable


def loop_options(
    max_tokens: Annotated[int | None, Option(help="Trained tokens, over all ranks.")] = None,
    until_stopped: Annotated[bool, Option(help="Go on until a signal comes.")] = False,
    eval_at_start: Annotated[bool, Option(help="Evaluate before the first step too.")] = False,
    validation_split: Annotated[float, Option(help="Share of DATA to evaluate on.")] = 0.0,
    checkpoint_every_samples: Annotated[int | None, Option(help="Samples.")] = None,
    checkpoint_each_epoch: Annotated[bool, Option(help="Save after each epoch.")] = False,
    checkpoint_best: Annotated[bool, Option(help="Save after each best evaluation.")] = False,
    keep_checkpoints: Annotated[int | None, Option(help="The newest; default: all.")] = None,
    async_checkpoints: Annotated[bool, Option(help="Write while training goes on.")] = False,
    elastic: Annotated[bool, Option(help="Resume on another number of ranks.")] = False,
    tensorboard: Annotated[bool, Option(help="Event files in OUT/tensorboard.")] = False,
    wandb: Annotated[bool, Option(help="Log to Weights & Biases too.")] = False,
) -> dict[str, Any]:
    """Return the options by name."""
    return dict(locals())


def also_takes(options: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which has `**others`, the options of another function too.

    typer reads a command's options from its signature, and one list of all of them would not fit
    on a screen.
    """

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        own, more = inspect.signature(command), inspect.signature(options)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = get_type_hints(options, include_extras=True)
        hints |= get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in (*kept, *more.parameters.values())
        ]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {name: hints[name] for name in ("return", *hints)}
        return command

    return extend
