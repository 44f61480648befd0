"""Ranks ask no name server for the names of their own addresses: it may be silent for seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")

# A machine of its own, whose only name server hears everything and says nothing.
PLACE = """
import json, os, select, socket, subprocess, sys

folder, *command = sys.argv[1:]
run = lambda *words: subprocess.run(words, check=True)
run("ip", "link", "set", "lo", "up")
for name in ("resolv.conf", "hosts", "nsswitch.conf"):
    run("mount", "--bind", f"{folder}/{name}", f"/etc/{name}")
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
done = subprocess.run(command, capture_output=True, text=True)
questions = []
while select.select([server], [], [], 0)[0]:
    labels, rest = [], server.recv(512)[12:]
    while rest[0]:
        labels.append(rest[1 : rest[0] + 1].decode())
        rest = rest[rest[0] + 1 :]
    questions.append(".".join(labels))
print(json.dumps([done.returncode, questions, done.stdout + done.stderr]))
"""
TESTS = """
import socket, time
import pytest, torch
import torch.distributed as dist


def all_reduce():
    found = torch.ones(1)
    dist.all_reduce(found)
    return found.item()


@pytest.mark.ranks(2)
def test_warm(rank):
    assert all_reduce() == 2


@pytest.mark.ranks(2, isolate=True)
def test_isolated(rank):
    assert all_reduce() == 2


@pytest.mark.ranks(2, init=False)
def test_initialises_itself(rank):
    dist.init_process_group("gloo")
    assert all_reduce() == 2


def test_functions(launch):
    assert launch(all_reduce, world_size=2) == [2, 2]
"""
ASKS = """
import ctypes, socket, sys
from pytest_ranks.launch import resolver

def ask():
    try:
        socket.gethostbyname("nobody.example")
    except OSError:
        pass

with resolver.looking_up_in_files():
    ask() if sys.argv[1] == "inside" else None
ask() if sys.argv[1] == "after" else None
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    if not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("needs the commands ip, unshare and mount, found not all of them")
    folder = tmp_path_factory.mktemp("place")
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    (folder / "nsswitch.conf").write_text("passwd: files\nhosts: files dns # as most have it\n")
    (folder / "place.py").write_text(PLACE)

    def run(*command: str) -> tuple[int, list[str], str]:
        words = (sys.executable, str(folder / "place.py"), str(folder), sys.executable, *command)
        done = subprocess.run(
            ("unshare", "--net", "--mount", *words),
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"namespaces cannot be made here: {done.stderr.strip()[-200:]}")
        code, questions, output = json.loads(done.stdout)
        return code, questions, output

    return folder, run


def test_a_session_asks_no_name_server(place):
    folder, run = place
    (folder / "test_it.py").write_text(TESTS)
    code, questions, output = run("-m", "pytest", "test_it.py")
    assert code == 0, output
    assert questions == [], output


@pytest.mark.parametrize(("where", "expected"), [("inside", set()), ("after", {"nobody.example"})])
def test_a_test_may_ask(place, monkeypatch, where, expected):
    folder, run = place
    (folder / "asks.py").write_text(ASKS)
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
    code, questions, output = run("asks.py", where)
    assert code == 0, output
    assert set(questions) == expected, output


def test_nothing_changes_where_it_could_not_be_taken_back(place, monkeypatch):
    folder, run = place
    switch = folder / "nsswitch.conf"
    before = switch.read_text()
    switch.write_text("passwd: files\n")
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
    (folder / "asks.py").write_text(ASKS)
    code, questions, output = run("asks.py", "inside")
    switch.write_text(before)
    assert code == 0, output
    assert questions
