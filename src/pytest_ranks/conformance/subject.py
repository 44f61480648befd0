"""The protocols that a user implements, and how a subject is found and looked at before anything runs."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pytest_ranks.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from pytest_ranks.conformance.job import Job

_CHOICES: dict[str, tuple[Any, ...]] = {
    "launch": ("ranks", "self"),
    "process_group": ("ours", "theirs"),
    "strategies": ("single", "ddp", "fsdp2"),
    "packing": (None, "rows", "step", "wrapped"),
    "precision": ("fp32", "bf16"),
    "optimizers": ("sgd", "adamw"),
    "tail": ("drop", "pad", "partial", "carry"),
    "weighting": ("token", "sequence", "micro_batch"),
}
_SETS = ("strategies", "precision", "optimizers")


@dataclass(frozen=True, kw_only=True, init=False)
class Capabilities:
    """What a subject declares that it can do; what is not declared is "not applicable", never "passed".

    Attributes:
        launch: "ranks" (`train` runs on every rank) or "self" (it runs once and starts its own
            ranks).
        process_group: "ours" (initialised before `train`) or "theirs" (environment and store are
            there).
        world_sizes: how many data-parallel ranks it can use.
        strategies: "single" (no process group at all), "ddp", "fsdp2".
        gradient_accumulation: it takes `job.gradient_accumulation_steps` above 1.
        packing: None, "rows" (`job.pack_length`), "step" (`job.max_tokens_per_rank`) or "wrapped".
        resume: it saves and continues.
        clip: it takes `job.max_grad_norm`.
        lora: it takes `job.lora`.
        export: it has an `export` method.
        precision: "fp32", "bf16".
        optimizers: "sgd", "adamw".
        activation_checkpointing: it takes `job.activation_checkpointing`.
        ragged: it takes samples of different lengths.
        label_masks: it takes labels that are -100 in places.
        any_forward: it trains models whose forward takes no `**kwargs`.
        tail: what an epoch does with samples that do not fill a global batch.
        weighting: what the loss of a global batch is a mean over.
        drops_unlabelled: samples without targets are left out of the epoch.
        adds_eos: it appends an end-of-sequence token to each sample.
    """

    launch: Literal["ranks", "self"] = "ranks"
    process_group: Literal["ours", "theirs"] = "ours"
    world_sizes: frozenset[int] = frozenset({1})
    strategies: frozenset[str] = frozenset({"single"})
    gradient_accumulation: bool = False
    packing: str | None = None
    resume: bool = False
    clip: bool = False
    lora: bool = False
    export: bool = False
    precision: frozenset[str] = frozenset({"fp32"})
    optimizers: frozenset[str] = frozenset({"sgd"})
    activation_checkpointing: bool = False
    ragged: bool = True
    label_masks: bool = True
    any_forward: bool = True
    tail: Literal["drop", "pad", "partial", "carry"] = "partial"
    weighting: Literal["token", "sequence", "micro_batch"] = "token"
    drops_unlabelled: bool = False
    adds_eos: bool = False

    def __init__(self, **declared: Any) -> None:
        """Take any of the attributes by keyword.

        Raises:
            BadInputError: for a name or a value that is none of ours.
        """
        known = {entry.name: entry for entry in dataclasses.fields(self)}
        for name in declared:
            if name not in known:
                raise BadInputError(
                    f"Capabilities: {name!r} is not a capability.{did_you_mean(name, known)} "
                    f"The capabilities: {', '.join(known)}"
                )
        for name, entry in known.items():
            value = declared.get(name, entry.default)
            object.__setattr__(self, name, _valid(name, value, entry.default))

    def has(self, requirement: str) -> bool:
        """Tell whether a requirement such as "clip", "packing" or "precision:bf16" is declared."""
        name, _, value = requirement.partition(":")
        declared = getattr(self, name)
        return value in declared if value else bool(declared)


def _valid(name: str, value: Any, default: Any) -> Any:
    def refuse(expected: str) -> BadInputError:
        return BadInputError(f"Capabilities: {name}: found {value!r}, expected {expected}")

    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise refuse("True or False")
        return value
    if name == "world_sizes":
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise refuse("a set of whole numbers above 0, e.g. {1, 2}")
        sizes = frozenset(value)
        if not sizes or any(
            not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes
        ):
            raise refuse("a set of whole numbers above 0, e.g. {1, 2}")
        return sizes
    choices = _CHOICES[name]
    if name in _SETS:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise refuse(f"a set of some of {', '.join(map(repr, choices))}")
        unknown = [entry for entry in value if entry not in choices]
        if unknown or not value:
            near = did_you_mean(str(unknown[0]), choices) if unknown else ""
            raise refuse(f"a set of some of {', '.join(map(repr, choices))}.{near}".rstrip("."))
        return frozenset(value)
    if value not in choices:
        raise refuse(
            f"one of {', '.join(map(repr, choices))}.{did_you_mean(str(value), map(str, choices))}".rstrip(
                "."
            )
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What `train` returns on rank 0.

    Attributes:
        parameters: full CPU tensors by their names in `job.model_dir`; or None with `model_dir`.
        model_dir: a directory for `from_pretrained`; or None with `parameters`.
        history: a dict a step: `step`, `loss`, and where there are any `lr`, `grad_norm`, `tokens`.
    """

    parameters: Mapping[str, Tensor] | None = None
    model_dir: str | Path | None = None
    history: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


