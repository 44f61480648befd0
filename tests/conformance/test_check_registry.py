from __future__ import annotations

from pathlib import Path

import pytest

from pytest_ranks.conformance import Capabilities
from pytest_ranks.conformance.check import PARTS, all_checks, select, suites, valid_expectations
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.errors import BadInputError

GOLDEN = Path(__file__).parent.parent / "data" / "check_ids.txt"
EVERYTHING = Capabilities(
    world_sizes={1, 2, 4},
    strategies={"single", "ddp", "fsdp2"},
    gradient_accumulation=True,
    packing="step",
    clip=True,
    precision={"fp32", "bf16"},
    optimizers={"sgd", "adamw"},
    activation_checkpointing=True,
)


def test_the_list_of_checks_changes_only_on_purpose():
    assert "\n".join(sorted(all_checks())) + "\n" == GOLDEN.read_text()


@pytest.mark.parametrize("name", sorted(all_checks()))
def test_every_check_says_what_it_claims_and_why(name):
    check = all_checks()[name]
    for part in PARTS:
        assert check.part(part), f"{name} lacks {part!r} in its docstring"
    assert "MUST" in check.part("Claim")
    assert check.part("Reference").startswith("https://")


def test_suites_are_those_of_the_files_with_the_adapter_first():
    assert suites()[0] == "subject"
    assert set(suites()) == {
        "subject",
        "loss",
        "gradient_sync",
        "data_loading",
        "packing",
        "mixed_precision",
        "overfitting",
    }


def test_a_suite_or_an_id_selects():
    assert {check.suite for check in select(["loss"])} == {"loss"}
    assert [check.id for check in select(["loss.targets"])] == ["loss.targets"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("los", "loss"), ("loss.tokn_weights", "loss.token_weights"), ("packings", "packing")],
)
def test_a_misspelt_selection_is_refused_with_a_suggestion(name, near):
    with pytest.raises(BadInputError, match=f"names no suite and no check. Did you mean '{near}'"):
        select([name])


def test_a_misspelt_expected_failure_is_refused_with_a_suggestion():
    valid_expectations(["loss.targets", "loss.targets[ddp-2]"])
    with pytest.raises(
        BadInputError, match=r"expected_failures names no check 'loss.target'. Did you mean"
    ):
        valid_expectations(["loss.target"])


def test_every_strategy_and_world_size_is_judged():
    settings = {str(setting) for _, setting, _ in plan_for(EVERYTHING, None)}
    assert settings == {"single", "ddp-1", "ddp-2", "ddp-4", "fsdp2-1", "fsdp2-2", "fsdp2-4"}


def test_what_is_not_declared_is_planned_once_without_a_setting():
    planned = plan_for(Capabilities(), ["packing", "loss.targets"])
    assert {str(setting) for check, setting, _ in planned if check.suite == "packing"} == {"None"}
    assert [str(setting) for check, setting, _ in planned if check.suite == "loss"] == ["single"]


def test_a_setting_selects_itself_and_leaves_other_checks_theirs():
    planned = plan_for(EVERYTHING, ["loss.targets[ddp-2]", "overfitting.single_sample"])
    chosen = [(check.id, str(setting)) for check, setting, _ in planned]
    assert [setting for name, setting in chosen if name == "loss.targets"] == ["ddp-2"]
    assert len([setting for name, setting in chosen if name == "overfitting.single_sample"]) == 5


def test_a_setting_that_the_subject_lacks_is_refused():
    with pytest.raises(
        BadInputError,
        match=r"loss\.targets has no setting 'fsdp2-2' for this subject\. Its settings: single",
    ):
        plan_for(Capabilities(), ["loss.targets[fsdp2-2]"])


def test_expected_failures_hold_for_an_id_or_for_one_setting():
    reasons = {"loss.targets": "known", "loss.token_weights[ddp-2]": "mylib#12"}
    planned = plan_for(EVERYTHING, ["loss.targets", "loss.token_weights"], reasons)
    assert {reason for check, _, reason in planned if check.id == "loss.targets"} == {"known"}
    weights = {
        str(setting): reason
        for check, setting, reason in planned
        if check.id == "loss.token_weights"
    }
    assert weights["ddp-2"] == "mylib#12"
    assert weights["single"] is None
