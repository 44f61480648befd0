"""The probe against a driver library of ours: same names and layout as NVIDIA's, two devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Signatures from NVIDIA's NVML API Reference Guide. The second device tells neither its memory nor
# its architecture; nvmlInit_v2 fails where FAIL is set, as without a kernel module.
LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static int open_count = 0;
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Not Supported"; }
int nvmlInit_v2(void) { if (getenv("FAIL")) return 9; open_count++; return 0; }
int nvmlShutdown(void) { open_count--; puts(open_count ? "still open" : "closed"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  snprintf(text, size, "570.86.15"); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = (void *)(0x7f0000000000UL + index); return 0; }
static int second(void *handle) { return (unsigned long)handle & 1; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
  snprintf(text, size, second(handle) ? "NVIDIA GB10" : "NVIDIA H200"); return 0; }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
  snprintf(text, size, "GPU-%d", second(handle)); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
  if (second(handle)) return 3;
  memory->total = 150754820096ULL; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  if (second(handle)) return 3;
  *major = 9; *minor = 0; return 0; }
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process_t;
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *found) {
  if (second(handle)) return 3;
  if (*count < 2) return 7;
  found[0].pid = 4711; found[0].used = 3145728; found[1].pid = 4712; found[1].used = -1ULL;
  *count = 2; return 0; }
"""
HOLDERS = """
import dataclasses, json
from pytest_ranks.hardware.found import Device
from pytest_ranks.hardware.holders import find_holders
from pytest_ranks.hardware.machine import Machine
found = find_holders("cuda", [Device(index=0), Device(index=1)], Machine())
print(json.dumps({"all": [dataclasses.asdict(one) for one in found]}))
"""
PROBE = """
import dataclasses, json
from pytest_ranks.hardware.probes import probe
print(json.dumps(dataclasses.asdict(probe().cuda)))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, found none")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(LIBRARY)
    command = [compiler, "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def look(driver: Path, program: str = PROBE, **environ: str) -> tuple[dict, list[str]]:
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"
    }
    environment |= {"LD_LIBRARY_PATH": str(driver), "PATH": "/nonexistent", **environ}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    *said, found = sorted(result.stdout.splitlines(), key=lambda line: line.startswith("{"))
    return json.loads(found), said


def test_the_library_lists_the_devices_and_is_closed_again(driver: Path) -> None:
    found, said = look(driver)
    assert found["how"] == "NVML: 2 devices, driver 570.86.15"
    assert found["devices"] == [
        {
            "index": 0,
            "name": "NVIDIA H200",
            "uuid": "GPU-0",
            "memory": 150754820096,
            "capability": [9, 0],
        },
        {"index": 1, "name": "NVIDIA GB10", "uuid": "GPU-1", "memory": None, "capability": None},
    ]
    assert said == ["closed"]


def test_visibility_applies_to_what_the_library_lists(driver: Path) -> None:
    found, _ = look(driver, CUDA_VISIBLE_DEVICES="GPU-1")
    assert [device["index"] for device in found["devices"]] == [1]
    assert found["present"] == 2


def test_a_library_without_its_driver_says_so(driver: Path) -> None:
    found, _ = look(driver, FAIL="1")
    assert found["how"].startswith("NVML: Driver Not Loaded; ")
    assert found["devices"] == []


def test_the_library_names_who_holds_memory(driver: Path) -> None:
    found, said = look(driver, HOLDERS)
    assert [(one["device"], one["pid"], one["bytes"]) for one in found["all"]] == [
        (0, 4711, 3145728),
        (0, 4712, None),
    ]
    assert said == ["closed"]
