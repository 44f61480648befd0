"""Who holds memory of a device, and whether it is given back between tests."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.hardware.cuda import MIB, NVIDIA_FOLDERS, NvmlError, opened_nvml
from pytest_ranks.hardware.found import LABELS, Device
from pytest_ranks.hardware.rocm import NODES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.hardware.machine import Machine

# A driver tears a context down after its process has ended: tenths of a second on one GPU, more
# where many gigabytes were mapped.
SETTLE_SECONDS = 10.0
POLL_SECONDS = 0.1
NVML_ROOM = 256  # processes on one device that fit in the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds memory of a device.

    Attributes:
        device: the device's index.
        pid: the process.
        bytes: how much it holds, None where the driver does not tell.
        command: what it runs, "" where that cannot be read.
    """

    device: int
    pid: int
    bytes: int | None
    command: str = ""

    def __str__(self) -> str:
        """Return the holder in words."""
        size = f"{self.bytes / MIB:.0f} MiB" if self.bytes is not None else "memory"
        command = f" ({self.command})" if self.command else ""
        return f"process {self.pid}{command} holds {size} of device {self.device}"


def find_holders(kind: str, devices: Sequence[Device], machine: Machine) -> tuple[Holder, ...]:
    """Return the processes that hold memory of these devices; none where the driver tells none.

    Args:
        kind: the vendor's stack, as in `Accelerator.kind`.
        devices: the devices to look at.
        machine: where to look.
    """
    asks = {"cuda": _cuda_holders, "rocm": _rocm_holders, "neuron": _neuron_holders}
    ask = asks.get(kind)  # Intel's driver lists no other user's processes
    return () if ask is None else tuple(ask(devices, machine))


def settle(
    kind: str,
    devices: Sequence[Device],
    machine: Machine,
    *,
    before: Sequence[Holder],
    timeout: float | None = None,
) -> str | None:
    """Wait until only those hold memory of the devices who did before a test.

    Args:
        kind: the vendor's stack, as in `Accelerator.kind`.
        devices: the devices that the test had.
        machine: where to look.
        before: who held memory before the test; they are not the test's.
        timeout: seconds to wait, or None for `SETTLE_SECONDS`.

    Returns:
        A sentence that names who still holds memory, or None once nobody does.
    """
    known = {holder.pid for holder in before}
    timeout = SETTLE_SECONDS if timeout is None else timeout
    end = time.monotonic() + timeout
    while True:
        left = [one for one in find_holders(kind, devices, machine) if one.pid not in known]
        if not left:
            return None
        if time.monotonic() >= end:
            held = "; ".join(map(str, left))
            return f"{LABELS[kind]} memory was not given back within {timeout:g} s: {held}"
        time.sleep(POLL_SECONDS)


def _command(machine: Machine, pid: int) -> str:
    words = (machine.read(f"/proc/{pid}/cmdline") or "").split("\0")
    return " ".join(word for word in words if word)[:80]


def _cuda_holders(devices: Sequence[Device], machine: Machine) -> list[Holder]:
    if machine.root is None:
        with contextlib.suppress(NvmlError):
            return _nvml_holders(devices, machine)
    program = machine.find_program("nvidia-smi", *NVIDIA_FOLDERS)
    if program is None:
        return []
    try:
        text = machine.run(
            program,
            "--query-compute-apps=gpu_uuid,pid,used_memory",
            "--format=csv,noheader,nounits",
        )
    except OSError:
        return []
    by_uuid = {device.uuid: device.index for device in devices}
    found = []
    for line in text.splitlines():
        uuid, pid, used = [*(part.strip() for part in line.split(",")), "", ""][:3]
        if uuid in by_uuid and pid.isdecimal():
            found.append(
                Holder(
                    device=by_uuid[uuid],
                    pid=int(pid),
                    bytes=int(used) * MIB if used.isdecimal() else None,
                    command=_command(machine, int(pid)),
                )
            )
    return found


def _nvml_holders(devices: Sequence[Device], machine: Machine) -> list[Holder]:
    """Ask the management library (NVML API Reference, nvmlDeviceGetComputeRunningProcesses)."""
    import ctypes

    class Process(ctypes.Structure):
        """A process on a device, as nvmlProcessInfo_t lays it out since CUDA 11."""

        _fields_ = [
            ("pid", ctypes.c_uint),
            ("used", ctypes.c_ulonglong),
            ("gpu_instance", ctypes.c_uint),
            ("compute_instance", ctypes.c_uint),
        ]

    found = []
    with opened_nvml() as nvml:
        for device in devices:
            handle, count = ctypes.c_void_p(), ctypes.c_uint(NVML_ROOM)
            room = (Process * NVML_ROOM)()
            index = ctypes.c_uint(device.index)
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
                continue
            ask = nvml.nvmlDeviceGetComputeRunningProcesses_v3
            if ask(handle, ctypes.byref(count), room) != 0:
                continue
            found += [_of_nvml(one, device, machine) for one in room[: count.value]]
    return found


def _of_nvml(process: Any, device: Device, machine: Machine) -> Holder:
    unknown = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
    return Holder(
        device=device.index,
        pid=process.pid,
        bytes=None if process.used == unknown else process.used,
        command=_command(machine, process.pid),
    )


def _rocm_holders(devices: Sequence[Device], machine: Machine) -> list[Holder]:
    """Read the kernel's accounting (Linux, drivers/gpu/drm/amd/amdkfd/kfd_process.c)."""
    gpu_ids = [
        number
        for node in sorted((name for name in machine.names(NODES) if name.isdecimal()), key=int)
        if (number := machine.read_int(f"{NODES}/{node}/gpu_id"))
    ]  # a node of a CPU has gpu_id 0
    found = []
    for pid in machine.names("/sys/class/kfd/kfd/proc"):
        for device in devices:
            if not pid.isdecimal() or device.index >= len(gpu_ids):
                continue
            path = f"/sys/class/kfd/kfd/proc/{pid}/vram_{gpu_ids[device.index]}"
            if used := machine.read_int(path):
                command = _command(machine, int(pid))
                found.append(Holder(device=device.index, pid=int(pid), bytes=used, command=command))
    return found


def _neuron_holders(devices: Sequence[Device], machine: Machine) -> list[Holder]:
    """Ask the vendor's tool, which tells processes of a device but not their memory."""
    program = machine.find_program("neuron-ls", "/opt/aws/neuron/bin")
    if program is None:
        return []
    try:
        entries = json.loads(machine.run(program, "--json-output"))
    except (OSError, ValueError):
        return []
    wanted = {device.index for device in devices}
    found = {}
    for entry in entries if isinstance(entries, list) else ():
        cores = wanted & set(entry.get("neuroncore_ids") or ())
        for process in entry.get("neuron_processes") or ():
            command = str(process.get("command", ""))
            # the tool lists itself
            if cores and isinstance(process.get("pid"), int) and "neuron-ls" not in command:
                found[process["pid"]] = Holder(
                    device=min(cores), pid=process["pid"], bytes=None, command=command[:80]
                )
    return list(found.values())
