"""Coverage of lines that only ranks execute: measured in each rank, merged into the controller's.

A rank measures with the configuration of the controller's coverage, into files of its own. It
saves before it says that it is done, and before it leaves in any way that Python code can see:
ranks are killed, and leave without interpreter teardown, where coverage by itself would save.
The controller merges the files into its own data, so that pytest-cov's report, `coverage report`
and xdist's way of handing data on need to know nothing of ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.terminal.asides import Measure

if TYPE_CHECKING:
    from collections.abc import Callable

# What a rank that is told to end may take to write its data; on a loaded machine the disk counts.
SAVE_SECONDS = 10.0
MOST_TRIES = 20  # another thread may execute new lines while the data is copied


class Harvest:
    """What the ranks of one controller have covered, on its way into the controller's data.

    Args:
        contexts: whether each test is a dynamic context, as with pytest-cov's `--cov-context=test`.
    """

    def __init__(self, *, contexts: bool = False) -> None:
        self._contexts = contexts
        self._folder: Path | None = None
        self._owner = os.getpid()

    def measure(self) -> Measure | None:
        """Return what ranks have to know to measure as this process does, None where it does not."""
        running = _running()
        config = getattr(running, "config", None)
        if not hasattr(config, "serialize"):  # coverage 7.10 and later
            return None
        assert config is not None
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="pytest-ranks-coverage-"))
            atexit.register(self.close)
        copy = config.copy()
        copy.data_file = str(self._folder / "data")
        copy.parallel = True  # a suffix of its own for each process
        copy.sigterm = False  # a rank has its own way of saving then
        copy.patch = []
        return Measure(config=copy.serialize(), contexts=self._contexts)

    @property
    def folder(self) -> str | None:
        """Where ranks save what they have covered, None where they do not measure."""
        return None if self._folder is None else str(self._folder)

    def take_in(self) -> None:
        """Merge what ranks have saved so far into this process's data."""
        running = _running()
        if self._folder is None or running is None or os.getpid() != self._owner:
            return
        from coverage import CoverageData
        from coverage.exceptions import CoverageException

        ours = running.get_data()
        for file in sorted(self._folder.glob("data.*")):
            if file.name.endswith(("-journal", "-wal", "-shm")):
                continue  # SQLite's own
            # a rank that was killed while it wrote leaves a file that cannot be read
            with contextlib.suppress(CoverageException, OSError):
                theirs = CoverageData(basename=str(file))
                theirs.read()
                ours.update(theirs)
                theirs.close()

    def close(self) -> None:
        """Remove the files of ranks."""
        if self._folder is not None and os.getpid() == self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class RankCoverage:
    """The measurement in one rank process.

    Args:
        measure: what the controller says about its own.
    """

    def __init__(self, measure: Measure) -> None:
        from coverage import Coverage

        stop_inherited()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._contexts = measure.contexts
        self._kill = os.kill
        self._listen()
        self._coverage: Any = Coverage(config_file=f":data:{measure.config}")
        for name in ("_warn_no_data", "_warn_unimported_source", "_warn_preimported_source"):
            setattr(self._coverage, name, False)
        self._save_before(os, "_exit")
        self._save_before(os, "abort")
        self._save_before(os, "kill", when=lambda pid, *_: pid in (0, os.getpid()))
        self._save_before(signal, "raise_signal")
        self._coverage.start()

    def save(self) -> None:
        """Write what was covered so far."""
        with self._lock:
            for _ in range(MOST_TRIES):
                with contextlib.suppress(RuntimeError):  # changed while it was copied
                    self._coverage.save()
                    break
            # an open database would look like a file that the test left open
            self._coverage.get_data().close()

    def enter(self, context: str) -> None:
        """Count lines from now on to a context, where the controller does that too."""
        if self._contexts:
            self._coverage.switch_context(context)

    def _save_before(
        self, module: Any, name: str, *, when: Callable[..., bool] = lambda *_: True
    ) -> None:
        """Have a function that may end this process save first."""
        original = getattr(module, name)

        def saving(*args: Any) -> Any:
            if when(*args):
                with contextlib.suppress(Exception):
                    self.save()
            return original(*args)

        setattr(module, name, saving)

    def _listen(self) -> None:
        """Save when told to end, also while the main thread is blocked in a collective.

        Python runs a handler between two lines of the main thread, so one that sits in gloo
        never would. But the signal's number is written to the wake-up descriptor at once.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.signal(signal.SIGTERM, self._take_signal)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(
            target=self._wait, args=(reading,), name="pytest-ranks-coverage", daemon=True
        ).start()
        # Until it has forgotten, a child told to end would write to our descriptor.
        os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=self._forget)

    def _wait(self, reading: int) -> None:
        while signal.SIGTERM not in os.read(reading, 64):
            pass
        self._end()

    def _end(self) -> None:
        """Save, then end as this signal ends a process."""
        with contextlib.suppress(Exception):
            self.save()
        # Python lets only the main thread put the default back, and that may be blocked
        ctypes.CDLL(None).signal(int(signal.SIGTERM), 0)
        self._kill(os.getpid(), signal.SIGTERM)

    def _take_signal(self, *_: object) -> None:
        """Take the signal in the main thread, unless that is saving: then the other one ends it."""
        if not self._lock.locked():
            self._end()

    def _forget(self) -> None:
        """Be an ordinary process: this is a child that the test forked."""
        self._lock = threading.Lock()
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == self._take_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _release()


_active: list[RankCoverage] = []  # none, or the one of this rank process


def start(measure: Measure | None) -> None:
    """Measure this rank process from now on, if its controller measures."""
    if measure is not None:
        _active[:] = [RankCoverage(measure)]


def save() -> None:
    """Write what was covered so far, in a rank that measures."""
    for one in _active:
        one.save()


def enter(context: str) -> None:
    """Count lines from now on to a context, in a rank that measures contexts."""
    for one in _active:
        one.enter(context)


def stop_inherited() -> None:
    """Stop what a fork has inherited: its data are the parent's, who saves them."""
    for _ in range(10):  # coverage may run inside of coverage
        running = _running()
        if running is None:
            return
        running._auto_save = False
        running.stop()


def _running() -> Any:
    """Return the coverage measurement that runs in this process, None where none does."""
    module = sys.modules.get("coverage")
    return module.Coverage.current() if module is not None else None


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
