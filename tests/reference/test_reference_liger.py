"""Liger's kernels on the CPU: in a process of Triton's interpreter, which runs some of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import TrainConfig, Trainer
from pytest_ranks.reference.liger import KernelReport

SESSION = Path(__file__).with_name("liger_session.py")
FAMILIES = ("llama", "qwen3", "gemma", "gpt2")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the session measured."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel, found none")
    out = tmp_path_factory.mktemp("liger") / "found.json"
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(SESSION.parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SESSION), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_updates_are_those_of_the_plain_model_and_the_oracle(found, family):
    result = found["families"][family]
    assert result["plain"] == pytest.approx(result["liger"], abs=1e-5)
    assert result["liger"][0] == pytest.approx(result["oracle"], abs=1e-5)
    assert result["liger"][-1] < result["liger"][0]
    assert result["update_error"] < 1e-5
    assert result["kernels"]["plain"] == []
    rope = [] if family == "gpt2" else ["LigerRopeFunction"]
    assert result["kernels"]["liger"] == ["LigerCrossEntropyFunction", *rope]
    assert result["used"] == ({} if family == "gpt2" else {"rope": 2})


def test_kernels_that_the_interpreter_cannot_run_leave_their_layers_plain(found):
    assert found["families"]["gpt2"]["left"] == {}
    left = found["families"]["llama"]["left"]
    assert left.keys() == {"rms_norm", "swiglu", "geglu"}
    for reason in left.values():
        assert reason.startswith("its kernel does not run in Triton's interpreter (InterpreterErr")


def test_packed_checkpointed_and_split_runs_are_those_of_the_plain_model(found):
    assert found["variants"].keys() >= {"packed", "recomputed", "orthogonal"}
    for name, result in found["variants"].items():
        assert result["plain"] == pytest.approx(result["liger"], abs=1e-5), name
        assert result["update_error"] < 1e-5, name
        assert "LigerRopeFunction" in result["kernels"]["liger"], name


def test_bf16_in_the_interpreter_is_refused_for_what_it_computes(found):
    assert found["bf16"]["error"] == (
        "liger=True with precision='bf16' needs a GPU, found device='cpu': Triton's interpreter "
        "computes nonsense in bfloat16; use precision='fp32' there."
    )
    if found["bf16"]["rope_difference"] < 1:
        pytest.fail("Triton's interpreter learned to compute in bfloat16: refuse it no longer")


def test_nothing_but_the_model_that_was_given_changes(found):
    """liger-kernel's own functions patch the module of all Llamas, and the seen control shows it."""
    assert found["leaks"] == {"ours": [], "control": ["module"]}
    assert found["before_and_after_equal"]
    assert found["copy_has_kernels"]


def test_rope_of_another_layout_and_other_layers_are_found_out(found):
    assert found["interleaved"] == "its kernel computes something else than Interleaved"


@pytest.mark.parametrize("case", ["loss", "masked", "one_row"])
def test_summed_loss_and_gradient_are_the_plain_ones(found, case):
    result = found["losses"][case]
    assert result["liger"] == pytest.approx(result["plain"], rel=1e-6, abs=1e-6)
    assert result["gradient_error"] < 1e-6


def test_without_gpu_and_interpreter_it_is_refused(make_model, samples, monkeypatch):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel, found none")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = TrainConfig(max_steps=1, device="cpu", liger=True)
    trainer = Trainer(config, model=make_model(), samples=samples)
    with pytest.raises(BadInputError) as caught:
        trainer.train()
    assert str(caught.value).startswith(
        "liger=True needs a GPU, found device='cpu'; on the CPU the kernels run in Triton's "
        "interpreter, slowly and not all of them: set TRITON_INTERPRET=1 before the process starts"
    )
    assert trainer.steps_taken == 0


def test_without_the_package_it_is_refused(make_model, samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    config = TrainConfig(max_steps=1, device="cpu", liger=True)
    with pytest.raises(BadInputError) as caught:
        Trainer(config, model=make_model(), samples=samples).setup()
    text = str(caught.value)
    assert text.startswith("liger=True cannot import liger-kernel (")
    assert text.endswith("); install it with: pip install 'pytest-ranks[liger]'")


def test_option_is_a_switch():
    with pytest.raises(BadInputError, match="liger='yes' is not True or False"):
        TrainConfig(max_steps=1, liger="yes")


def test_layers_without_values_cannot_be_tried():
    with pytest.raises(BadInputError) as caught:
        TrainConfig(max_steps=1, liger=True, strategy="fsdp2", initialization="broadcast")
    assert str(caught.value) == (
        "initialization='broadcast' gives parameters their values after they are cut, and liger "
        "tries its kernels on whole layers; use initialization='full'."
    )


def test_report_says_what_was_used_and_what_was_left():
    report = KernelReport(used={"rope": 2}, left={"swiglu": "it does not run"})
    assert str(report) == (
        "Liger kernels: rope in 2 layers, and the loss; swiglu left plain: it does not run"
    )
    assert str(KernelReport()) == "Liger kernels: no layer, and the loss"


def test_recognition_needs_no_package(make_model):
    """What is recognised, on any machine; that each kernel agrees needs the kernel."""
    from pytest_ranks.reference import liger

    names = [name for module in make_model().modules() for name, *_ in liger._candidates(module)]
    assert names.count("rms_norm") == 2 * 5  # two readings of each
    assert names.count("swiglu") == names.count("geglu") == 2
    assert torch.is_grad_enabled()
