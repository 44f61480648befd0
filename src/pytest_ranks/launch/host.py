"""Functions on ranks, without pytest: what the `launch` fixture and the conformance runner use."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError, RankFailure, RankTimeout, UnavailableError
from pytest_ranks.hardware.probes import probe
from pytest_ranks.hardware.requirements import BACKEND_DEVICES
from pytest_ranks.launch.coverage import SAVE_SECONDS, Harvest
from pytest_ranks.launch.devices import DeviceDesk
from pytest_ranks.launch.forensics.explanation import explain
from pytest_ranks.launch.group import early_variables
from pytest_ranks.launch.link import ZygoteLink
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.reporting import failures
from pytest_ranks.launch.spec import BACKENDS, check_environment, check_run
from pytest_ranks.launch.wire import (
    Injected,
    Prepare,
    Raised,
    Rendezvous,
    Returned,
    RunFunction,
    World,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import TracebackType

    from pytest_ranks.launch.devices import DeviceSet
    from pytest_ranks.launch.rank_run import RankRun

PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
)
# The group's own timeout lies behind ours, so that ours reports first, with all stacks.
BEHIND_DEADLINE = 30.0


class RankHost:
    """Runs functions on fresh rank processes; a clean zygote starts at once, in the background.

    Args:
        preload: modules that the zygote imports; one that fails to import is left to the ranks.
        sys_path: the ranks' import path, this process's where None.
        env: variables for the zygote and all ranks.
    """

    def __init__(
        self,
        preload: Sequence[str] = PRELOAD,
        sys_path: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._runs = itertools.count(1)
        self._owner = os.getpid()
        self._closed = False
        environment = {**os.environ, **early_variables(), **(env or {})}
        self._harvest = Harvest()
        measure = self._harvest.measure()
        self._link = ZygoteLink.start_fresh(environment, litter=self._harvest.folder)
        if measure is not None:
            self._link.farewell = SAVE_SECONDS
        self._link.prepare(
            Prepare(
                coverage=measure,
                modules=tuple(preload),
                sys_path=tuple(sys.path if sys_path is None else sys_path),
                working_directory=os.getcwd(),
                environment=dict(env or {}),
            )
        )

    def __enter__(self) -> RankHost:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the zygote and every process below it."""
        if not self._closed:
            self._closed = True
            self._link.close()
            self._harvest.take_in()
            self._harvest.close()

    def run(
        self,
        fn: str | Callable[..., Any],
        *,
        world_size: int,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        backend: str = "gloo",
        init: bool = True,
        rank_variables: bool = True,
        env: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
    ) -> list[Any]:
        """Call a function on every rank and return the results by rank.

        Args:
            fn: `package.module:function`, an importable function, or a closure where
                cloudpickle is installed.
            world_size: number of ranks, each a fresh process.
            args: positional arguments, pickled.
            kwargs: keyword arguments, pickled.
            timeout: seconds from the moment all ranks are ready.
            backend: the process group's backend.
            init: initialise the process group; else the function does, from the environment.
            rank_variables: export RANK, WORLD_SIZE and the like; False (for one rank) runs the
                function in a plain process.
            env: variables for the ranks of this run.
            preload: modules to import before the function.

        Raises:
            BadInputError: an argument cannot be used.
            RankFailure: a rank raised or died; the one that failed first comes first.
            RankTimeout: ranks did not end in time; the text holds the stacks of all of them.
            UnavailableError: no rank can be started here.
        """
        __tracebackhide__ = True
        self._check(world_size, timeout, backend, rank_variables)
        check_environment(env)
        make = _request(fn, args, kwargs, tuple(preload))
        with (
            self._rendezvous(timeout) if rank_variables else contextlib.nullcontext() as rendezvous,
            self._devices(backend, world_size) as devices,
        ):

            def world(rank: int) -> World:
                own = {} if devices is None else devices.variables(rank)
                return World(
                    rank=rank,
                    world_size=world_size,
                    backend=backend,
                    init=init,
                    rank_variables=rank_variables,
                    rendezvous=rendezvous,
                    environment={**own, **(env or {})},
                    device="" if devices is None else devices.torch_name(rank),
                )

            def on_injected(fault: Injected) -> None:
                if fault.kind == "drop_store" and rendezvous is not None:
                    self._link.close_store(rendezvous.port)

            return self._run(
                lambda rank: make(world(rank)),
                world_size,
                timeout,
                fresh=devices is not None,
                on_injected=on_injected,
            )

    @contextlib.contextmanager
    def _rendezvous(self, timeout: float) -> Generator[Rendezvous]:
        """Open a store for one run."""
        __tracebackhide__ = True
        port = self._link.open_store()
        try:
            seconds = timeout + BEHIND_DEADLINE
            yield Rendezvous(run=next(self._runs), port=port, home_port=port, seconds=seconds)
        finally:
            self._link.close_store(port)

    @contextlib.contextmanager
    def _devices(self, backend: str, world_size: int) -> Generator[DeviceSet | None]:
        """Lease a device for each rank, where the backend needs one."""
        __tracebackhide__ = True
        if backend not in BACKEND_DEVICES:
            yield None
            return
        desk = DeviceDesk(probe)
        devices = desk.check_out(backend, world_size, owner="a function on ranks")
        try:
            yield devices
        finally:
            if (held := desk.check_in(devices)) is not None:
                warnings.warn(held, ResourceWarning, stacklevel=4)

    def _run(
        self,
        request: Callable[[int], RunFunction],
        world_size: int,
        timeout: float,
        *,
        fresh: bool,
        on_injected: Callable[[Injected], None],
    ) -> list[Any]:
        __tracebackhide__ = True
        ranks = Ranks(self._link, world_size, fresh=fresh)
        try:
            runs, timed_out = ranks.run(
                request,
                is_last=lambda message: isinstance(message, Returned | Raised),
                is_failure=lambda message: isinstance(message, Raised),
                timeout=timeout,
                on_injected=on_injected,
            )
            if all(run.done for run in runs):
                ranks.leave()
            else:
                ranks.kill()
        finally:
            ranks.forget()
        found = [failures.of_function(run) for run in runs]
        failed = [failure for failure in found if failure is not None]
        if not failed:
            return [_result(run, world_size) for run in runs]
        ordered = failures.in_order(failed)
        text = failures.describe(
            ordered, world_size=world_size, timeout=timeout, explanations=explain(runs)
        )
        kind = RankTimeout if timed_out else RankFailure
        raise kind(text, rank=ordered[0].rank, world_size=world_size)

    def _check(self, world_size: int, timeout: float, backend: str, rank_variables: bool) -> None:
        __tracebackhide__ = True
        if self._closed:
            raise UnavailableError("this RankHost is closed.")
        if os.getpid() != self._owner:
            raise UnavailableError("a RankHost works only in the process that made it.")
        check_run(world_size, timeout)
        if backend not in BACKENDS:
            raise BadInputError(
                f"backend={backend!r}: expected one of {', '.join(map(repr, BACKENDS))}."
            )
        if not rank_variables and world_size != 1:
            raise BadInputError(
                f"rank_variables=False, world_size={world_size}: a plain process has no rank, "
                "so it needs world_size=1."
            )


