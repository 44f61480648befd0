"""Deaths for memory: read from control groups of both versions, and from a real one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_ranks.launch.forensics.memory import MemoryGroup

V1_MOUNT = (
    "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def fake(folder: Path, *, group: str, mount: str, files: dict[str, str]) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(group + "\n")
    (folder / "proc/self/mountinfo").write_text(
        "22 1 0:21 / /proc rw shared:5 - proc proc rw\n" + mount + "\n"
    )
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def version_1(tmp_path):
    return fake(
        tmp_path,
        group="5:cpu,cpuacct:/elsewhere\n4:memory:/jobs/7",
        mount=V1_MOUNT.format(root="/"),
        files={
            "sys/fs/cgroup/memory/jobs/7/memory.oom_control": (
                "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"
            ),
            "sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": str(64 << 20),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(512 << 20),
            "sys/fs/cgroup/cpu/memory.oom_control": "oom_kill 77\n",
        },
    )


@pytest.fixture
def version_2(tmp_path):
    return fake(
        tmp_path,
        group="0::/user.slice/job.scope",
        mount=V2_MOUNT.format(root="/"),
        files={
            "sys/fs/cgroup/user.slice/job.scope/memory.events": (
                "low 0\nhigh 0\nmax 9\noom 1\noom_kill 0\noom_group_kill 0\n"
            ),
            "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
        },
    )


def test_a_kill_shows_in_the_counter_of_version_1(version_1):
    group = MemoryGroup(version_1)
    assert group.kills() == 2
    counter = version_1 / "sys/fs/cgroup/memory/jobs/7/memory.oom_control"
    counter.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert group.explain(-signal.SIGKILL, 2) == (
        "was killed by the kernel for memory (oom_kill 2 -> 3, limit 64 MiB)"
    )


def test_a_kill_shows_in_the_events_of_version_2(version_2):
    group = MemoryGroup(version_2)
    assert group.kills() == 0
    events = version_2 / "sys/fs/cgroup/user.slice/job.scope/memory.events"
    events.write_text("low 0\noom 2\noom_kill 1\n")
    assert group.explain(-signal.SIGKILL, 0) == (
        "was killed by the kernel for memory (oom_kill 0 -> 1, no limit: the machine is out of "
        "memory)"
    )


def test_the_lowest_limit_of_version_2_counts(version_2):
    for name, limit in (("job.scope", 96 << 20), ("", 32 << 20)):
        (version_2 / "sys/fs/cgroup/user.slice" / name / "memory.max").write_text(f"{limit}\n")
    assert MemoryGroup(version_2).limit() == 32 << 20


def test_the_largest_number_of_pages_is_no_limit(version_1):
    for folder in ("memory/jobs", "memory"):
        (version_1 / "sys/fs/cgroup" / folder / "memory.limit_in_bytes").unlink()
    assert MemoryGroup(version_1).limit() is None


def test_a_container_sees_its_group_at_the_mount(tmp_path):
    root = fake(
        tmp_path,
        group="0::/docker/abc/inner",
        mount=V2_MOUNT.format(root="/docker/abc"),
        files={"sys/fs/cgroup/inner/memory.events": "oom_kill 5\n"},
    )
    assert MemoryGroup(root).kills() == 5


def test_a_group_that_is_not_visible_falls_back_to_the_mount(tmp_path):
    root = fake(
        tmp_path,
        group="4:cpu,memory:/outside/of/this",
        mount=V1_MOUNT.format(root="/"),
        files={"sys/fs/cgroup/memory/memory.oom_control": "oom_kill 1\n"},
    )
    assert MemoryGroup(root).kills() == 1


def test_a_kill_that_was_not_for_memory_says_what_it_may_be(version_2):
    assert MemoryGroup(version_2).explain(-signal.SIGKILL, 0) == (
        "was killed by SIGKILL, and neither by us nor by the kernel for memory (oom_kill stays "
        "0): the test, a process that it started, or something else on this machine sent it"
    )


@pytest.mark.parametrize("status", [-signal.SIGSEGV, 0, 1, None])
def test_other_deaths_are_left_alone(version_2, status):
    assert MemoryGroup(version_2).explain(status, 0) == ""


def test_without_control_groups_it_says_that_it_cannot_tell(tmp_path):
    group = MemoryGroup(tmp_path)
    assert group.kills() is None
    assert group.explain(-signal.SIGKILL, None).startswith(
        "was killed by SIGKILL, and not by us: by the kernel for memory, by the test, or by "
        "something else on this machine; which one cannot be told (FileNotFoundError: "
    )


ENTER = """
import os
with open(os.environ["MEMORY_GROUP"] + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
"""
LIMIT = 1024 << 20  # torch, pytest and three processes take about half of it
EATER = """
import mmap
import pytest, torch
import torch.distributed as dist

@pytest.mark.ranks(2, timeout=120)
def test_eats(rank):
    dist.barrier()
    if rank.index == 1:
        eaten = []
        while True:
            eaten.append(mmap.mmap(-1, 32 << 20))
            eaten[-1].write(b"x" * (32 << 20))
    dist.barrier()

@pytest.mark.ranks(2)
def test_after(rank):
    dist.barrier()
"""


@contextlib.contextmanager
def limited(name: str) -> Iterator[Path]:
    """Make a control group with a memory limit; skip with the reason where that is refused."""
    candidates = (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    )
    reasons = []
    for parent, limit in candidates:
        folder = parent / name
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            (folder / limit).write_text(str(LIMIT))
        except OSError as error:
            reasons.append(str(error))
            folder.rmdir()
            continue
        try:
            yield folder
        finally:
            for _ in range(200):  # the last processes of the group are being reaped
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.05)
        return
    pytest.skip(f"no memory control group can be made here: {'; '.join(reasons)}")


def test_a_rank_that_the_kernel_kills_for_memory_is_recognised(run_session):
    pytest.importorskip("torch")
    with limited(f"pytest-ranks-test-{os.getpid()}") as folder:
        session = run_session(
            {"test_memory.py": EATER, "enter.py": ENTER},
            "-penter",
            "-pno:randomly",
            env={"MEMORY_GROUP": str(folder)},
        )
    row = session.call("test_eats")
    first, second, *_ = row.text.splitlines()
    assert first.startswith("rank 1 of 2 failed first"), session.output
    assert first.endswith("died of SIGKILL without a report")
    assert second == (
        "rank 1 was killed by the kernel for memory (oom_kill 0 -> 1, limit 1024 MiB)"
    )
    assert session.call("test_after").outcome == "passed"
