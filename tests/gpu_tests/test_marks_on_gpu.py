"""The probes and the `gpu` mark against a real NVIDIA machine: the driver is the judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_ranks.hardware.found import State
from pytest_ranks.hardware.probes import probe

pytestmark = pytest.mark.gpu(vendor="cuda")

# What CUDA itself counts, asked of the driver; 100 is CUDA_ERROR_NO_DEVICE.
COUNT_BY_DRIVER = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
status = cuda.cuInit(0)
count = ctypes.c_int()
assert status in (0, 100), status
if status == 0:
    assert cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value)
"""
LIST_BY_TORCH = """
import json, torch
print(json.dumps([
    (p.name, p.total_memory, [p.major, p.minor])
    for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
]))
"""


def ask(script: str, **environ: str) -> str:
    """Run a script in a process of its own: a CUDA context here would harm later forks."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environ},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def uuid() -> str:
    return probe(environ={}).cuda.devices[0].uuid


def test_the_probe_finds_what_torch_finds() -> None:
    pytest.importorskip("torch")
    found = probe().cuda
    listed = json.loads(ask(LIST_BY_TORCH))
    assert found.state is State.USABLE
    assert found.count == len(listed) >= 1
    for device, (name, memory, capability) in zip(found.devices, listed, strict=True):
        assert device.name == name
        assert device.capability == tuple(capability)
        # The driver keeps a few percent of the memory for itself; NVML counts them in.
        assert memory <= device.memory <= memory * 1.05


@pytest.mark.parametrize(
    "visible", ["0", "", "-1", "0,0", "0,-1", "99", "0,99", "99,0", "uuid", "uuid prefix", "GPU-x"]
)
def test_visibility_is_read_the_way_the_driver_reads_it(visible: str) -> None:
    text = {"uuid": uuid(), "uuid prefix": uuid()[:12]}.get(visible, visible)
    counted = int(ask(COUNT_BY_DRIVER, CUDA_VISIBLE_DEVICES=text))
    assert probe(environ={**os.environ, "CUDA_VISIBLE_DEVICES": text}).cuda.count == counted


def test_nvidia_smi_tells_what_nvml_tells() -> None:
    by_library = probe(environ={}).cuda
    # Under a root, be it this machine's own, the probe asks the tool and not the library.
    by_tool = probe(Path("/"), environ=os.environ).cuda
    if by_tool.how.endswith("nvidia-smi: absent"):
        pytest.skip("needs nvidia-smi in a usual folder, found none")
    assert by_tool.present == by_library.present
    for tool, library in zip(by_tool.devices, by_library.devices, strict=False):
        assert (tool.name, tool.uuid, tool.capability) == (
            library.name,
            library.uuid,
            library.capability,
        )
        assert abs(tool.memory - library.memory) < 2 * 1024**2


def test_probing_initialises_no_device() -> None:
    script = """
import sys
from pytest_ranks.hardware.probes import probe
assert probe().cuda.count >= 1
assert "torch" not in sys.modules
assert "libcuda.so" not in open("/proc/self/maps").read()
print("untouched")
"""
    assert ask(script) == "untouched\n"


class TestSessions:
    @pytest.fixture
    def run(self, pytester, monkeypatch):
        def run_session(body: str, *arguments: str):
            # pytester clears the options from outside; ours come after that.
            monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
            monkeypatch.delenv("RANKS_REQUIRE", raising=False)
            pytester.makepyfile(f"import pytest\n{body}")
            return pytester.runpytest_subprocess("-p", "pytest_ranks.plugin", "-rs", *arguments)

        return run_session

    def test_the_mark_lets_a_test_run_and_the_gate_is_content(self, run) -> None:
        result = run(
            """
@pytest.mark.gpu(vendor="cuda", memory="1GiB", capability="5.0")
def test_it(): pass
            """,
            "--ranks-require=gpu:1",
        )
        assert result.ret == 0
        result.assert_outcomes(passed=1)

    def test_hidden_devices_skip_the_test_and_fail_the_gate(self, run, monkeypatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        result = run("@pytest.mark.gpu\ndef test_it(): pass", "--ranks-require=gpu:1")
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(
            ["SKIPPED*needs 1 GPU, found 0 (NVML: *, driver *; CUDA_VISIBLE_DEVICES='')"]
        )

    def test_more_devices_than_there_are_skip(self, run) -> None:
        count = probe().cuda.count
        result = run(f"@pytest.mark.gpu({count + 1})\ndef test_it(): pass")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines([f"SKIPPED*needs {count + 1} GPUs, found {count} (NVML: *"])

    def test_more_memory_than_there_is_skips(self, run) -> None:
        result = run("@pytest.mark.gpu(memory='4TiB')\ndef test_it(): pass")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(["SKIPPED*needs 1 GPU with memory >= 4096GiB, found 0 of *"])
