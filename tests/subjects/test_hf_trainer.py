from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytest_ranks.conformance import Job, check_trainer
from pytest_ranks.conformance.job import Optimizer
from pytest_ranks.models.corpora import EOS_ID
from pytest_ranks.subjects.hf_trainer import EXPECTED_FAILURES, HFTrainer, padding_collator

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "found_in_the_wild.md"


class PerRankCounts(HFTrainer):
    """The Trainer with the token count of each rank for itself: a documented option."""

    def arguments(self, job):
        arguments = super().arguments(job)
        arguments.average_tokens_across_devices = False
        return arguments


PASSED = [
    "subject.honours_job[single]",
    "subject.honours_job[ddp-2]",
    "loss.token_weights[single]",
    "loss.token_weights[ddp-2]",
    "gradient_sync.clipping_law[ddp-2]",
    "data_loading.order_changes_every_epoch[ddp-2]",
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Run checks; once for all tests of this module, since each subject starts a process that imports its trainer."""

    def run(subject, *names):
        results = check_trainer(subject, suites=names, folder=tmp_path_factory.mktemp("runs"))
        return {result.id: (result.outcome, result.text) for result in results}

    return run


@pytest.fixture(scope="module")
def found(judge):
    return judge(HFTrainer, *PASSED, "loss.any_forward[single]")


@pytest.mark.parametrize("name", PASSED)
def test_trainer_passes_on_one_process_and_on_ranks(found, name):
    assert found[name] == ("passed", "")


def test_known_trap_is_an_expected_failure_with_its_numbers(found):
    outcome, text = found["loss.any_forward[single]"]
    assert outcome == "expected failure"
    assert "https://github.com/huggingface/transformers/issues/37766" in text
    assert "weight x N runs from 0.5000 to 2.3571" in text


def test_option_that_weighs_ranks_equally_is_found(judge):
    outcome, text = judge(PerRankCounts, "loss.token_weights[ddp-2]")["loss.token_weights[ddp-2]"]
    assert outcome == "failed"
    assert "weight x N runs from 0.7021 to 1.7368" in text


def test_expected_failures_are_the_subjects_own():
    assert HFTrainer.expected_failures is EXPECTED_FAILURES
    assert all("https://github.com/huggingface/" in reason for reason in EXPECTED_FAILURES.values())


def test_arguments_switch_off_what_the_job_does_not_say(tmp_path):
    arguments = HFTrainer().arguments(Job(out_dir=str(tmp_path)))
    assert arguments.max_grad_norm == 0
    assert arguments.warmup_steps == 0
    assert arguments.weight_decay == 0
    assert not arguments.bf16
    assert arguments.train_sampling_strategy == "sequential"
    assert arguments.report_to == []
    assert arguments.save_strategy == "no"


def test_arguments_say_what_the_job_says(tmp_path):
    job = Job(
        out_dir=str(tmp_path),
        micro_batch=3,
        gradient_accumulation_steps=5,
        max_steps=None,
        epochs=2,
        shuffle=True,
        seed=99,
        optimizer=Optimizer(name="adamw", lr=0.5, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.3),
        warmup_steps=4,
        max_grad_norm=0.7,
        precision="bf16",
        activation_checkpointing=True,
    )
    arguments = HFTrainer().arguments(job)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 5)
    assert (arguments.max_steps, arguments.num_train_epochs, arguments.seed) == (-1, 2, 99)
    assert (arguments.optim, arguments.learning_rate, arguments.weight_decay) == (
        "adamw_torch",
        0.5,
        0.3,
    )
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.8, 0.95, 1e-5)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("constant_with_warmup", 4)
    assert (arguments.max_grad_norm, arguments.bf16) == (0.7, True)
    assert arguments.gradient_checkpointing
    assert arguments.train_sampling_strategy == "random"


def test_collator_pads_by_length_and_keeps_the_end_of_sequence():
    batch = padding_collator(EOS_ID)(
        [
            {"input_ids": [5, 6, EOS_ID], "labels": [-100, 6, EOS_ID]},
            {"input_ids": [7, EOS_ID], "labels": [7, EOS_ID]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, EOS_ID], [7, EOS_ID, EOS_ID]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, EOS_ID], [7, EOS_ID, -100]]
    assert batch["labels"].dtype == torch.int64


def test_page_prints_what_it_says(tmp_path):
    page = PAGE.read_text()
    script = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    promised = re.search(r"```text\n(.*?)\n```", page, re.DOTALL)[1]
    (tmp_path / "weights.py").write_text(script)
    alone = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, "weights.py"],
        check=False,
        cwd=tmp_path,
        env=alone | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert promised in done.stdout
    assert ast.literal_eval(promised.partition(": ")[2])["Counts"] == [0.1, 0.1]
