"""A named accelerator that is not there: tensors say that they are on it, and the CPU computes.

It shows what code does with the device: that everything is moved there, that nothing is hard-coded to
"cuda" or the CPU, which backend is asked for, and that mixing devices fails. It shows nothing of the
hardware: no kernel, compiler, memory, stream or precision of it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_fidelity
from pytest_ranks.errors import FidelityError
from pytest_ranks.launch.fidelity.refusals import at_import, sentence

if TYPE_CHECKING:
    from types import ModuleType

    import torch

NO_AUTOCAST = sentence(
    "simulated", "autocast", "which operations are cast is a list of the real device's", "device"
)
NO_RESHAPING = sentence(
    "simulated",
    "operations that change a shape in place",
    "its tensors have the shape that they were made with",
    "device",
)
# Operations that take tensors of another device, on real accelerators too.
_ACROSS = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "set_")
# torch makes these from the inside of a tensor on the CPU, or by resizing an empty one.
_IN_TWO_STEPS = ("tensor", "as_tensor", "arange", "range")
_installed: list[str] = []  # torch lets a process name one such device, for good


def install(name: str) -> None:
    """Have torch know a device of this name in this process, and a process group backend for it."""
    if name in _installed:
        return
    _installed.append(name)
    import torch
    import torch.distributed as dist

    _compat_fidelity.setup_device(name, _Module(), _run)
    dist.Backend.register_backend(name, _gloo, devices=[name, "cpu"])
    for made_by in _IN_TWO_STEPS:
        original = getattr(torch, made_by)
        _compat_fidelity.replace_everywhere(original, made_by, _in_two_steps(original))
    at_import("torch.distributed.fsdp._fully_shard._fsdp_param", _keep_storage)


def _in_two_steps(original: Any) -> Any:
    """Return a factory that makes its tensor on the CPU, then moves it."""

    @functools.wraps(original)
    def make(*data: Any, **keywords: Any) -> Any:
        device = keywords.get("device")
        if device is None or torch.device(device).type != _installed[0]:
            return original(*data, **keywords)
        del keywords["device"]
        requires_grad = keywords.pop("requires_grad", False)
        return original(*data, **keywords).to(device).requires_grad_(requires_grad)

    import torch

    return make


def _gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
    """Return the group that moves the data; it sees CPU tensors only."""
    import torch.distributed as dist

    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


def _keep_storage(module: ModuleType) -> None:
    """Let FSDP2 free and allocate nothing: the tensors of this device own no storage."""
    for name in ("free_storage", "alloc_storage"):
        original = getattr(module, name, None)
        if original is not None:
            setattr(module, name, functools.partial(_unless_simulated, original))


def _unless_simulated(original: Any, tensor: torch.Tensor, *rest: Any) -> None:
    if not isinstance(tensor, _tensor_class()):
        original(tensor, *rest)


@functools.cache
def _tensor_class() -> Any:
    import torch

    class SimulatedTensor(torch.Tensor):
        """A tensor of the device; `raw` is the one on the CPU."""

        raw: torch.Tensor

        @staticmethod
        def __new__(cls: Any, raw: torch.Tensor) -> Any:
            return _compat_fidelity.make_wrapper(cls, raw, torch.device(_installed[0], 0))

        def __init__(self, raw: torch.Tensor) -> None:
            self.raw = raw

        def tolist(self) -> Any:
            """Return the values, as of any tensor; torch refuses them of a subclass."""
            return self.raw.tolist()

        def __repr__(self, **_: object) -> str:  # type: ignore[override]
            gradient = ", requires_grad=True" if self.requires_grad else ""
            return f"{repr(self.raw.detach())[:-1]}, device='{self.device}'{gradient})"

        def __reduce_ex__(self, protocol: Any) -> Any:
            del protocol
            return _rebuild, (self.raw, self.requires_grad)

        @classmethod
        def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            """Run an operation on tensors of the device."""
            del types
            return _run(func, *args, **(kwargs or {}))

    return SimulatedTensor


def _rebuild(raw: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """Return a tensor of the device that was pickled, on the CPU where there is no such device."""
    found: torch.Tensor = _tensor_class()(raw) if _installed else raw
    return found.requires_grad_(requires_grad)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the CPU tensors, and put its results on the device where they belong."""
    import torch
    from torch.utils._pytree import tree_map

    kind, name = _tensor_class(), _installed[0]
    known: dict[int, Any] = {}
    strangers: list[torch.Tensor] = []

    def lower(value: Any) -> Any:
        if isinstance(value, kind):
            known[id(value.raw)] = value
            return value.raw
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            strangers.append(value)
        if isinstance(value, torch.device) and value.type == name:
            return torch.device("cpu")
        return value

    lowered, options = tree_map(lower, args), tree_map(lower, kwargs)
    if known and strangers and func.overloadpacket.__name__ not in _ACROSS:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{name}:0 and {strangers[0].device}, in {func} (fidelity 'simulated')"
        )
    result = func(*lowered, **options)
    target = kwargs.get("device")
    if target is not None and torch.device(target).type != name:
        return result

    def lift(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, kind):
            return value
        if id(value) not in known:
            return kind(value)
        if value.shape != known[id(value)].shape:
            raise FidelityError(NO_RESHAPING)
        return known[id(value)]

    is_into_other = func.overloadpacket.__name__ == "copy_" and not isinstance(args[0], kind)
    return result if is_into_other else tree_map(lift, result)


class _Stream:
    """A stream, or an event, on which everything is over at once."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self, event: object = None) -> object:
        """Return the event."""
        return event or _Stream()

    def query(self) -> bool:
        """Return whether all is done."""
        return True

    def _nothing(self, *_: object, **__: object) -> None:
        """Do nothing."""

    synchronize = wait_stream = wait_event = record = wait = _nothing


class _Module:
    """What `torch.<name>` offers: one device, in use by this process."""

    Stream = Event = _Stream

    def is_available(self) -> bool:
        """Return whether there is a device: this one."""
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """Return one: a rank sees its own."""
        return 1

    def current_device(self) -> int:
        """Return the number of the only one."""
        return 0

    def current_stream(self, device: object = None) -> _Stream:
        """Return a stream."""
        del device
        return _Stream()

    def stream(self, stream: object) -> _Stream:
        """Return a context that changes nothing."""
        del stream
        return _Stream()

    def _nothing(self, *_: object, **__: object) -> None:
        """Do nothing."""

    set_device = synchronize = manual_seed = manual_seed_all = empty_cache = _nothing

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        """Return the state of the CPU's generator, which draws."""
        import torch

        del device
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        """Set the state of the CPU's generator."""
        import torch

        del device
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Refuse autocast: what it casts is decided by each device's own list."""
        raise FidelityError(NO_AUTOCAST)