def _request(
    fn: str | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    preload: tuple[str, ...],
) -> Callable[[World], RunFunction]:
    __tracebackhide__ = True
    target, file, by_value = _reference(fn)
    if isinstance(args, str | bytes) or not isinstance(args, Iterable):
        raise BadInputError(f"args={args!r}: expected a tuple of arguments, such as ({args!r},).")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise BadInputError(f"kwargs={kwargs!r}: expected a dict of arguments by name.")
    try:
        arguments = pickle.dumps((tuple(args), dict(kwargs or {})))
    except Exception as error:
        arguments = _pickle_by_value((tuple(args), dict(kwargs or {})), "the arguments", error)

    def make(world: World) -> RunFunction:
        return RunFunction(
            world=world,
            target=target,
            target_file=file,
            by_value=by_value,
            arguments=arguments,
            sys_path=tuple(sys.path),
            modules=preload,
        )

    return make


def _result(run: RankRun, world_size: int) -> Any:
    __tracebackhide__ = True
    try:
        return pickle.loads(run.messages[-1].value)
    except Exception as error:
        raise RankFailure(
            f"the result of rank {run.rank} cannot be unpickled in this process "
            f"({type(error).__name__}: {error}): return plain data.",
            rank=run.rank,
            world_size=world_size,
        ) from None


def _reference(fn: str | Callable[..., Any]) -> tuple[str | None, str | None, bytes | None]:
    __tracebackhide__ = True
    if isinstance(fn, str):
        prefix, _, name = fn.partition(":")
        if not prefix or not name:
            raise BadInputError(f"fn={fn!r}: expected 'package.module:function'.")
        return fn, None, None
    if not callable(fn):
        raise BadInputError(
            f"fn={fn!r}: expected a function or 'package.module:function', "
            f"found {type(fn).__name__}."
        )
    module_name, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    module = sys.modules.get(module_name or "")
    found: Any = module
    for part in (qualname or "<locals>").split("."):
        found = getattr(found, part, None)
    if found is not fn or module_name == "__main__":
        return None, None, _pickle_by_value(fn, f"fn={qualname or fn!r}", None)
    return f"{module_name}:{qualname}", getattr(module, "__file__", None), None


def _pickle_by_value(value: object, name: str, cause: Exception | None) -> bytes:
    __tracebackhide__ = True
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        reason = f" ({cause})" if cause is not None else ""
        raise BadInputError(
            f"{name} cannot be sent to a rank by name{reason}: expected something at the top "
            "level of an importable module. `pip install cloudpickle` lifts this."
        ) from None
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise BadInputError(
            f"{name} cannot be pickled ({type(error).__name__}: {error}): pass what the function "
            "needs as plain data."
        ) from None
