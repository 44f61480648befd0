"""The kernel's traffic control on a cable between nodes that are network namespaces."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pytest_ranks.errors import BadInputError, UnavailableError

# Bytes that pass at once before the rate is held; a packet of the largest size has to fit in.
BURST = 1 << 16
# Seconds of traffic that may wait; what comes beyond is dropped, and sent again by TCP.
QUEUE_SECONDS = 1
NAMED = "/run/netns"  # where ip-netns(8) keeps the namespaces that it names


class ShapedInterface:
    """A network interface that sends slowly, until it is restored.

    Args:
        name: of the interface, in the network namespace of this process.

    Raises:
        BadInputError: this process uses the machine's own network.
        UnavailableError: there is no `tc` here.
    """

    def __init__(self, name: str) -> None:
        __tracebackhide__ = True
        if not has_own_network():
            raise BadInputError(
                f"faults.slow_network(interface={name!r}): found ranks in the network of this "
                "machine, expected a network namespace of their own: an interface is slow for "
                "all who use it. Without interface= only the collectives of this test are."
            )
        if shutil.which("tc") is None:
            raise UnavailableError(
                f"faults.slow_network(interface={name!r}): needs the command tc (iproute2), found "
                "none."
            )
        self._name = name

    def shape(self, *, bandwidth: float | None, latency: float) -> None:
        """Send no faster than so many bytes a second, each packet so many seconds late.

        Raises:
            UnavailableError: the kernel refuses; the text is what `tc` says.
        """
        __tracebackhide__ = True
        rate = None if bandwidth is None else f"{max(1, round(bandwidth * 8))}bit"
        if latency:
            given = () if rate is None else ("rate", rate)
            self._run("replace", "netem", "delay", f"{round(latency * 1e6)}us", *given)
        elif rate is not None:
            rest = ("burst", str(BURST), "latency", f"{QUEUE_SECONDS}s")
            self._run("replace", "tbf", "rate", rate, *rest)

    def restore(self) -> None:
        """Send as fast as before."""
        self._run("del")

    def _run(self, verb: str, *discipline: str) -> None:
        command = ("tc", "qdisc", verb, "dev", self._name, "root", *discipline)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        __tracebackhide__ = True
        if done.returncode != 0:
            raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")


def has_own_network() -> bool:
    """Return whether this process is in a network namespace that was made beside the machine's.

    One that `ip netns add` made has a name; init's namespace, which tells for others, cannot be
    read by everybody.
    """
    own, init = _identity(Path("/proc/self/ns/net")), _identity(Path("/proc/1/ns/net"))
    if init is not None and own != init:
        return True
    return any(_identity(named) == own for named in Path(NAMED).glob("*"))


def _identity(namespace: Path) -> tuple[int, int] | None:
    try:
        found = namespace.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