@runtime_checkable
class Subject(Protocol):
    """The training code under test: a class with declared capabilities and one method.

    It may have a class attribute `expected_failures`, check id to reason, for defects that are
    known.
    """

    capabilities: Capabilities

    def train(self, job: Job) -> Trained | None:
        """Train as the job says; every rank returns, rank 0's result counts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectRef:
    """Where a subject's class is, so that every rank can import its own.

    Attributes:
        module: the module's name.
        name: the class in it.
        file: the module's file, for a class outside any importable package.
    """

    module: str
    name: str
    file: str | None = None

    def __str__(self) -> str:
        if self.file is None:
            return f"{self.module}:{self.name}"
        file = Path(self.file)
        return f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}:{self.name}"

    def load(self) -> Any:
        """Import the class.

        Raises:
            BadInputError: when there is no such module or class, or when importing it fails.
        """
        found: Any = self._import()
        for part in self.name.split("."):
            if not hasattr(found, part):
                classes = [name for name, value in vars(found).items() if isinstance(value, type)]
                raise BadInputError(
                    f"subject {str(self)!r}: there is no {self.name!r} in it.{did_you_mean(part, classes)}"
                )
            found = getattr(found, part)
        return found

    def declared_failures(self) -> dict[str, str]:
        """Return the expected failures that the class itself declares: check id to reason."""
        return dict(getattr(self.load(), "expected_failures", {}))

    def _import(self) -> ModuleType:
        try:
            if self.file is None:
                return importlib.import_module(self.module)
            loaded = sys.modules.get(self.module)
            if loaded is not None and getattr(loaded, "__file__", None) == self.file:
                return loaded
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            if spec is None or spec.loader is None or not Path(self.file).is_file():
                raise BadInputError(f"subject {str(self)!r}: there is no Python file {self.file!r}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[self.module]
                raise
            return module
        except BadInputError:
            raise
        except Exception as error:
            raise BadInputError(
                f"subject {str(self)!r} cannot be imported: {type(error).__name__}: {error}. "
                "Expected 'package.module:Class' or 'path/to/file.py:Class'"
            ) from error


def find_subject(subject: object) -> SubjectRef:
    """Return the reference for a class, or for a text such as "mylib.testing:MyTrainer" or "tests/mine.py:MyTrainer".

    Raises:
        BadInputError: when ranks could not import it.
    """
    if isinstance(subject, SubjectRef):
        return subject
    if isinstance(subject, str):
        place, _, name = subject.rpartition(":")
        if not place or not name.replace(".", "").isidentifier():
            raise BadInputError(
                f"subject: found {subject!r}, expected 'package.module:Class' or 'path/to/file.py:Class'"
            )
        if place.endswith(".py"):
            path = Path(place).resolve()
            return SubjectRef(module=f"_ranks_subject_{path.stem}", name=name, file=str(path))
        return SubjectRef(module=place, name=name)
    cls = subject if isinstance(subject, type) else type(subject)
    if "<locals>" in cls.__qualname__:
        raise BadInputError(
            f"subject {cls.__qualname__!r} is defined inside a function, where ranks cannot import it: "
            "move the class to the top of its module"
        )
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return SubjectRef(module=cls.__module__, name=cls.__qualname__)
    if cls.__module__ == "__main__":
        return SubjectRef(
            module=f"_ranks_subject_{Path(file).stem}",
            name=cls.__qualname__,
            file=str(Path(file).resolve()),
        )
    return SubjectRef(module=cls.__module__, name=cls.__qualname__, file=str(Path(file).resolve()))


def inspect_subject(ref: SubjectRef) -> Capabilities:
    """Import a subject's class and return what it declares.

    Raises:
        BadInputError: when it lacks `train` or `capabilities`, or a method that a capability
            promises.
    """
    cls = ref.load()
    if not isinstance(cls, type):
        raise BadInputError(
            f"subject {str(ref)!r}: found {cls!r}, expected a class with `capabilities` and `train(self, job)`"
        )
    capabilities = getattr(cls, "capabilities", None)
    if not isinstance(capabilities, Capabilities):
        raise BadInputError(
            f"subject {str(ref)!r}: `capabilities` is {capabilities!r}, expected Capabilities(...): "
            "add `capabilities = Capabilities()` to the class itself and declare what it can do"
        )
    train = getattr(cls, "train", None)
    if not callable(train):
        methods = [
            name
            for name, value in vars(cls).items()
            if callable(value) and not name.startswith("_")
        ]
        raise BadInputError(
            f"subject {str(ref)!r} has no method train(self, job).{did_you_mean('train', methods)}"
        )
    try:
        inspect.signature(train).bind(None, None)
    except TypeError as error:
        raise BadInputError(
            f"subject {str(ref)!r}: found train{inspect.signature(train)}, expected train(self, job)"
        ) from error
    if capabilities.export and not callable(getattr(cls, "export", None)):
        raise BadInputError(
            f"subject {str(ref)!r} declares export=True but has no method export(self, out_dir)"
        )
    return capabilities


def validated(result: object, *, ref: str) -> Trained:
    """Return rank 0's result if it is one.

    Raises:
        BadInputError: when it is no `Trained`, or one that says nothing or says it twice.
    """
    if not isinstance(result, Trained):
        raise BadInputError(
            f"subject {ref!r}: train returned {type(result).__name__} on rank 0, "
            "expected Trained(parameters=..., history=[...])"
        )
    if (result.parameters is None) == (result.model_dir is None):
        raise BadInputError(
            f"subject {ref!r}: Trained has both or none of parameters and model_dir, expected exactly one"
        )
    for name, tensor in (result.parameters or {}).items():
        if not hasattr(tensor, "detach"):  # without importing torch
            raise BadInputError(
                f"subject {ref!r}: the parameter {name!r} is of type {type(tensor).__name__}, expected a torch.Tensor"
            )
    history: Any = result.history  # what a subject says, whatever the annotation
    if not isinstance(history, Sequence):
        raise BadInputError(
            f"subject {ref!r}: history={history!r}, expected a list with a dict for each optimizer step"
        )
    for row in history:
        if not isinstance(row, Mapping):
            raise BadInputError(
                f"subject {ref!r}: a history row is {row!r}, expected a dict with at least the step's 'loss'"
            )
        loss = row.get("loss")
        if not isinstance(loss, (int, float)) or isinstance(loss, bool):
            raise BadInputError(
                f"subject {ref!r}: a history row has loss={loss!r}, expected a number (NaN included): {dict(row)!r}"
            )
    return result


def full_parameters(model: Any) -> dict[str, Tensor]:
    """Return a model's full parameters and buffers-free state as CPU tensors: a collective, call it on every rank.

    Sees through DDP, FSDP2 (DTensor), `torch.compile` and PEFT; tied parameters appear under their
    first name.

    Args:
        model: an nn.Module, wrapped or not.

    Returns:
        Detached copies by their names in the unwrapped model, in the model's own dtype.
    """
    from torch.distributed.tensor import DTensor

    full: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        full[_plain_name(name)] = tensor.cpu().clone()
    return full


_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "base_model.model.",
)


def _plain_name(name: str) -> str:
    name = name.removeprefix("module.")  # DDP's own; a model may have a child called "module"
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
