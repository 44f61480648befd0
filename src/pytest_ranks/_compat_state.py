"""Private names of the standard library, torch, Accelerate and transformers that hold state.

Each reads what a test can leave changed in a process and has an answer for the case that the
name is gone: what cannot be read is not looked at. No module is imported here: one that is not
loaded holds nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# ---- the standard library (CPython 3.11 to 3.14)


def environment() -> dict[bytes, bytes]:
    """Return a copy of the environment; decoding it would be 50 times slower (`os.environ._data`)."""
    data = getattr(os.environ, "_data", None)
    return dict(data) if isinstance(data, dict) else dict(os.environb)


def signal_handlers(numbers: Iterable[int]) -> list[Any]:
    """Return the handlers of signals; `signal.getsignal` looks for an enumeration each time."""
    read = getattr(sys.modules.get("_signal"), "getsignal", signal.getsignal)
    return list(map(read, numbers))


def service_pids() -> set[int]:
    """Return the helpers that multiprocessing starts once for a process and keeps.

    `resource_tracker._resource_tracker._pid`, `forkserver._forkserver._forkserver_pid`.
    """
    found = set()
    for module, holder, name in (
        ("multiprocessing.resource_tracker", "_resource_tracker", "_pid"),
        ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid"),
    ):
        pid = getattr(getattr(sys.modules.get(module), holder, None), name, None)
        if isinstance(pid, int):
            found.add(pid)
    return found


def service_descriptors() -> set[int]:
    """Return the descriptors that this process holds to such helpers."""
    found = set()
    for module, holder, names in (
        ("multiprocessing.resource_tracker", "_resource_tracker", ("_fd",)),
        ("multiprocessing.forkserver", "_forkserver", ("_forkserver_alive_fd",)),
    ):
        service = getattr(sys.modules.get(module), holder, None)
        for name in names:
            if isinstance(fd := getattr(service, name, None), int):
                found.add(fd)
    return found


# ---- torch 2.11 to 2.13

# What torch.compile sets once for the process: where it keeps its files, and a logger that
# drops its own handler at the first record.
COMPILER_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
TRACE_LOGGER = "torch.__trace"


def function_modes() -> tuple[str, ...]:
    """Return the names of the active function modes, without the one of a default device."""
    core = getattr(sys.modules.get("torch"), "_C", None)
    if not getattr(core, "_len_torch_function_stack", int)():
        return ()
    module = sys.modules.get("torch.overrides")
    stack: list[Any] = getattr(module, "_get_current_function_mode_stack", list)()
    return tuple(name for one in stack if (name := type(one).__name__) != "DeviceContext")


def dispatch_modes() -> tuple[str, ...]:
    """Return the names of the active dispatch modes."""
    core = getattr(sys.modules.get("torch"), "_C", None)
    if not getattr(core, "_len_torch_dispatch_stack", int)():
        return ()
    module = sys.modules.get("torch.utils._python_dispatch")
    return tuple(
        type(one).__name__ for one in getattr(module, "_get_current_dispatch_mode_stack", list)()
    )


def default_device() -> Any:
    """Return the default device that was set, None where none was."""
    device = getattr(sys.modules.get("torch.utils._device"), "CURRENT_DEVICE", None)
    return None if device is None else str(device)


def global_hooks() -> tuple[dict[Any, Any], ...]:
    """Return torch's own dictionaries of hooks on all modules and all optimizers."""
    return (
        *_dictionaries("torch.nn.modules.module", "_global_", "_hooks"),
        *_dictionaries("torch.optim.optimizer", "_global_", "_hooks"),
    )


def _dictionaries(module: str, start: str, part: str) -> tuple[dict[Any, Any], ...]:
    if module not in sys.modules:
        return ()
    if module not in _known:
        _known[module] = tuple(
            value
            for name, value in vars(sys.modules[module]).items()
            if name.startswith(start) and part in name and isinstance(value, dict)
        )
    return _known[module]


# Module -> the dictionaries found there: they live as long as their module.
_known: dict[str, tuple[dict[Any, Any], ...]] = {}


