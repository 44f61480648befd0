"""Where the probes look: files and programs of this machine, or of a folder laid out like one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Without persistence mode nvidia-smi takes seconds on an eight-GPU host; with a wedged driver it
# never answers.
PROGRAM_SECONDS = 15.0
PROGRAM_FOLDERS = ("/usr/bin", "/usr/local/bin", "/bin")


class Machine:
    """Read-only access to a machine's files, programs and environment.

    Args:
        root: a folder that stands for `/`; None means this machine itself.
        environ: the environment variables that the probes honour; None means this process's.
    """

    def __init__(
        self, root: Path | None = None, *, environ: Mapping[str, str] | None = None
    ) -> None:
        self.root = root
        self.environ = os.environ if environ is None else environ

    def path(self, name: str) -> Path:
        """Return where an absolute path lies on this machine."""
        return Path(name) if self.root is None else self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Return a file's stripped text, or None where it cannot be read."""
        try:
            return self.path(name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def read_int(self, name: str) -> int | None:
        """Return a file's number, or None where there is none."""
        text = self.read(name)
        return int(text) if text is not None and text.isdecimal() else None

    def names(self, folder: str) -> list[str]:
        """Return the sorted names in a folder; none where there is no such folder."""
        try:
            return sorted(entry.name for entry in self.path(folder).iterdir())
        except OSError:
            return []

    def numbered(self, folder: str, prefix: str) -> list[int]:
        """Return the numbers N for which the folder has an entry named `<prefix>N`, in order."""
        endings = [
            name.removeprefix(prefix) for name in self.names(folder) if name.startswith(prefix)
        ]
        return sorted(int(ending) for ending in endings if ending.isdecimal())

    def exists(self, name: str) -> bool:
        """Return whether a path exists."""
        return self.path(name).exists()

    def pci_devices(self, vendor: str, *classes: str) -> int:
        """Count PCI devices of a vendor ("0x10de") whose class begins with one of those given."""
        folder = "/sys/bus/pci/devices"
        return sum(
            self.read(f"{folder}/{name}/vendor") == vendor
            and (self.read(f"{folder}/{name}/class") or "").startswith(classes)
            for name in self.names(folder)
        )

    def find_program(self, name: str, *folders: str) -> Path | None:
        """Return an executable by name: from PATH, the usual folders, then those given."""
        searched = [self.path(folder) for folder in (*PROGRAM_FOLDERS, *folders)]
        if self.root is None:
            on_path = self.environ.get("PATH", "").split(os.pathsep)
            searched = [*(Path(folder) for folder in on_path if folder), *searched]
        for folder in searched:
            program = folder / name
            if program.is_file() and os.access(program, os.X_OK):
                return program
        return None

    def run(self, program: Path, *arguments: str) -> str:
        """Return what a program prints.

        Raises:
            OSError: it cannot be started, fails, or does not answer in time; the text says which.
        """
        import signal
        import subprocess

        name = program.name
        with subprocess.Popen(
            [str(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self.environ),
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=PROGRAM_SECONDS)
            except subprocess.TimeoutExpired:
                # Its children hold the pipe too: the whole session has to go.
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError(f"{name}: no answer in {PROGRAM_SECONDS:g} s") from None
        text = output.decode("utf-8", errors="replace").strip()
        if process.returncode != 0:
            line = text.splitlines()[0] if text else "no output"
            raise OSError(f"{name}: exit status {process.returncode}, {line!r}")
        return text
