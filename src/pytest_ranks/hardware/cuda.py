"""NVIDIA GPUs, through NVML or nvidia-smi, then the PCI bus. No CUDA context is created."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.hardware.found import Accelerator, Device, State, counted
from pytest_ranks.hardware.visible import count_mig_instances, select_gpus

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_ranks.hardware.machine import Machine

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"
# WSL keeps the driver's tools outside PATH (NVIDIA, "CUDA on WSL User Guide").
NVIDIA_FOLDERS = ("/usr/lib/wsl/lib", "/usr/local/nvidia/bin")
MIB = 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a tool of the driver said: its devices, or why it has none."""

    how: str
    installed: bool
    devices: tuple[Device, ...] = ()


def probe_cuda(machine: Machine) -> Accelerator:
    """Return the NVIDIA GPUs that a process started now could use."""
    answers = []
    for ask in (_ask_nvml, _ask_nvidia_smi):
        answer = ask(machine)
        if answer.devices:
            return _usable(machine, answer)
        answers.append(answer)
    on_bus = machine.pci_devices(NVIDIA_VENDOR, DISPLAY_CLASS)
    how = "; ".join(answer.how for answer in answers)
    if on_bus:
        how = f"PCI: {counted(on_bus, 'NVIDIA device')}; {how}"
        return Accelerator(kind="cuda", state=State.WITHOUT_SOFTWARE, how=how, present=on_bus)
    installed = any(answer.installed for answer in answers)
    return Accelerator(
        kind="cuda", state=State.WITHOUT_DEVICE if installed else State.ABSENT, how=how
    )


def _usable(machine: Machine, answer: _Answer) -> Accelerator:
    """Apply CUDA_VISIBLE_DEVICES to what the driver listed."""
    text = machine.environ.get("CUDA_VISIBLE_DEVICES")
    devices: tuple[Device, ...]
    if count_mig_instances(text):
        devices = (Device(index=0, name="MIG instance", uuid=str(text).split(",")[0]),)
    else:
        devices = select_gpus(answer.devices, text)
    how = answer.how if text is None else f"{answer.how}; CUDA_VISIBLE_DEVICES={text!r}"
    return Accelerator(
        kind="cuda", state=State.USABLE, how=how, devices=devices, present=len(answer.devices)
    )


def _listed(tool: str, devices: list[Device], driver: str) -> _Answer:
    """Say in words what a tool listed."""
    known = f", driver {driver}" if driver and devices else ""
    return _Answer(
        how=f"{tool}: {counted(len(devices), 'device')}{known}",
        installed=True,
        devices=tuple(devices),
    )


def _ask_nvml(machine: Machine) -> _Answer:
    """Ask the driver's management library; it makes no CUDA context (NVML API Reference)."""
    if machine.root is not None:
        return _Answer(how="NVML: not asked", installed=False)
    import ctypes

    try:
        with opened_nvml() as nvml:
            count = ctypes.c_uint()
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            version = ctypes.create_string_buffer(80)
            nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(80))
            devices = [_nvml_device(nvml, index) for index in range(count.value)]
    except NvmlError as error:
        return _Answer(how=f"NVML: {error}", installed=error.installed)
    return _listed("NVML", devices, version.value.decode())


class NvmlError(Exception):
    """The driver's management library cannot be used.

    Attributes:
        installed: whether the library is there.
    """

    def __init__(self, text: str, *, installed: bool) -> None:
        super().__init__(text)
        self.installed = installed


@contextlib.contextmanager
def opened_nvml() -> Generator[Any]:
    """Open the driver's management library and close it again.

    Raises:
        NvmlError: it is absent, or its driver does not answer.
    """
    import ctypes

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise NvmlError("library absent", installed=False) from None
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    status = nvml.nvmlInit_v2()
    if status != 0:
        raise NvmlError(nvml.nvmlErrorString(status).decode(), installed=True)
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _nvml_device(nvml: Any, index: int) -> Device:
    """Read one device; what the driver does not tell stays unknown."""
    import ctypes

    class Memory(ctypes.Structure):
        """Bytes, as nvmlMemory_t lays them out."""

        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    handle, memory = ctypes.c_void_p(), Memory()
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return Device(index=index)
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
    nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(96))
    knows_memory = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    knows_capability = (
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        == 0
    )
    return Device(
        index=index,
        name=name.value.decode(),
        uuid=uuid.value.decode(),
        memory=memory.total if knows_memory else None,
        capability=(major.value, minor.value) if knows_capability else None,
    )


def _ask_nvidia_smi(machine: Machine) -> _Answer:
    """Ask the driver's command line tool."""
    program = machine.find_program("nvidia-smi", *NVIDIA_FOLDERS)
    if program is None:
        return _Answer(how="nvidia-smi: absent", installed=False)
    # Drivers before 510 do not know compute_cap and refuse the whole query.
    for last in ("compute_cap", "pci.bus_id"):
        query = f"--query-gpu=index,uuid,memory.total,driver_version,name,{last}"
        try:
            text = machine.run(program, query, "--format=csv,noheader,nounits")
        except OSError as error:
            why = str(error)
            continue
        rows = [_smi_row(line) for line in text.splitlines() if line.strip()]
        found = [row for row in rows if row is not None]
        if len(found) != len(rows):
            return _Answer(how=f"nvidia-smi: unreadable answer {text[:60]!r}", installed=True)
        return _listed("nvidia-smi", [device for device, _ in found], found[0][1] if found else "")
    return _Answer(how=why, installed=True)


def _smi_row(line: str) -> tuple[Device, str] | None:
    """Read one line of the CSV answer: the device and the driver's version."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) < 6 or not fields[0].isdecimal():
        return None
    index, uuid, memory, driver = fields[:4]
    capability = re.fullmatch(r"(\d+)\.(\d+)", fields[-1])
    device = Device(
        index=int(index),
        name=", ".join(fields[4:-1]),
        uuid=uuid,
        memory=int(memory) * MIB if memory.isdecimal() else None,
        capability=(int(capability[1]), int(capability[2])) if capability else None,
    )
    return device, driver
