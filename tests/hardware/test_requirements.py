from __future__ import annotations

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.hardware.requirements import (
    DeviceNeed,
    PackageNeed,
    RanksNeed,
    Required,
    devices_found,
    parse_capability,
    parse_memory,
    parse_package,
    parse_required,
    parse_vendor,
    unmet,
)

GIB = 1024**3
H100 = "{0}, GPU-{0}, 81559, 570.86.15, NVIDIA H100, 9.0"
L4 = "{0}, GPU-{0}, 23034, 570.86.15, NVIDIA L4, 8.9"


@pytest.fixture
def mixed(machine):
    """Return a function that tells what a machine with an H100 and an L4 lacks."""
    machine.prints("/usr/bin/nvidia-smi", f"{H100.format(0)}\n{L4.format(1)}")
    return lambda need: unmet(need, hardware=machine.look)


def gpus(count: int, **conditions) -> DeviceNeed:
    return DeviceNeed(kind="gpu", count=count, **conditions)


def test_enough_devices_meet_a_need(mixed) -> None:
    assert mixed(gpus(2)) is None
    assert mixed(gpus(1, memory=40 * GIB, capability=(9, 0))) is None


def test_too_few_devices(mixed) -> None:
    assert mixed(gpus(3)) == "needs 3 GPUs, found 2 (nvidia-smi: 2 devices, driver 570.86.15)"
    assert mixed(gpus(3, among=("cuda",))) == (
        "needs 3 CUDA devices, found 2 (nvidia-smi: 2 devices, driver 570.86.15)"
    )


def test_too_little_memory_or_too_old_an_architecture(mixed) -> None:
    listed = "1 x NVIDIA H100 79.65GiB 9.0, 1 x NVIDIA L4 22.49GiB 8.9"
    assert mixed(gpus(2, memory=40 * GIB)) == (
        f"needs 2 GPUs with memory >= 40GiB, found 1 of 2 ({listed})"
    )
    assert mixed(gpus(2, capability=(9, 0))) == (
        f"needs 2 GPUs with capability >= 9.0, found 1 of 2 ({listed})"
    )
    assert mixed(gpus(1, memory=100 * GIB, capability=(10, 0))) == (
        f"needs 1 GPU with memory >= 100GiB and capability >= 10.0, found 0 of 2 ({listed})"
    )


def test_devices_of_two_vendors_do_not_add_up(machine) -> None:
    machine.prints("/usr/bin/nvidia-smi", L4.format(0))
    machine.file("/usr/lib/libze_intel_gpu.so")
    machine.file("/sys/class/drm/renderD128/device/vendor", "0x8086")
    machine.file("/dev/dri/renderD128")
    assert unmet(gpus(1), hardware=machine.look) is None
    assert unmet(gpus(1, among=("xpu",)), hardware=machine.look) is None
    assert unmet(gpus(2), hardware=machine.look) == (
        "needs 2 GPUs, found 1 (nvidia-smi: 1 device, driver 570.86.15)"
    )


def test_a_machine_without_any_gpu(machine) -> None:
    assert unmet(gpus(2), hardware=machine.look) == (
        "needs 2 GPUs, found 0 (CUDA, ROCm, Intel XPU: absent)"
    )
    assert unmet(gpus(1, among=("cuda",)), hardware=machine.look) == (
        "needs 1 CUDA device, found 0 (NVML: not asked; nvidia-smi: absent)"
    )


def test_a_gpu_without_its_driver_is_told_apart_from_none(machine) -> None:
    machine.pci("0x10de", "0x030000")
    how = "present without software; PCI: 1 NVIDIA device; NVML: not asked; nvidia-smi: absent"
    assert unmet(gpus(1), hardware=machine.look) == f"needs 1 GPU, found 0 (CUDA {how})"
    assert unmet(gpus(1, among=("cuda",)), hardware=machine.look) == (
        f"needs 1 CUDA device, found 0 ({how})"
    )


def test_trainium_counts_logical_cores(machine) -> None:
    need = DeviceNeed(kind="trainium", count=2, among=("neuron",))
    assert unmet(need, hardware=machine.look) == (
        "needs 2 Trainium cores, found 0 (neuron-ls: absent; "
        "/sys/devices/virtual/neuron_device: absent; /dev/neuron*: absent)"
    )
    machine.modules.add("torch_neuronx")
    machine.file("/dev/neuron0")
    machine.file("/dev/neuron1")
    assert unmet(need, hardware=machine.look) is None
    assert devices_found(need, hardware=machine.look) == 2


def test_ranks_on_gloo_need_no_device() -> None:
    pytest.importorskip("torch")
    assert unmet(RanksNeed(world_size=4), hardware=None) is None


