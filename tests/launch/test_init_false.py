"""Tests that initialise the world themselves, the ways that trainers do."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("torch")

TESTS = """
import os, socket, time
import pytest, torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2, init=False)


def total():
    found = torch.ones(1)
    dist.all_reduce(found)
    return found.item()


def place():
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False,
    )


def test_nothing_is_initialised(rank):
    assert not dist.is_initialized()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    found = [os.environ[name] for name in names]
    assert found == [str(rank.index), str(rank.index), "2", "2"]
    assert rank.world_size == 2


@pytest.mark.parametrize("number", range(3))
def test_plain(number, rank):
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    assert total() == 2.0
    assert rank.gather(rank.index) == [0, 1]


def test_leaves_its_group(rank):
    dist.init_process_group("gloo", init_method="env://")
    assert total() == 2.0
    dist.isend(torch.full((1,), 100.0), dst=1 - rank.index)


@pytest.mark.ranks(2)
def test_between(rank):
    assert total() == 2.0


def test_env_url_again(rank):
    dist.init_process_group(init_method="env://", rank=rank.index, world_size=2)
    assert total() == 2.0
    dist.destroy_process_group()


def test_writes_to_the_place_that_the_variables_name(rank):
    store = place()
    if rank.index == 0:
        store.set("left", "behind")
    assert store.get("left") == b"behind"


def test_finds_that_place_empty(rank):
    assert not place().check(["left"])


def test_own_store(rank):
    store = dist.PrefixStore("mine", place())
    dist.init_process_group("gloo", store=store, rank=rank.index, world_size=2)
    assert total() == 2.0


def free_port(rank):
    if rank.index == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (rank.shared_tmp_path / "new").write_text(str(free.getsockname()[1]))
        (rank.shared_tmp_path / "new").rename(rank.shared_tmp_path / "port")
    while not (path := rank.shared_tmp_path / "port").exists():
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("way", ["keyword", "position", "variables"])
@pytest.mark.parametrize("init", [pytest.param(True, marks=pytest.mark.ranks(2)), False])
def test_own_port(rank, way, init, monkeypatch):
    port = free_port(rank)
    told, place = os.environ["TORCHELASTIC_USE_AGENT_STORE"], {"rank": rank.index, "world_size": 2}
    if way == "keyword":
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", **place)
    elif way == "position":
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", **place)
    else:
        monkeypatch.setenv("MASTER_PORT", port)
        dist.init_process_group("gloo")
    assert total() == 2.0
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == told


def test_own_file(rank):
    url = f"file://{rank.shared_tmp_path}/store"
    dist.init_process_group("gloo", init_method=url, rank=rank.index, world_size=2)
    assert total() == 2.0


def test_accelerate(rank):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank.index)
    assert accelerator.gather(torch.tensor([rank.index])).tolist() == [0, 1]


def test_lightning(rank, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = torch.utils.data.DataLoader(torch.full((4, 2), float(rank.index)), batch_size=2)
    module = Module()
    trainer.fit(module, data)
    assert (trainer.world_size, trainer.global_rank) == (2, rank.index)
    weights = rank.gather(module.layer.weight.tolist())
    assert weights[0] == weights[1]


@pytest.mark.ranks(2)
def test_at_the_end(rank):
    assert total() == 2.0
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_it.py": TESTS}, "-p", "no:randomly")


def test_each_way_works_and_none_leaves_anything_to_the_next(session):
    bad = {row.id.partition("::")[2] for row in session.rows if row.outcome != "passed"}
    missing = {
        f"test_{name}"
        for name in ("accelerate", "lightning")
        if importlib.util.find_spec(name) is None
    }
    assert bad == missing, session.output


def test_a_missing_package_is_a_skip_with_its_name(session):
    for name in ("accelerate", "lightning"):
        row = session.call(f"test_{name}")
        if importlib.util.find_spec(name) is None:
            assert row.outcome == "skipped"
            assert f"could not import '{name}'" in row.text


BAD = """
import pytest

@pytest.mark.ranks(dp=2, init=False)
def test_mesh(rank): ...

@pytest.mark.ranks(2, keep_group=True, isolate=True)
def test_isolated(rank): ...

@pytest.mark.ranks(2, keep_group=True, init=False)
def test_own(rank): ...

@pytest.mark.ranks(2, keep_group=1)
def test_number(rank): ...

@pytest.mark.ranks(2, init="no")
def test_text(rank): ...
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "mesh",
            "ranks(init=False) and a mesh: a mesh needs the process group, which init=False "
            "leaves to the test; let the test make the mesh too.",
        ),
        (
            "isolated",
            "ranks(keep_group=True, isolate=True): fresh ranks have no group of an earlier test; "
            "leave one of the two out.",
        ),
        (
            "own",
            "ranks(keep_group=True, init=False): the test that initialises a group itself has "
            "none to keep; leave one of the two out.",
        ),
        ("number", "ranks(keep_group=1): expected True or False."),
        ("text", "ranks(init='no'): expected True or False."),
    ],
)
def test_what_contradicts_itself_is_a_sentence(bad_marks, name, said):
    row = bad_marks.call(f"test_{name}")
    assert (row.when, row.outcome) == ("setup", "failed")
    assert said in row.text


@pytest.fixture(scope="module")
def bad_marks(run_session):
    return run_session({"test_it.py": BAD}, "-p", "no:randomly")
