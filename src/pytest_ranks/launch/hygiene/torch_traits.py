"""Traits of torch and numpy: what silently changes another test's numbers or collectives."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_state
from pytest_ranks.launch.hygiene.trait import Names, Trait, show, tell_mapping

if TYPE_CHECKING:
    from collections.abc import Iterable

_NUMPY_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
CUDA = "CUDA initialised:"
_DEVICES = ("cpu", "cuda")
_TINY = [5e-324]  # in a list, so that the compiler does not compute with it


def traits() -> tuple[Trait, ...]:
    """Return the traits; none of torch's where that is not loaded."""
    numpy = Trait(
        name="numpy.seterr",
        read=_read_numpy,
        write=lambda before: sys.modules["numpy"].seterr(**before),
        tell=tell_mapping("numpy.seterr"),
    )
    if "torch" not in sys.modules:
        return (numpy,)
    return (numpy, *_of_tensors(), *_of_autograd(), *_of_backends(), *_of_processes(), *_hooks())


def _of_tensors() -> Iterable[Trait]:
    import torch

    yield Trait(name="default dtype", read=torch.get_default_dtype, write=torch.set_default_dtype)
    yield Trait(
        name="default device", read=_compat_state.default_device, write=torch.set_default_device
    )
    yield Trait(name="number of threads", read=torch.get_num_threads, write=torch.set_num_threads)
    yield Trait(
        name="denormal numbers flushed:",
        read=lambda: _TINY[0] * 1.0 == 0.0,
        write=torch.set_flush_denormal,
    )
    yield Trait(name="active function modes", read=_compat_state.function_modes, tell=_tell_modes)
    yield Trait(name="active dispatch modes", read=_compat_state.dispatch_modes, tell=_tell_modes)
    yield Trait(
        name="sharing strategy of torch.multiprocessing",
        read=torch.multiprocessing.get_sharing_strategy,
        write=torch.multiprocessing.set_sharing_strategy,
    )


def _of_autograd() -> Iterable[Trait]:
    import torch

    yield Trait(name="gradient mode", read=torch.is_grad_enabled, write=torch.set_grad_enabled)
    yield Trait(name="inference mode", read=torch.is_inference_mode_enabled)
    yield Trait(
        name="anomaly detection",
        read=lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        write=lambda before: torch.autograd.set_detect_anomaly(*before),
    )
    yield Trait(
        name="autocast", read=_read_autocast, write=_write_autocast, tell=tell_mapping("autocast")
    )


def _of_backends() -> Iterable[Trait]:
    import torch

    yield Trait(
        name="torch",
        read=_read_flags,
        write=_write_flags,
        tell=tell_mapping("torch"),
    )
    yield Trait(
        name="precision of float32",
        read=_read_precision,
        write=_write_precision,
        tell=tell_mapping("precision of float32"),
    )
    yield Trait(name=CUDA, read=torch.cuda.is_initialized)


def _of_processes() -> Iterable[Trait]:
    import torch.distributed as dist

    if not dist.is_available():
        return
    yield Trait(
        name="debug level of torch.distributed",
        read=dist.get_debug_level,  # type: ignore[attr-defined]
        write=dist.set_debug_level,  # type: ignore[attr-defined]
    )
    yield Names(
        (sys.modules[module], name)
        for module in ("torch.distributed", "torch.distributed.distributed_c10d")
        for name, value in vars(sys.modules[module]).items()
        if not name.startswith("_") and callable(value)
    ).trait(is_inherited=True)


def _hooks() -> Iterable[Trait]:
    yield Trait(
        name="hooks on all modules or optimizers",
        read=lambda: [dict(one) for one in _compat_state.global_hooks()],
        write=_write_hooks,
        tell=lambda before, after: (
            [
                f"hook {show(now[key])} on all modules or optimizers (new)"
                for was, now in zip(before, after, strict=True)
                for key in now
                if key not in was
            ]
            or ["hooks on all modules or optimizers were removed"]
        ),
    )
    yield Trait(
        name="what torch.compile has compiled",
        read=_compat_state.compiled_frames,
        write=lambda _: _compat_state.stop_compile_workers(),
        is_told=False,
    )
    yield Trait(
        name="compiler setting",
        read=_compat_state.compiler_settings,
        write=_compat_state.set_compiler_settings,
        tell=tell_mapping("setting"),
    )


