"""AMD GPUs, through the kernel's compute topology, then rocm-smi, then the PCI bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.hardware.found import Accelerator, Device, State, counted
from pytest_ranks.hardware.visible import select_gpus

if TYPE_CHECKING:
    from pytest_ranks.hardware.machine import Machine

AMD_VENDOR = "0x1002"
# Display controllers and processing accelerators (PCI Code and ID Assignment Specification).
GPU_CLASSES = ("0x03", "0x12")
NODES = "/sys/class/kfd/kfd/topology/nodes"
# Public and private frame buffer, that is video memory (Linux, drivers/gpu/drm/amd/amdkfd/
# kfd_topology.h).
FRAME_BUFFER_HEAPS = (1, 2)


def probe_rocm(machine: Machine) -> Accelerator:
    """Return the AMD GPUs that a process started now could use."""
    devices, how = _read_topology(machine)
    if not devices:
        devices, how = _ask_rocm_smi(machine, how)
    if devices:
        visible, hidden = _visible(machine, devices)
        return Accelerator(
            kind="rocm", state=State.USABLE, how=how + hidden, devices=visible, present=len(devices)
        )
    on_bus = machine.pci_devices(AMD_VENDOR, *GPU_CLASSES)
    if on_bus:
        how = f"PCI: {counted(on_bus, 'AMD device')}; {how}"
        return Accelerator(kind="rocm", state=State.WITHOUT_SOFTWARE, how=how, present=on_bus)
    installed = machine.exists("/dev/kfd") or machine.exists("/opt/rocm")
    return Accelerator(
        kind="rocm", state=State.WITHOUT_DEVICE if installed else State.ABSENT, how=how
    )


def _visible(machine: Machine, devices: list[Device]) -> tuple[tuple[Device, ...], str]:
    """Apply ROCR_VISIBLE_DEVICES, then HIP's variable, whose indices count what the first one left.

    HIP reads CUDA_VISIBLE_DEVICES too (ROCm documentation, "GPU isolation techniques").
    """
    hip = (
        "HIP_VISIBLE_DEVICES"
        if "HIP_VISIBLE_DEVICES" in machine.environ
        else "CUDA_VISIBLE_DEVICES"
    )
    visible, hidden = tuple(devices), ""
    for variable in ("ROCR_VISIBLE_DEVICES", hip):
        text = machine.environ.get(variable)
        if text is not None:
            visible = select_gpus(visible, text)
            hidden += f"; {variable}={text!r}"
    return visible, hidden


def _properties(machine: Machine, name: str) -> dict[str, int]:
    """Read a topology file: a name and a number on each line."""
    pairs = [line.split() for line in (machine.read(name) or "").splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read_topology(machine: Machine) -> tuple[list[Device], str]:
    """List the GPU nodes whose render device is here: a container sees nodes it was not given."""
    if not machine.exists("/dev/kfd"):
        return [], "/dev/kfd: absent"
    devices: list[Device] = []
    for node in sorted((name for name in machine.names(NODES) if name.isdecimal()), key=int):
        values = _properties(machine, f"{NODES}/{node}/properties")
        render = f"/dev/dri/renderD{values.get('drm_render_minor', 0)}"
        # A CPU is a node too, and has no SIMD units.
        if not values.get("simd_count") or not machine.exists(render):
            continue
        version = values.get("gfx_target_version", 0)
        banks = f"{NODES}/{node}/mem_banks"
        memories = [
            _properties(machine, f"{banks}/{bank}/properties") for bank in machine.names(banks)
        ]
        memory = sum(
            bank.get("size_in_bytes", 0)
            for bank in memories
            if bank.get("heap_type") in FRAME_BUFFER_HEAPS
        )
        unique = values.get("unique_id", 0)
        devices.append(
            Device(
                index=len(devices),
                name=machine.read(f"{NODES}/{node}/name") or "",
                uuid=f"GPU-{unique:x}" if unique else "",
                memory=memory or None,
                capability=(version // 10000, version // 100 % 100) if version else None,
            )
        )
    return devices, f"kfd: {counted(len(devices), 'device')}"


def _ask_rocm_smi(machine: Machine, how: str) -> tuple[list[Device], str]:
    """Ask ROCm's command line tool, where the kernel's topology tells nothing."""
    program = machine.find_program("rocm-smi", "/opt/rocm/bin")
    if program is None:
        return [], f"{how}; rocm-smi: absent"
    import json

    try:
        answer = json.loads(
            machine.run(program, "--showproductname", "--showmeminfo", "vram", "--json")
        )
        cards = {name: card for name, card in answer.items() if name.startswith("card")}
    except OSError as error:
        return [], f"{how}; {error}"
    except (ValueError, AttributeError):
        return [], f"{how}; rocm-smi: unreadable answer"
    devices = []
    for index, card in enumerate(cards.values()):
        memory = str(card.get("VRAM Total Memory (B)", ""))
        name = card.get("Card Series") or card.get("Card series") or ""
        devices.append(
            Device(index=index, name=str(name), memory=int(memory) if memory.isdecimal() else None)
        )
    return devices, f"rocm-smi: {counted(len(devices), 'device')}"
