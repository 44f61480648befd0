"""A named accelerator that is not there: real ranks, tensors that say that they are on it."""

from __future__ import annotations

import pytest

TESTS = '''
import copy
import pytest, torch
import torch.distributed as dist
from torch import tensor

pytestmark = [
    pytest.mark.ranks(2, fidelity="simulated"),
    pytest.mark.filterwarnings("ignore"),
]


def pairs(model, other, device, steps=3):
    """Train both on the same batches, one on the device; return their parameters."""
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (model, other)]
    for _ in range(steps):
        batch = torch.randn(4, 4)
        for one, optimizer, data in zip(
            (model, other), optimizers, (batch.to(device), batch), strict=True
        ):
            optimizer.zero_grad()
            (one(data) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
    return list(zip(model.parameters(), other.parameters(), strict=True))


def twins():
    made = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    return made, copy.deepcopy(made)


def test_device(rank):
    assert rank.fidelity == "simulated"
    assert rank.device == torch.device("neuron", 0)
    assert torch.accelerator.current_accelerator().type == "neuron"
    assert torch.neuron.is_available() and torch.neuron.device_count() == 1
    assert rank.backend == dist.get_backend() == "neuron"
    made = tensor([1.0, 2.0], device=rank.device)
    assert made.is_neuron and not made.is_cuda and made.device.type == "neuron"
    assert "device='neuron:0'" in repr(made)
    view = made.view(2, 1)
    view[0, 0] = 7
    assert made.tolist() == [7.0, 2.0] and made.cpu().device.type == "cpu"
    assert copy.deepcopy(made).device == rank.device


def test_collectives(rank):
    t = torch.full((3,), float(rank.index), device=rank.device)
    dist.all_reduce(t)
    assert t.device == rank.device and t.tolist() == [1.0] * 3
    parts = [torch.zeros(1, device=rank.device) for _ in range(2)]
    dist.all_gather(parts, torch.tensor([float(rank.index)], device=rank.device))
    assert [part.item() for part in parts] == [0.0, 1.0]
    assert rank.gather(rank.index) == [0, 1]
    if rank.index == 0:
        dist.send(torch.ones(2, device=rank.device), 1)
    else:
        dist.recv(received := torch.zeros(2, device=rank.device), 0)
        assert received.tolist() == [1.0, 1.0]


def test_ddp(rank):
    model, other = twins()
    model = torch.nn.parallel.DistributedDataParallel(model.to(rank.device))
    for mine, theirs in pairs(model, other, rank.device):
        assert mine.device == rank.device and torch.equal(mine.cpu(), theirs)


def test_fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    model, other = twins()
    mesh = dist.device_mesh.init_device_mesh("neuron", (2,))
    fully_shard(model.to(rank.device), mesh=mesh)
    for mine, theirs in pairs(model, other, rank.device):
        assert mine.to_local().device == rank.device
        torch.testing.assert_close(mine.full_tensor().cpu(), theirs)


@pytest.mark.ranks(dp=1, tp=2, fidelity="simulated", device="gaudi")
def test_another_name(rank):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel, RowwiseParallel, parallelize_module,
    )

    assert rank.device.type == rank.mesh.device_type == "gaudi"
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    data = torch.randn(3, 4)
    expected = model(data).detach()
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    model = parallelize_module(model.to(rank.device), rank.mesh["tp"], plan)
    torch.testing.assert_close(model(data.to(rank.device)).cpu(), expected)


def test_saved(rank, tmp_path):
    torch.save(torch.ones(2, device=rank.device), tmp_path / "it.pt")
    assert torch.load(tmp_path / "it.pt", weights_only=False).device == rank.device


def test_a_language_model(rank):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 32, (2, 8))
    expected = model(input_ids=ids, labels=ids).loss
    there = ids.to(rank.device)
    loss = model.to(rank.device)(input_ids=there, labels=there).loss
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected)


def test_devices_mixed(rank):
    torch.ones(3, device=rank.device) + torch.ones(3)


def test_a_batch_that_was_not_moved(rank):
    torch.nn.Linear(2, 2).to(rank.device)(torch.ones(1, 2))


def test_autocast(rank):
    with torch.autocast("neuron", dtype=torch.bfloat16):
        pass


def test_shape_in_place(rank):
    torch.ones(2, 3, device=rank.device).t_()


def test_numpy(rank):
    torch.ones(2, device=rank.device).numpy()


@pytest.mark.trainium
def test_hardware(rank):
    raise AssertionError("a simulated device is no hardware")


@pytest.mark.ranks(2, lowest_fidelity="gloo")
def test_cpu_afterwards(rank):
    assert rank.fidelity == "gloo" and rank.device.type == "cpu"
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
'''


@pytest.fixture(scope="module")
def found(run_session):
    return run_session({"test_it.py": TESTS}, "--ranks-require=trainium:1")


@pytest.mark.parametrize(
    "name",
    [
        "test_device",
        "test_collectives",
        "test_ddp",
        "test_fsdp2",
        "test_another_name",
        "test_saved",
        "test_a_language_model",
        "test_cpu_afterwards",
    ],
)
def test_what_code_does_with_a_device(found, name):
    row = found.call(name)
    assert row.outcome == "passed" or "could not import 'transformers'" in row.text, row.text
    wanted = "gloo" if name == "test_cpu_afterwards" else "simulated"
    assert dict(row.properties)["fidelity"] == wanted


MIXED = "Expected all tensors to be on the same device, but found at least two devices, neuron:0 and cpu"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_devices_mixed", MIXED),
        ("test_a_batch_that_was_not_moved", MIXED),
        (
            "test_autocast",
            "fidelity 'simulated' cannot show autocast: which operations are cast is a list of the "
            "real device's; run the test at fidelity 'device' or above.",
        ),
        (
            "test_shape_in_place",
            "fidelity 'simulated' cannot show operations that change a shape in place: its tensors "
            "have the shape that they were made with; run the test at fidelity 'device' or above.",
        ),
        ("test_numpy", "numpy"),
    ],
)
def test_what_fails_there(found, name, text):
    row = found.call(name)
    assert row.outcome == "failed"
    assert row.text.startswith("fidelity simulated: ")
    assert text in row.text


def test_a_simulated_device_is_no_hardware(found):
    row = found.call("test_hardware")
    assert row.outcome == "skipped"
    assert "needs 1 Trainium core, found 0" in row.text
    assert "trainium:1 is not met" in found.output
    assert "ranks ws=2 simulated" in found.output
