"""The `launch` fixture: functions and scripts on ranks, from an ordinary test."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError, RankFailure, RankTimeout
from pytest_ranks.launch.group import early_variables
from pytest_ranks.launch.host import RankHost
from pytest_ranks.launch.processes import descendants, kill_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Lines of output that a failure shows; all of it is on the result.
SHOWN_LINES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptResult:
    """How a script under torchrun ended.

    Attributes:
        returncode: torchrun's exit code, -signal where a signal ended it.
        stdout: everything that torchrun and the ranks wrote there.
        stderr: the same for standard error.
        command: what was run.
    """

    returncode: int
    stdout: str
    stderr: str
    command: tuple[str, ...]


class Launcher:
    """Starts functions and scripts on ranks; one for a session, its processes made when needed."""

    def __init__(self) -> None:
        self._host: RankHost | None = None

    def __call__(
        self,
        fn: str | Callable[..., Any],
        *,
        world_size: int = 2,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        backend: str = "gloo",
        init: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call a function on every rank, each a fresh process; return the results by rank.

        Args:
            fn: an importable function, `package.module:function`, or a closure where
                cloudpickle is installed.
            world_size: number of ranks.
            args: positional arguments, pickled.
            kwargs: keyword arguments, pickled.
            timeout: seconds from the moment all ranks are ready.
            backend: the process group's backend.
            init: initialise the process group; else the function does, from the environment.
            env: variables for the ranks.

        Raises:
            BadInputError: an argument cannot be used.
            RankFailure: a rank raised or died; the one that failed first comes first.
            RankTimeout: ranks did not end in time; the text holds the stacks of all of them.
        """
        if self._host is None:
            self._host = RankHost(preload=("torch",))
        return self._host.run(
            fn,
            world_size=world_size,
            args=args,
            kwargs=kwargs,
            timeout=timeout,
            backend=backend,
            init=init,
            env=env,
        )

    def script(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        world_size: int = 2,
        timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        check: bool = True,
    ) -> ScriptResult:
        """Run a script under torchrun on this machine.

        Args:
            command: the script and its arguments, or `-m`, a module and its arguments.
            world_size: number of ranks.
            timeout: seconds for all of it, imports included.
            env: variables beside those of this process.
            cwd: folder to run it in.
            check: raise where it fails.

        Raises:
            BadInputError: an argument cannot be used.
            RankFailure: it failed; the text ends with what it wrote.
            RankTimeout: it was still running at its deadline; its whole tree was ended.
        """
        words = _words(command, world_size, timeout)
        environment = {**os.environ, **early_variables(), **(env or {})}
        returncode, stdout, stderr = _run(words, environment, cwd, timeout)
        result = ScriptResult(
            returncode=-1 if returncode is None else returncode,
            stdout=stdout,
            stderr=stderr,
            command=words,
        )
        if returncode is None:
            head = f"the script was still running after {timeout:g} s and was ended"
            raise RankTimeout(_with_output(head, result), rank=0, world_size=world_size)
        if check and returncode != 0:
            head = f"the script failed with exit code {returncode}"
            raise RankFailure(_with_output(head, result), rank=0, world_size=world_size)
        return result

    def close(self) -> None:
        """End the processes of this launcher."""
        if self._host is not None:
            self._host.close()


def _words(
    command: Sequence[str | os.PathLike[str]], world_size: int, timeout: float
) -> tuple[str, ...]:
    if isinstance(command, str | os.PathLike) or not command:
        raise BadInputError(
            f"command={command!r}: expected a list of the script and its arguments, "
            "such as ['train.py', '--steps', '3']."
        )
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise BadInputError(f"world_size={world_size!r}: expected a whole number of at least 1.")
    if not timeout > 0:
        raise BadInputError(f"timeout={timeout!r}: expected a number of seconds above 0.")
    return (
        sys.executable,
        "-m",
        "torch.distributed.run",
        # standalone: a rendezvous of its own on a free port that the system chooses
        "--standalone",
        "--nnodes=1",
        f"--nproc-per-node={world_size}",
        *(os.fspath(word) for word in command),
    )


def _run(
    words: tuple[str, ...],
    environment: dict[str, str],
    cwd: str | os.PathLike[str] | None,
    timeout: float,
) -> tuple[int | None, str, str]:
    """Run a command; its exit code is None where the deadline ended it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        pidfd = os.pidfd_open(process.pid)
        try:
            returncode = _wait(process, timeout)
        finally:
            kill_tree(process.pid, pidfd)  # does nothing where it has ended
            process.wait()
            os.close(pidfd)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return returncode, texts[0], texts[1]


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Wait for torchrun; what it started and left behind is ended too.

    torchrun gives each rank a session of its own, so the ranks are recorded while they can
    still be found below it.
    """
    end = time.monotonic() + timeout
    seen: dict[int, int] = {}  # pid -> pidfd
    try:
        while True:
            for pid in descendants(process.pid):
                if pid not in seen:
                    with contextlib.suppress(OSError):
                        seen[pid] = os.pidfd_open(pid)
            left = end - time.monotonic()
            try:
                return process.wait(timeout=max(0.0, min(0.1, left)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    return None
    finally:
        for pid, pidfd in seen.items():
            kill_tree(pid, pidfd)
            os.close(pidfd)


def _with_output(head: str, result: ScriptResult) -> str:
    parts = [f"{head}: {' '.join(result.command[1:])}"]
    for name, text in (("stdout", result.stdout), ("stderr", result.stderr)):
        lines = text.rstrip().splitlines()
        if lines:
            cut = len(lines) - SHOWN_LINES
            title = f"{name}, last {SHOWN_LINES} of {len(lines)} lines" if cut > 0 else name
            parts += ["", f"{title}:", *lines[-SHOWN_LINES:]]
    return "\n".join(parts)
