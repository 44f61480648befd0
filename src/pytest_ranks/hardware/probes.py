"""What this machine has: for each kind of accelerator its state, and how the probe knows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_ranks.hardware.cuda import probe_cuda
from pytest_ranks.hardware.found import Accelerator, Device, Hardware, State, counted
from pytest_ranks.hardware.machine import Machine
from pytest_ranks.hardware.neuron import probe_neuron
from pytest_ranks.hardware.packages import has_module
from pytest_ranks.hardware.rocm import probe_rocm
from pytest_ranks.hardware.xpu import probe_xpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["Accelerator", "Device", "Hardware", "State", "probe"]


def probe(
    root: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    installed: Callable[[str], bool] | None = None,
) -> Hardware:
    """Look at the machine; no device is initialised and no framework imported.

    Args:
        root: a folder laid out like a machine's `/`, for tests; None means this machine.
        environ: the environment whose visibility variables count; None means this process's.
        installed: tells whether a module is installed; None asks the import system.

    Returns:
        What was found, for each kind of accelerator.
    """
    machine = Machine(root, environ=environ)
    return Hardware(
        cuda=probe_cuda(machine),
        rocm=probe_rocm(machine),
        xpu=probe_xpu(machine),
        neuron=probe_neuron(machine, installed=installed or has_module),
        cpu=_probe_cpu(machine),
    )


def _probe_cpu(machine: Machine) -> Accelerator:
    """Count the processors that this process may run on."""
    if machine.root is None:
        indices, how = sorted(os.sched_getaffinity(0)), "sched_getaffinity"
    else:
        indices, how = machine.numbered("/sys/devices/system/cpu", "cpu"), "sysfs"
    how = f"{how}: {counted(len(indices), 'processor')}"
    devices = tuple(Device(index=index) for index in indices)
    state = State.USABLE if devices else State.ABSENT
    return Accelerator(kind="cpu", state=state, how=how, devices=devices, present=len(devices))
