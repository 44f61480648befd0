"""Devices for the ranks of one run: leased before it, shown to its ranks alone, given back clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.errors import UnavailableError
from pytest_ranks.hardware.assignment import leasable, visibility
from pytest_ranks.hardware.found import LABELS, Device, counted
from pytest_ranks.hardware.holders import Holder, find_holders, settle
from pytest_ranks.hardware.leases import Lease, Leases
from pytest_ranks.hardware.machine import Machine
from pytest_ranks.hardware.requirements import BACKEND_DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_ranks.hardware.found import Accelerator, Hardware

# Another worker's test has its own deadline of a minute; ten of them may come first.
LEASE_SECONDS = 600.0
# The name of each vendor's devices in torch; a Neuron rank sees its own core alone.
TORCH_NAMES = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu", "neuron": "neuron"}


class DevicesUnavailable(UnavailableError):
    """There are too few devices, or others have leased them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSet:
    """The devices of one run, one for each rank.

    Attributes:
        kind: the vendor's stack.
        choices: the devices that the lease chose from.
        lease: what is ours until it is given back.
        before: who held memory of them before the run.
    """

    kind: str
    choices: tuple[Device, ...]
    lease: Lease
    before: tuple[Holder, ...]
    _environ: Mapping[str, str]

    def variables(self, rank: int) -> dict[str, str]:
        """Return the variables that show a rank these devices and hide all others."""
        return visibility(
            self.kind, self.choices, self.lease.devices, rank=rank, environ=self._environ
        )

    def torch_name(self, rank: int) -> str:
        """Return what torch calls the device of a rank: `cuda:1`."""
        return f"{TORCH_NAMES[self.kind]}:{0 if self.kind == 'neuron' else rank}"


class DeviceDesk:
    """Hands devices out to runs and takes them back.

    Args:
        hardware: returns what this machine has, looked at when the first device is asked for.
        machine: where to look for who holds memory.
        leases: where they are locked.
    """

    def __init__(
        self,
        hardware: Callable[[], Hardware],
        *,
        machine: Machine | None = None,
        leases: Leases | None = None,
    ) -> None:
        self._hardware = hardware
        self._machine = machine or Machine()
        self._leases = leases or Leases()

    def check_out(
        self, backend: str, count: int, *, owner: str, timeout: float = LEASE_SECONDS
    ) -> DeviceSet:
        """Lease a device for each rank, waiting until so many are free.

        Args:
            backend: the process group's, which says what kind of device it is.
            count: how many ranks.
            owner: who wants them, for others that wait.
            timeout: seconds to wait.

        Raises:
            DevicesUnavailable: there are too few, or they were not free in time.
        """
        environ = dict(self._machine.environ)
        accelerator = self._accelerator(backend)
        choices = leasable(accelerator, environ)
        if len(choices) < count:
            raise DevicesUnavailable(
                f"needs {counted(count, f'{LABELS[accelerator.kind]} device')}, found "
                f"{len(choices)} ({accelerator.how})"
            )
        try:
            lease = self._leases.acquire(
                accelerator.kind, choices, count, owner=owner, timeout=timeout
            )
        except UnavailableError as error:
            raise DevicesUnavailable(str(error)) from None
        return DeviceSet(
            kind=accelerator.kind,
            choices=choices,
            lease=lease,
            before=find_holders(accelerator.kind, lease.devices, self._machine),
            _environ=environ,
        )

    def check_in(self, devices: DeviceSet, *, timeout: float | None = None) -> str | None:
        """Give devices back once their memory is free; the ranks of the run have ended.

        Returns:
            A sentence that names who still holds memory, or None where nobody does.
        """
        try:
            return settle(
                devices.kind,
                devices.lease.devices,
                self._machine,
                before=devices.before,
                timeout=timeout,
            )
        finally:
            devices.lease.release()

    def _accelerator(self, backend: str) -> Accelerator:
        found = [getattr(self._hardware(), kind) for kind in BACKEND_DEVICES[backend]]
        best: Accelerator = max(found, key=lambda one: one.count)
        return best
