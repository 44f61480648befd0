"""What a test left behind in a rank that serves other tests, put back."""

from __future__ import annotations

import contextlib
import os
import sys


class Baseline:
    """The state of a rank process before a test, restored after it.

    Covers what is cheap to put back and silently changes another test's numbers or imports:
    environment, working directory, import path, torch's default dtype, gradient mode,
    deterministic flags and number of threads.
    """

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._directory = os.getcwd()
        self._path = list(sys.path)
        self._torch = _torch_state()

    def restore(self) -> None:
        """Put everything back that differs."""
        if dict(os.environ) != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        with contextlib.suppress(OSError):
            os.chdir(self._directory)
        if sys.path != self._path:
            sys.path[:] = self._path
        state = _torch_state()
        if self._torch is not None and state is not None and state != self._torch:
            _set_torch_state(self._torch)


def _torch_state() -> tuple[object, bool, bool, bool, int] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
    )


def _set_torch_state(state: tuple[object, bool, bool, bool, int]) -> None:
    torch = sys.modules["torch"]
    dtype, has_grad, deterministic, warn_only, threads = state
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(has_grad)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
