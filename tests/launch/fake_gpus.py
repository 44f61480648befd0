"""An nvidia-smi that tells of four GPUs, and of whoever holds memory of them."""

from __future__ import annotations

from pathlib import Path

_SCRIPT = """\
#!/bin/sh
case "$1" in
    *compute-apps*) cat {folder}/holders ;;
    *) cat {folder}/gpus ;;
esac
"""


def lay_out_gpus(folder: Path, *, program: Path) -> Path:
    """Write the program, and what it reads into a folder.

    Returns:
        The file that says who holds memory, a line `uuid, pid, MiB` each; empty at first.
    """
    rows = [f"{n}, GPU-{n}{n}, 81559, 570.86.15, NVIDIA H100, 9.0\n" for n in range(4)]
    (folder / "gpus").write_text("".join(rows))
    holders = folder / "holders"
    holders.write_text("")
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(_SCRIPT.format(folder=folder))
    program.chmod(0o755)
    return holders
