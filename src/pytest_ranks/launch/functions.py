"""The `launch` fixture: functions and scripts on ranks, from an ordinary test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError, RankFailure, RankTimeout
from pytest_ranks.launch.group import early_variables
from pytest_ranks.launch.host import RankHost
from pytest_ranks.launch.processes import descendants, die_with_parent, kill_tree
from pytest_ranks.launch.spec import check_environment, check_run

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
    """Starts functions and scripts on ranks; one for a session, its processes made when needed.

    Args:
        max_world_size: the most ranks that one call may ask for.
        said_by: where that number comes from.
    """

    def __init__(self, *, max_world_size: int, said_by: str) -> None:
        self._most = max_world_size
        self._said_by = said_by
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
        __tracebackhide__ = True
        check_run(world_size, timeout)
        self._check_most(world_size)
        if self._host is None:
            # a function of a test file comes with what that imports
            self._host = RankHost(preload=("torch", "pytest"))
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
        __tracebackhide__ = True
        check_run(world_size, timeout)
        check_environment(env)
        self._check_most(world_size)
        words = _words(command, world_size, cwd)
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

    def _check_most(self, world_size: int) -> None:
        __tracebackhide__ = True
        if world_size > self._most:
            raise BadInputError(
                f"world_size={world_size}: expected at most {self._most} ({self._said_by}); "
                f"allow more with --ranks-max-world-size={world_size}."
            )

    def close(self) -> None:
        """End the processes of this launcher."""
        if self._host is not None:
            self._host.close()


def _words(
    command: Sequence[str | os.PathLike[str]],
    world_size: int,
    cwd: str | os.PathLike[str] | None,
) -> tuple[str, ...]:
    __tracebackhide__ = True
    if isinstance(command, str | os.PathLike) or not command:
        raise BadInputError(
            f"command={command!r}: expected a list of the script and its arguments, "
            "such as ['train.py', '--steps', '3']."
        )
    for word in command:
        if not isinstance(word, str | os.PathLike):
            raise BadInputError(f"command={command!r}: {word!r} is no text; write '{word}'.")
    folder = os.getcwd() if cwd is None else os.fspath(cwd)
    if not os.path.isdir(folder):
        raise BadInputError(f"cwd={folder!r}: there is no such folder.")
    script = os.fspath(command[0])
    if not script.startswith("-") and not os.path.exists(os.path.join(folder, script)):
        raise BadInputError(f"command={command!r}: there is no file {script!r} in {folder!r}.")
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
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.TemporaryDirectory(prefix="ranks-torchrun-", ignore_cleanup_errors=True) as logs,
    ):
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            # torchrun makes a folder for logs and leaves it behind; this is its --log-dir
            env={"PET_LOG_DIR": logs, **environment},
            cwd=cwd,
            start_new_session=True,
            # torchrun ends its ranks on SIGTERM; on SIGKILL it would leave them behind
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),  # noqa: PLW1509
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