def compiled_frames() -> int:
    """Return how many frames torch.compile has met since its last reset."""
    module = sys.modules.get("torch._dynamo.convert_frame")
    return int(getattr(module, "FRAME_COUNTER", 0))


class _Settings:
    """What a module of torch's settings holds beside its defaults.

    torch 2.13 keeps each in a context variable, 2.11 in an attribute of its entry, where merely
    reading a list leaves a copy of the default.
    """

    def __init__(self, module: str) -> None:
        self._entries: dict[str, Any] = getattr(sys.modules[module], "_config", {})
        held = [getattr(entry, "user_override", None) for entry in self._entries.values()]
        self._holders: list[Any] = list(self._entries.values())
        self._get: Callable[[Any], Any] = attrgetter("user_override")
        if held and all(type(one).__name__ == "ContextVar" for one in held):
            variables: list[Any] = held
            self._holders, self._get = variables, type(variables[0]).get
        self._raw: list[Any] = []
        self._found: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """Return what is not the default."""
        raw = list(map(self._get, self._holders))
        if raw != self._raw:
            self._raw = raw
            self._found = {
                key: value
                for (key, entry), value in zip(self._entries.items(), raw, strict=True)
                if type(value) is not object and value != entry.default  # a bare object: not set
            }
        return self._found


_settings: dict[str, _Settings] = {}


def compiler_settings() -> dict[str, Any]:
    """Return what differs from the default in the settings of dynamo and inductor."""
    found = {}
    for module in ("torch._dynamo.config", "torch._inductor.config"):
        if module in sys.modules:
            if module not in _settings:
                _settings[module] = _Settings(module)
            for key, value in _settings[module].read().items():
                found[f"{module}.{key}"] = value
    return found


def set_compiler_settings(before: dict[str, Any]) -> None:
    """Put the settings of dynamo and inductor back."""
    for full in {**compiler_settings(), **before}:
        name, _, key = full.rpartition(".")
        module = sys.modules[name]
        entry = module._config[key]
        setattr(module, key, before.get(full, entry.default))


def group_marks() -> tuple[object, ...]:
    """Return what tells whether process groups were made (`distributed_c10d._world`)."""
    world = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_world", None)
    return getattr(world, "group_count", 0), id(getattr(world, "default_pg", None))


def stop_compile_workers() -> None:
    """Reset torch.compile, and end the processes that inductor compiles in, if there are any."""
    sys.modules["torch"].compiler.reset()
    module = sys.modules.get("torch._inductor.async_compile")
    if module is not None and hasattr(module, "shutdown_compile_workers"):
        module.shutdown_compile_workers()


# ---- Accelerate 1.x


def accelerate_states() -> dict[str, dict[Any, Any]]:
    """Return the dictionaries behind Accelerate's three singletons, by name."""
    module = sys.modules.get("accelerate.state")
    found = {}
    for name in ("PartialState", "AcceleratorState", "GradientState"):
        with contextlib.suppress(Exception):  # no such class, or one that keeps it elsewhere
            shared = getattr(module, name)._shared_state
            if isinstance(shared, dict):
                found[name] = shared
    return found


# ---- transformers 5.x


def transformers_registries() -> dict[str, dict[Any, Any]]:
    """Return what was registered with transformers' auto classes and attention functions."""
    found = {}
    for name in ("modeling_auto", "configuration_auto", "tokenization_auto"):
        full = f"transformers.models.auto.{name}"
        if full in sys.modules and full not in _registries:
            _registries[full] = {
                f"{key} of transformers": value._extra_content
                for key, value in vars(sys.modules[full]).items()
                if isinstance(getattr(value, "_extra_content", None), dict)
            }
        found.update(_registries.get(full, {}))
    for module, holder in (
        ("transformers.modeling_utils", "AttentionInterface"),
        ("transformers.masking_utils", "AttentionMaskInterface"),
    ):
        mapping = getattr(getattr(sys.modules.get(module), holder, None), "_global_mapping", None)
        if isinstance(mapping, dict):
            found[f"{holder} of transformers"] = mapping
    return found


_registries: dict[str, dict[str, dict[Any, Any]]] = {}
