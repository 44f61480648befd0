"""A random stream of its own for each rank that is a thread.

torch has one default generator a process. Threads that draw from it race, and two ranks that were
seeded alike get different weights, silently. Here each thread's draws come from a state that is
swapped in under a lock, so they are the numbers that a process of its own would draw.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_fidelity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils._python_dispatch import TorchDispatchMode

_lock = threading.Lock()


class _Own(threading.local):
    """The stream of this thread, None where it has none."""

    stream: Any = None


_own = _Own()


@functools.cache
def _stream_class() -> type[TorchDispatchMode]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    plain = (torch.Tensor, torch.nn.Parameter)

    @functools.cache
    def is_random(func: Any) -> bool:
        return torch.Tag.nondeterministic_seeded in func.tags

    class Stream(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Draws from a state of its own."""

        def __init__(self, seed: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            generator = torch.Generator()
            generator.manual_seed(seed)
            self.state = generator.get_state()

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            """Keep torch from importing its compiler, for seconds, at the first operation."""
            return False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            """Run one operation."""
            if not is_random(func):
                return func(*args, **(kwargs or {}))
            if any(kind not in plain for kind in types):
                return NotImplemented  # a subclass may wait for other ranks: not under the lock
            return self.draw(lambda: func(*args, **(kwargs or {})))

        def draw(self, function: Callable[[], Any]) -> Any:
            """Call a function with this stream as the default generator's."""
            with _lock:
                before = torch.default_generator.get_state()
                torch.default_generator.set_state(self.state)
                try:
                    return function()
                finally:
                    self.state = torch.default_generator.get_state()
                    torch.default_generator.set_state(before)

    return Stream


def begin(seed: int) -> TorchDispatchMode:
    """Return the context in which this thread draws from a stream of its own."""
    _own.stream = _stream_class()(seed)
    stream: TorchDispatchMode = _own.stream
    return stream


def install() -> None:
    """Have torch's functions on the default generator act on the stream of the thread."""
    import torch

    for name in ("manual_seed", "seed", "initial_seed", "get_rng_state", "set_rng_state"):
        original = getattr(torch, name)
        own = _on_own_stream(original)
        setattr(torch.random, name, own)
        _compat_fidelity.replace_everywhere(original, name, own)


def _on_own_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if _own.stream is None:
            return original(*args, **kwargs)
        return _own.stream.draw(lambda: original(*args, **kwargs))

    return function
