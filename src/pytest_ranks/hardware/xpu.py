"""Intel GPUs, through xpu-smi, or the kernel's render nodes together with the Level Zero driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.hardware.found import Accelerator, Device, State, counted
from pytest_ranks.hardware.visible import select_xpus

if TYPE_CHECKING:
    from pytest_ranks.hardware.machine import Machine

INTEL_VENDOR = "0x8086"
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
# The user-space driver: without it a laptop's display adapter is no torch device
# (intel/compute-runtime).
LEVEL_ZERO_DRIVER = "libze_intel_gpu.so"


def probe_xpu(machine: Machine) -> Accelerator:
    """Return the Intel GPUs that a process started now could use."""
    devices, how = _ask_xpu_smi(machine)
    has_driver = bool(devices) or any(
        name.startswith(LEVEL_ZERO_DRIVER)
        for folder in LIBRARY_FOLDERS
        for name in machine.names(folder)
    )
    if not devices:
        devices = _render_nodes(machine)
        how = f"sysfs: {counted(len(devices), 'Intel device')}; {how}"
    if not has_driver:
        state = State.WITHOUT_SOFTWARE if devices else State.ABSENT
        how = f"{how}; {LEVEL_ZERO_DRIVER}: absent"
        return Accelerator(kind="xpu", state=state, how=how, present=len(devices))
    if not devices:
        return Accelerator(kind="xpu", state=State.WITHOUT_DEVICE, how=how)
    mask = machine.environ.get("ZE_AFFINITY_MASK")
    if mask is not None:
        how = f"{how}; ZE_AFFINITY_MASK={mask!r}"
    visible = select_xpus(devices, mask)
    return Accelerator(
        kind="xpu", state=State.USABLE, how=how, devices=visible, present=len(devices)
    )


def _ask_xpu_smi(machine: Machine) -> tuple[list[Device], str]:
    """Ask Intel's management tool (XPU System Management Interface, `discovery -j`)."""
    program = machine.find_program("xpu-smi")
    if program is None:
        return [], "xpu-smi: absent"
    import json

    try:
        listed = json.loads(machine.run(program, "discovery", "-j"))["device_list"]
        devices = [
            Device(index=index, name=str(entry["device_name"]), uuid=str(entry.get("uuid", "")))
            for index, entry in enumerate(listed)
        ]
    except OSError as error:
        return [], str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return [], "xpu-smi: unreadable answer"
    return devices, f"xpu-smi: {counted(len(devices), 'device')}"


def _render_nodes(machine: Machine) -> list[Device]:
    """List the render nodes of Intel devices."""
    minors = [
        minor
        for minor in machine.numbered("/sys/class/drm", "renderD")
        if machine.read(f"/sys/class/drm/renderD{minor}/device/vendor") == INTEL_VENDOR
        and machine.exists(f"/dev/dri/renderD{minor}")
    ]
    return [Device(index=index) for index in range(len(minors))]
