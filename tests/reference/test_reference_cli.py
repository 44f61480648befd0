from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from pytest_ranks.models import byte_tokenizer
from pytest_ranks.reference import TrainConfig
from pytest_ranks.reference.cli import app, tell, train
from pytest_ranks.reference.model import load_model


@pytest.fixture
def folder(make_model, samples, tmp_path, monkeypatch):
    """A model folder and a data file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    make_model(vocab_size=320).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return tmp_path


def command(*arguments, ranks=None):
    """Run the command line for real."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*launcher, "-m", "pytest_ranks.reference", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def invoke(*arguments):
    """Run the command line in this process: its output and exit status."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_torchrun_trains_as_one_process_does(folder):
    options = ("model", "data.jsonl", "--epochs", 2, "--lr", 0.01, "--max-tokens-per-rank", 60,
               "--eval-data", "data.jsonl", "--device", "cpu")  # fmt: skip
    ranks = command(*options, "--out-dir", "two", "--micro-batch", 2, "--checkpoint-every", 3, ranks=2)  # fmt: skip
    assert ranks.returncode == 0, ranks.stderr
    assert "6 steps, " in ranks.stdout
    assert ranks.stdout.count("model in two/model, metrics in two/metrics.jsonl") == 1
    assert ranks.stderr.count("| 0/6 [") == 1  # one progress bar, on rank 0
    assert "| 6/6 [" in ranks.stderr
    assert (folder / "two" / "checkpoint-6.pt").exists()

    one = invoke(*options, "--out-dir", "one", "--micro-batch", 4)
    assert one.exit_code == 0, one.output
    alone, together = records(folder / "one"), records(folder / "two")
    assert [r["loss"] for r in together] == pytest.approx([r["loss"] for r in alone], rel=1e-4)
    assert [r["tokens"] for r in together] == [r["tokens"] for r in alone]
    assert together[-1]["eval_loss"] < together[0]["loss"]
    (first, tokenizer), (second, _) = load_model("one/model"), load_model("two/model")
    assert tokenizer is not None
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), parameter, rtol=1e-3, atol=1e-3)


def test_resuming_goes_on_where_the_run_stopped(folder):
    options = ("model", "data.jsonl", "--out-dir", "out", "--micro-batch", 4, "--device", "cpu")
    assert invoke(*options, "--max-steps", 2, "--checkpoint-every", 2).exit_code == 0
    resumed = invoke(*options, "--max-steps", 5, "--resume-from", "out")
    assert resumed.exit_code == 0, resumed.output
    assert "3 steps, " in resumed.output
    assert [record["step"] for record in records(folder / "out")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("cut", "data.jsonl"), "error: cut cannot be loaded: Error while deserializing header: "),
        (("none", "data.jsonl"), "error: none has no config.json; expected a folder that save_pre"),
        (("model", "none.jsonl"), "error: none.jsonl cannot be read: No such file or directory."),
        (("model", "torn.jsonl"), "error: torn.jsonl, line 2: not JSON ("),
        (
            ("model", "large.jsonl"),
            "error: large.jsonl, line 1: input_ids[0] is 999, the model knows 0 to 319; use the",
        ),
        (
            ("model", "masked.jsonl"),
            "error: masked.jsonl has no label to train on: all are -100",
        ),
        (("model", "data.jsonl", "--packer", "ltp"), "Did you mean 'lpt'?"),
        (("model", "data.jsonl", "--micro-batch", "0"), "error: micro_batch=0 is not a whole"),
        (("model", "data.jsonl", "--epochs", "1", "--max-steps", "1"), "give exactly one of them"),
        (
            ("model", "data.jsonl", "--pack-length", "5"),
            "error: data.jsonl, line 1 has 29 tokens",
        ),
        (("model", "data.jsonl", "--strategy", "ddp"), "error: --strategy=ddp needs torchrun: "),
        (("model", "data.jsonl", "--device", "gpu9"), "error: device='gpu9' is not a torch device"),
        (("model", "data.jsonl", "--device", "meta"), "error: device='meta' cannot be used here ("),
        (("model", "data.jsonl", "--resume-from", "none.pt"), "error: there is no checkpoint none"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(folder, options, text):
    (folder / "torn.jsonl").write_text('{"input_ids": [1], "labels": [1]}\n{"input_ids": [')
    (folder / "large.jsonl").write_text('{"input_ids": [999, 1], "labels": [1, 1]}\n')
    (folder / "masked.jsonl").write_text('{"input_ids": [5, 6], "labels": [5, -100]}\n')
    shutil.copytree("model", "cut")
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(5000)
    result = invoke(*options, "--out-dir", "out")
    assert result.exit_code == 2
    assert text in result.stderr
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("file", "options", "text"),
    [
        ("metrics.jsonl", (), "holds another run; choose another folder, or remove that one."),
        (
            "checkpoint-7.pt",
            (),
            "holds another run; choose another folder, or go on with that run: --resume-from out",
        ),
        (
            "metrics.jsonl",
            ("--resume-from", "other"),
            "holds another run; choose another folder, or remove that one.",
        ),
        (
            "checkpoint-7.pt",
            ("--resume-from", "other/checkpoint-1.pt"),
            "holds another run; choose another folder, or go on with that run: --resume-from out",
        ),
    ],
)
def test_another_runs_folder_is_not_written_over(folder, file, options, text):
    (folder / "out").mkdir()
    (folder / "other").mkdir()
    (folder / "out" / file).write_text("{}")
    result = invoke("model", "data.jsonl", "--out-dir", "out", *options)
    assert result.exit_code == 2
    assert result.stderr == f"error: --out-dir=out {text}\n"
    assert [path.name for path in (folder / "out").iterdir()] == [file]


def test_the_model_that_a_run_starts_from_is_not_written_over(folder):
    before = (folder / "model" / "model.safetensors").read_bytes()
    for options in ((), ("--resume-from", ".")):
        result = invoke("model", "data.jsonl", "--out-dir", ".", "--max-steps", 1, *options)
        assert result.exit_code == 2
        assert result.stderr == (
            "error: --out-dir=.: the trained model would be written over model, which the run "
            "starts from; choose another folder.\n"
        )
    assert (folder / "model" / "model.safetensors").read_bytes() == before


def test_a_folder_holds_one_run_at_a_time(folder):
    """Two that begin together, and one that is resumed while it still goes on, would be mixed."""
    options = ("model", "data.jsonl", "--out-dir", "out", "--max-steps", 1, "--device", "cpu")
    (folder / "out").mkdir()
    program = (
        "import sys; from pytest_ranks.reference.folder_claim import claimed\n"
        "with claimed('out'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        refused = invoke(*options)
        other.kill()
    assert refused.exit_code == 2
    assert refused.stderr == (
        "error: --out-dir=out is in use by a run that is still going on; wait for it to end, or "
        "choose another folder.\n"
    )
    assert list((folder / "out").iterdir()) == []
    assert invoke(*options).exit_code == 0  # a run that was killed holds nothing


def test_a_file_is_no_output_folder(folder):
    result = invoke("model", "data.jsonl", "--out-dir", "data.jsonl")
    assert result.exit_code == 2
    assert "error: --out-dir=data.jsonl is a file; expected a folder." in result.stderr


def test_a_full_disk_is_one_sentence_and_a_status_of_its_own(folder):
    """The checkpoint before it stays, and nothing half written takes room."""
    options = ("model", "data.jsonl", "--out-dir", "out", "--max-steps", 2, "--device", "cpu")
    assert invoke(*options, "--checkpoint-every", 2).exit_code == 0
    size = (folder / "out" / "checkpoint-2.pt").stat().st_size
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2)\n"
        "sys.argv[1:] = ['model', 'data.jsonl', '--out-dir', 'out', '--max-steps', '3', "
        "'--checkpoint-every', '1', '--resume-from', 'out', '--device', 'cpu']\n"
        "from pytest_ranks.reference.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == os.EX_IOERR, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith(
        "error: out/checkpoint-3.pt: File too large; what was saved before is whole.\n"
    )
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "checkpoint-2.pt",
        "metrics.jsonl",
        "model",
    ]


def test_steps_that_trained_nothing_have_no_part_in_the_summary(folder):
    masked = {"input_ids": [1, 2], "labels": [-100, -100]}
    good = {"input_ids": [1, 2], "labels": [1, 2]}
    lines = [json.dumps(one) + "\n" for one in (masked, good, masked)]
    (folder / "data.jsonl").write_text("".join(lines))
    result = invoke("model", "data.jsonl", "--out-dir", "out", "--no-shuffle", "--device", "cpu")
    assert result.exit_code == 0
    loss = f"{records(folder / 'out')[1]['loss']:.4f}"
    assert f"3 steps, 1 trained tokens, loss {loss} -> {loss}; model in" in result.stdout


def test_what_one_rank_alone_finds_is_said_by_it(folder, monkeypatch):
    """Before the ranks are joined the first of each machine speaks, afterwards all do."""
    monkeypatch.setenv("RANK", "3")
    for local, told in (("1", ""), ("0", "rank 3: error: none.jsonl cannot be read: ")):
        monkeypatch.setenv("LOCAL_RANK", local)
        result = invoke("model", "none.jsonl", "--out-dir", "out")
        assert result.exit_code == 2
        assert result.stderr.startswith(told)
        assert bool(result.stderr) == bool(told)


@pytest.mark.ranks(2)
def test_once_joined_every_rank_says_what_it_found(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank.index))
    monkeypatch.setenv("LOCAL_RANK", str(rank.index))
    tell("error: gone.")
    assert capsys.readouterr().err == ("rank 1: " if rank.index else "") + "error: gone.\n"


def test_an_output_folder_that_cannot_be_made_is_one_sentence(folder):
    result = invoke("model", "data.jsonl", "--out-dir", "data.jsonl/out")
    assert result.exit_code == 2
    assert result.stderr == "error: --out-dir=data.jsonl/out cannot be made: Not a directory.\n"


def test_bad_input_in_a_process_of_its_own_has_no_traceback(folder):
    result = command("model", "none.jsonl", "--out-dir", "out")
    assert result.returncode == 2
    assert result.stderr == "error: none.jsonl cannot be read: No such file or directory.\n"
    assert result.stdout == ""


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_missing_package_is_named(folder, module):
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = "
        "['model', 'data.jsonl', '--out-dir', 'out', '--max-steps', '1']\n"
        "from pytest_ranks.reference.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {module} is not installed; pip install 'pytest-ranks[trainer]'\n"
    )


def test_help_names_every_option():
    result = command("--help")
    assert result.returncode == 0
    assert "python -m pytest_ranks.reference" in result.stdout
    for word in ("MODEL", "DATA", "--out-dir", "--strategy", "--resume-from"):
        assert word in result.stdout


def test_defaults_are_those_of_the_config():
    config = TrainConfig(max_steps=1)
    options = inspect.signature(train).parameters
    assert (options["beta1"].default, options["beta2"].default) == config.betas
    for name in set(options) & set(TrainConfig.__dataclass_fields__):
        if name not in ("strategy", "out_dir", "max_steps"):
            assert options[name].default == getattr(config, name), name
    settable = set(options) | {"betas"}
    assert set(TrainConfig.__dataclass_fields__) <= settable


def test_a_run_that_diverges_keeps_the_checkpoint_before_and_writes_no_model(folder):
    options = ("model", "data.jsonl", "--out-dir", "out", "--max-steps", 3, "--device", "cpu")
    options += ("--optimizer", "sgd", "--lr", 1e30, "--max-grad-norm", 0, "--micro-batch", 4)
    result = invoke(*options, "--checkpoint-every", 1, "--keep-checkpoints", 1)
    assert result.exit_code == os.EX_SOFTWARE
    assert result.stderr.splitlines()[-1].startswith("error: 3 steps, ")
    assert (
        "the loss or the gradient of step 2 is not finite, so neither a model nor a checkpoint is "
        "written from it on; resume from one before it, with a smaller learning rate or without the "
        "samples of that step."
    ) in result.stderr
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "checkpoint-1.pt",
        "metrics.jsonl",
    ]
    notes = [record.get("note") for record in records(folder / "out")]
    told = "the loss or the gradient is not finite: nothing is saved from here on"
    assert notes == [None, told, None]