def test_ranks_on_nccl_need_a_device_each(machine) -> None:
    pytest.importorskip("torch")
    machine.prints("/usr/bin/nvidia-smi", L4.format(0))
    need = RanksNeed(world_size=2, backend="nccl")
    assert unmet(need, hardware=machine.look) == (
        "backend 'nccl': needs 2 CUDA or ROCm devices, found 1 "
        "(nvidia-smi: 1 device, driver 570.86.15)"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pytest", None),
        ("pytest>=8", None),
        ("pytest>=999", "needs pytest>=999, found {version}"),
        ("pytest_ranks", None),
        ("xdist>=1", None),
        ("json", None),
        ("json>=1", "needs json>=1, found a module without a version"),
        ("xml.dom", None),
        ("xml.nosuch", "needs xml.nosuch, found none"),
        ("json.decoder.nosuch", "needs json.decoder.nosuch, found none"),
        ("nosuch_package", "needs nosuch_package, found none"),
        ("nosuch_package>=2.8,<3", "needs nosuch_package<3,>=2.8, found none"),
    ],
)
def test_packages_are_found_without_importing_them(text: str, reason: str | None) -> None:
    expected = reason and reason.format(version=pytest.__version__)
    assert unmet(parse_package(text)) == expected


@pytest.mark.parametrize("value", ["", ">=2", "a b", "a[x]", "a; python_version>'3'", "a>=x", 3])
def test_what_is_no_requirement_is_refused(value) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_package(value)
    assert str(caught.value) == (
        f"{value!r} is no requirement; write a module or distribution with a version, "
        "such as 'flash_attn>=2.8'."
    )


def test_a_version_is_split_from_the_name() -> None:
    assert parse_package("flash_attn>=2.8") == PackageNeed(name="flash_attn", specifier=">=2.8")


@pytest.mark.parametrize(
    ("value", "size"),
    [("40GiB", 40 * GIB), ("1.5 GiB", 3 * GIB // 2), ("512MiB", GIB // 2), (7, 7)],
)
def test_memory_is_bytes_or_a_text(value, size: int) -> None:
    assert parse_memory(value) == size


@pytest.mark.parametrize("value", ["40", "40GB", "", "-1GiB", "0GiB", 0, -1, True, 1.5, None])
def test_what_is_no_size_is_refused(value) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_memory(value)
    assert str(caught.value) == (
        f"memory={value!r} is no size; write bytes or a text such as '40GiB'."
    )


@pytest.mark.parametrize("value", [(9, 0), [9, 0], "9.0"])
def test_a_capability_is_a_pair_or_a_text(value) -> None:
    assert parse_capability(value) == (9, 0)


@pytest.mark.parametrize("value", [9.0, "9", "sm_90", (9,), (9, 0, 0), (9, "0"), (-1, 0), True])
def test_what_is_no_capability_is_refused(value) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_capability(value)
    assert str(caught.value) == f"capability={value!r} is no version; write (9, 0) or '9.0'."


@pytest.mark.parametrize(
    ("value", "hint"),
    [("nvidia", " Did you mean 'cuda'?"), ("cudaa", " Did you mean 'cuda'?"), (3, "")],
)
def test_an_unknown_vendor_is_refused(value, hint: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_vendor(value)
    assert str(caught.value) == f"vendor={value!r} is unknown; choose from cuda, rocm, xpu.{hint}"


def test_required_kinds_have_a_least_count() -> None:
    assert parse_required("gpu, multi_gpu,trainium:16,ranks : 4") == (
        Required(kind="gpu", count=1),
        Required(kind="multi_gpu", count=2),
        Required(kind="trainium", count=16),
        Required(kind="ranks", count=4),
    )


def test_a_nightly_build_is_a_version_like_others(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "nightly_package-3.0.dev1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 3.0.dev1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert unmet(parse_package("nightly-package>=2")) is None
    assert unmet(parse_package("nightly-package>=3")) == (
        "needs nightly-package>=3, found 3.0.dev1"
    )


def test_a_package_that_cannot_be_imported_is_found_all_the_same(tmp_path, monkeypatch) -> None:
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "inner.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert unmet(parse_package("explosive_package.inner")) is None
    assert unmet(parse_package("explosive_package.other")) is not None


def test_a_neuron_world_has_a_size_that_the_runtime_makes(machine) -> None:
    machine.modules.add("torch_neuronx")
    machine.file("/sys/devices/virtual/neuron_device/neuron0/core_count", 8)
    need = RanksNeed(world_size=4, backend="neuron")
    assert unmet(need, hardware=machine.look) == (
        "backend 'neuron': needs a world of 4 Trainium cores, Neuron makes worlds of 1, 2, 8, 16 "
        "and multiples of 32; the nearest are 2 and 8"
    )
    assert unmet(RanksNeed(world_size=8, backend="neuron"), hardware=machine.look) is None
