"""The parent of a zygote: it ends what is below it, however zygote or controller ended."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from pytest_ranks.launch.channel import ChannelClosed
from pytest_ranks.launch.processes import (
    become_subreaper,
    children,
    descendants,
    die_with_parent,
    has_ended,
    is_janitor,
    send_signal,
)
from pytest_ranks.launch.wire import Born, Ended

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_ranks.launch.channel import Channel

GUARDIAN_SECONDS = 2.0  # what a zygote has to see for itself that its controller is gone
# What janitors have to clean up: torch's waits 2 seconds for another client before it does.
JANITOR_SECONDS = 6.0


def start_guardian(channel: Channel, controller: int, *, litter: str | None = None) -> None:
    """Go on in a child of this process, which stays as its guardian.

    A zygote that hangs in an import cannot see for itself that its controller is gone, and one
    that is killed leaves behind what its ranks have put into sessions of their own. The guardian
    is the nearest subreaper above the zygote, so that all of it becomes its own.

    Args:
        channel: to the controller.
        controller: pidfd of the controller.
        litter: folder that the controller removes, and the guardian where it cannot any more.
    """
    become_subreaper()
    guardian = os.getpid()
    pid = os.fork()
    if pid != 0:
        _guard(channel, controller, pid, litter)
    die_with_parent(guardian)
    pidfd = os.pidfd_open(os.getpid())
    channel.send(Born(pid=os.getpid()), (pidfd,))
    os.close(pidfd)


def _sweep(controller: int, litter: str) -> None:
    """Remove a folder once the controller has ended, which it may do before it does so itself."""
    # the controller waits for the guardian's end, so that a child waits for the controller's
    if not has_ended(controller) and os.fork() != 0:
        return
    poll = select.poll()
    poll.register(controller, select.POLLIN)
    poll.poll()
    shutil.rmtree(litter, ignore_errors=True)


class _Asked(Exception):
    """The controller wants the end now."""


def _guard(channel: Channel, controller: int, zygote: int, litter: str | None) -> NoReturn:
    try:
        pidfd = os.pidfd_open(zygote)
        signal.signal(signal.SIGTERM, _raise_asked)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):  # whoever reads the controller's output must not wait for us
            os.dup2(nothing, number)
        with contextlib.suppress(_Asked):
            poll = select.poll()
            for fd in (controller, pidfd):
                poll.register(fd, select.POLLIN)
            poll.poll()
            has_ended(pidfd, timeout=GUARDIAN_SECONDS)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        send_signal(pidfd, signal.SIGKILL)
        has_ended(pidfd, timeout=GUARDIAN_SECONDS)
        status = os.waitstatus_to_exitcode(os.waitpid(zygote, 0)[1])
        with contextlib.suppress(ChannelClosed):
            channel.send(Ended(status=status))
        channel.close()  # only now does the controller see the end
        end_everything_below()
        if litter is not None:
            _sweep(controller, litter)
    finally:
        os._exit(0)


def _raise_asked(*_: object) -> NoReturn:
    raise _Asked


def end_everything_below(*, spared: Collection[int] = (), is_patient: bool = True) -> None:
    """Kill and reap all descendants of this process, which is a subreaper.

    What a killed process had started becomes a child of this one, so it looks until there is
    none. Janitors end by themselves once those are gone for whom they work.

    Args:
        spared: children that stay, with all below them.
        is_patient: wait for janitors, and kill those that take too long.
    """
    limit = time.monotonic() + JANITOR_SECONDS
    while found := [pid for pid in children(os.getpid()) if pid not in spared]:
        left = [pid for pid in found if not _is_reaped(pid)]
        now = time.monotonic()
        if not is_patient and all(map(is_janitor, left)):
            return
        if now > limit + GUARDIAN_SECONDS:  # what the kernel holds
            return
        for pid in left:
            for one in (*descendants(pid), pid):
                if now > limit or not is_janitor(one):
                    with contextlib.suppress(OSError):
                        os.kill(one, signal.SIGKILL)
        time.sleep(0.002)


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
