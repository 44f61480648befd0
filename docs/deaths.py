"""Let ranks die and print what the user sees: `python docs/deaths.py` writes the page's examples.

The page `explanation/how_a_rank_fails.md` holds real output between `<!-- death: NAME -->` and its
end; this script runs each scene again and puts what it printed there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAGE = Path(__file__).parent / "explanation" / "how_a_rank_fails.md"
HEAD = """\
import os, signal, time
import pytest, torch
import torch.distributed as dist


"""
SCENES = {
    "killed": """\
@pytest.mark.ranks(2)
def test_train(rank):
    if rank.index == 1:
        print("rank 1: step 3")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
""",
    "segfault": """\
@pytest.mark.ranks(2)
def test_train(rank):
    if rank.index == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(torch.ones(1))
""",
    "exit": """\
@pytest.mark.ranks(2)
def test_train(rank):
    if rank.index == 1:
        os._exit(0)  # a library that believes it is done
""",
    "setup": """\
@pytest.fixture
def model(rank):
    if rank.index == 1:
        os.abort()
    return torch.nn.Linear(2, 2)


@pytest.mark.ranks(2)
def test_train(model):
    dist.all_reduce(torch.ones(1))
""",
    "teardown": """\
@pytest.fixture
def model(rank):
    yield
    if rank.index == 0:
        os._exit(3)


@pytest.mark.ranks(2)
def test_train(model):
    dist.all_reduce(torch.ones(1))
""",
    "hang": """\
@pytest.mark.ranks(2, timeout=2)
def test_train(rank):
    if rank.index == 1:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))
""",
    "zygote": """\
@pytest.mark.ranks(2)
def test_train(rank):
    if rank.index == 0:
        os.kill(os.getppid(), signal.SIGKILL)  # what ranks are forked from
    time.sleep(1000)
""",
    "interrupt": """\
@pytest.mark.ranks(2)
def test_train(rank):
    rank.barrier()
    open(f"running{rank.index}", "w").close()
    time.sleep(1000)
""",
    "terminated": """\
@pytest.mark.ranks(2)
def test_train(rank):
    rank.barrier()
    open(f"running{rank.index}", "w").close()
    time.sleep(1000)
""",
}
SIGNALS = {"interrupt": signal.SIGINT, "terminated": signal.SIGTERM}
# Beside what is measured or numbered anew in each run: the name of a thread, a port, a time.
_VARYING = (
    # said where other plugins have started threads before the collection
    (re.compile(r"note: the ranks collected in a process of their own.*\n"), ""),
    (re.compile(r"interrupts\.py:\d+:"), "interrupts.py:LINE:"),
    (re.compile(r"0x[0-9a-f]{8,}"), "0x..."),
    (re.compile(r"\[127\.0\.0\.1\]:\d+"), "[127.0.0.1]:PORT"),
    (re.compile(r" in \d+\.\d+s( \(.*\))?"), ""),
    (re.compile(r"/\S*/(?=(?:site-packages|pytest_ranks|test_train\.py|third_party))"), ".../"),
    (re.compile(r"[=_!-]{6,}"), "====="),
)


def main() -> None:
    """Write the page's examples afresh."""
    text = PAGE.read_text(encoding="utf-8")
    for name in SCENES:
        start, end = f"<!-- death: {name} -->\n", f"<!-- end: {name} -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        assert tail, f"{PAGE} has no place for {name!r}"
        text = f"{head}{start}{block(name)}{end}{tail}"
    PAGE.write_text(text, encoding="utf-8")


def block(name: str) -> str:
    """Return a scene and what it printed, as the page shows it."""
    return f"```python\n{SCENES[name]}```\n\n```text\n{played(name)}\n```\n"


def played(name: str) -> str:
    """Run a scene and return what the user sees, without what differs from run to run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "test_train.py").write_text(HEAD + SCENES[name])
        (place / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        process = subprocess.Popen(
            [*command, "-p", "no:randomly", "test_train.py"],
            cwd=place,
            env={**kept, "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if name in SIGNALS:
            while not all((place / f"running{rank}").exists() for rank in range(2)):
                assert process.poll() is None, "the session ended before its ranks ran"
                time.sleep(0.02)
            process.send_signal(SIGNALS[name])
        output, _ = process.communicate(timeout=300)
    for pattern, instead in _VARYING:
        output = pattern.sub(instead, output)
    return f"{output.strip()}\n[exit status {process.returncode}]"


if __name__ == "__main__":
    main()