def _tell_modes(before: tuple[str, ...], after: tuple[str, ...]) -> list[str]:
    found = ", ".join(after[len(before) :])
    return [f"{found} was entered and not left" if found else "a mode of before was left"]


def _read_numpy() -> dict[str, str]:
    numpy = sys.modules.get("numpy")
    return _NUMPY_ERRORS if numpy is None else numpy.geterr()


# ---- autocast


def _read_autocast() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cache": torch.is_autocast_cache_enabled()}
    for device in _DEVICES:
        found[device] = torch.is_autocast_enabled(device)
        found[f"dtype on {device}"] = torch.get_autocast_dtype(device)
    found["depth"] = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return found


def _write_autocast(before: dict[str, Any]) -> None:
    import torch

    torch.set_autocast_cache_enabled(before["cache"])
    for device in _DEVICES:
        torch.set_autocast_enabled(device, before[device])
        torch.set_autocast_dtype(device, before[f"dtype on {device}"])
    while torch.autocast_increment_nesting() - 1 > before["depth"]:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


# ---- flags


def _read_flags() -> dict[str, Any]:
    import torch

    cudnn: Any = torch.backends.cudnn
    cuda: Any = torch.backends.cuda
    deterministic: Any = torch.utils.deterministic
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_algorithms.warn_only": (
            torch.is_deterministic_algorithms_warn_only_enabled()
        ),
        "fill_uninitialized_memory": deterministic.fill_uninitialized_memory,
        "cudnn.enabled": cudnn.enabled,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
        "flash_sdp": cuda.flash_sdp_enabled(),
        "mem_efficient_sdp": cuda.mem_efficient_sdp_enabled(),
        "math_sdp": cuda.math_sdp_enabled(),
        "cudnn_sdp": cuda.cudnn_sdp_enabled(),
        "bf16_reduction": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduction": cuda.matmul.allow_fp16_reduced_precision_reduction,
    }


def _write_flags(before: dict[str, Any]) -> None:
    import torch

    torch.use_deterministic_algorithms(
        before["deterministic_algorithms"],
        warn_only=before["deterministic_algorithms.warn_only"],
    )
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = before["fill_uninitialized_memory"]
    cudnn: Any = torch.backends.cudnn
    cuda: Any = torch.backends.cuda
    cudnn.enabled = before["cudnn.enabled"]
    cudnn.benchmark = before["cudnn.benchmark"]
    cudnn.deterministic = before["cudnn.deterministic"]
    cuda.enable_flash_sdp(before["flash_sdp"])
    cuda.enable_mem_efficient_sdp(before["mem_efficient_sdp"])
    cuda.enable_math_sdp(before["math_sdp"])
    cuda.enable_cudnn_sdp(before["cudnn_sdp"])
    cuda.matmul.allow_bf16_reduced_precision_reduction = before["bf16_reduction"]
    cuda.matmul.allow_fp16_reduced_precision_reduction = before["fp16_reduction"]


def _places() -> dict[str, Any]:
    import torch

    backends: Any = torch.backends
    return {
        "all": backends,
        "cudnn": backends.cudnn,
        "cuda.matmul": backends.cuda.matmul,
        "cudnn.conv": backends.cudnn.conv,
        "cudnn.rnn": backends.cudnn.rnn,
        "mkldnn.matmul": backends.mkldnn.matmul,
        "mkldnn.conv": backends.mkldnn.conv,
    }


def _read_precision() -> dict[str, str]:
    import torch

    found = {name: place.fp32_precision for name, place in _places().items()}
    try:
        found["matmul"] = torch.get_float32_matmul_precision()
    except RuntimeError:  # the older and the newer setting contradict each other
        found["matmul"] = "mixed"
    return found


def _write_precision(before: dict[str, str]) -> None:
    import torch

    if before["matmul"] != "mixed":
        torch.set_float32_matmul_precision(before["matmul"])
    for name, place in _places().items():
        place.fp32_precision = before[name]


# ---- hooks


def _write_hooks(before: list[dict[Any, Any]]) -> None:
    for one, was in zip(_compat_state.global_hooks(), before, strict=True):
        if one != was:
            one.clear()
            one.update(was)
