"""The command that a user runs, as a user runs it: in a process of its own, on real ranks."""

from __future__ import annotations

import pytest

MEAN_OF_MEANS = """
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from pytest_ranks.conformance import Capabilities, Trained, full_parameters

def pad(rows, fill):
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

class MyTrainer:
    capabilities = Capabilities(world_sizes={1, 2}, strategies={"single", "ddp"})

    def train(self, job):
        model = job.build_model().train()
        ddp = DDP(model) if job.strategy == "ddp" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=job.optimizer.lr)
        rank = torch.distributed.get_rank() if job.strategy == "ddp" else 0
        history, order = [], range(rank, len(job.samples), job.world_size)
        for step in range(job.max_steps):
            rows = [job.samples[i] for i in order[step * job.micro_batch:(step + 1) * job.micro_batch]]
            ids = pad([row["input_ids"] for row in rows], job.pad_token_id)
            mask = pad([[1] * len(row["input_ids"]) for row in rows], 0)
            loss = ddp(input_ids=ids, attention_mask=mask, labels=pad([row["labels"] for row in rows], -100)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append({"step": step + 1, "loss": loss.item()})
        return Trained(parameters=full_parameters(model), history=history)
"""

SUITE = ("--pyargs", "pytest_ranks.conformance", "-p", "no:randomly")


@pytest.fixture
def user(pytester, monkeypatch):
    """Return a user's folder with a trainer that is wrong under DDP only."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(mine=MEAN_OF_MEANS)
    return pytester


def test_a_wrong_trainer_is_told_exactly_what_is_wrong(user):
    result = user.runpytest_subprocess(
        *SUITE, "--ranks-subject=mine.py:MyTrainer", "--ranks-suite=loss.token_weights,packing"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "loss *F*",
            "*_ loss.token_weights[[]ddp-2[]] _*",
            "loss.token_weights[[]ddp-2[]]: every loss-counted token MUST weigh 1/N",
            "  found:     weight x N runs from 0.7174 to 1.6500 (rank 0 micro-batch 0: 0.7174; "
            "rank 1 micro-batch 0: 1.6500)*",
            "  likely:    the loss is the mean of micro-batch means: * (match *; next best hypothesis off by *)",
            "  where:     mine.py:24",
            "  like:      https://github.com/huggingface/transformers/pull/34191",
            "  reproduce: pytest --pyargs pytest_ranks.conformance --ranks-subject=mine.py:MyTrainer "
            "*loss.token_weights?ddp-2?*",
            "*= verdict on mine.py:MyTrainer =*",
            "suite *claims *passed *failed *time",
            "loss * 1 * 2 * 1 * s",
            "packing * not applicable",
            "likely: the loss is the mean of micro-batch means*",
            "        breaks loss.token_weights",
            "not applicable: packing (8 checks): the subject does not declare packing",
            "FAILED: 1 claim does not hold; verified 0 of 9 claims in 3 settings",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_nothing_judged_is_no_pass(user):
    result = user.runpytest_subprocess(
        *SUITE, "--ranks-subject=mine.py:MyTrainer", "--ranks-suite=packing"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["FAILED: nothing was verified: no check passed or failed"])


def test_the_decorator_runs_checks_as_tests(user):
    user.makepyfile(
        test_mine="""
        from pytest_ranks.conformance import parametrize_with_checks
        from mine import MyTrainer

        @parametrize_with_checks(
            MyTrainer,
            suites=["loss.token_weights", "loss.targets[single]"],
            expected_failures={"loss.token_weights[ddp-2]": "mylib#12"},
        )
        def test_conformance(check):
            check()
        """
    )
    result = user.runpytest_subprocess("-p", "no:randomly", "-rx")
    result.assert_outcomes(passed=3, xfailed=1)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "XFAIL *test_conformance[[]loss.token_weights[[]ddp-2[]][]] - *mylib#12: weight x N runs from*",
        ]
    )
