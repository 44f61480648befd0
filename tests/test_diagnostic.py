"""Why does the model not learn: the diagnosis on the reference trainer, and on trainers with a planted bug.

`pytest -k diagnostic -x` asks the questions in their order, also where other tests are shuffled.
"""

from __future__ import annotations

import pytest

from pytest_ranks.conformance import diagnosis
from pytest_ranks.conformance.check import Setting, all_checks
from pytest_ranks.conformance.materials import Materials
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.conformance.runner import Session, run_check
from pytest_ranks.conformance.self_check import SharedRanks, start_ranks
from pytest_ranks.conformance.subject import find_subject, inspect_subject

REFERENCE = "pytest_ranks.subjects.reference:ReferenceTrainer"


def questions(subject):
    """Return the checks of a diagnosis with their settings, in its order."""
    planned = [
        (check, setting)
        for check, setting, _ in plan_for(inspect_subject(find_subject(subject)), None)
        if diagnosis.is_step(check.id, setting)
    ]
    return sorted(planned, key=lambda pair: diagnosis.place_of(pair[0].id, pair[1]))


QUESTIONS = [
    pytest.param(check, setting, id=f"{number:02d}-{check.id}[{setting}]")
    for number, (check, setting) in enumerate(questions(REFERENCE), start=1)
]


@pytest.fixture(scope="module")
def ranks():
    with start_ranks() as started:
        yield started


@pytest.fixture(scope="module")
def session_of(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosis")
    materials = Materials(folder)
    return lambda subject: SharedRanks(subject, folder, ranks, materials)


@pytest.fixture(scope="module")
def reference(session_of):
    return session_of(REFERENCE)


@pytest.mark.parametrize(("check", "setting"), QUESTIONS)
def test_diagnostic(check, setting, reference: Session):
    result = run_check(reference, check, setting)
    assert result.outcome == "passed", f"{result.text}\n{diagnosis.advice(check.id)}"


MUTANTS, OURS = "pytest_ranks.reference.mutants", "bodies.subjects"
BUGS = [
    (f"{OURS}:NoLearningRateSubject", "subject.honours_job[single]", "lr"),
    (f"{MUTANTS}:ScheduleEndsEarly", "overfitting.single_sample[single]", "learning rate"),
    (f"{MUTANTS}:ShiftedTwiceInLoss", "overfitting.single_sample[single]", "shifted twice"),
    (f"{MUTANTS}:PromptsTrained", "loss.trained_positions[single]", "prompt"),
    (f"{OURS}:FrozenBlockSubject", "gradient_sync.every_tensor[single]", "mlp"),
    (f"{MUTANTS}:NormsLeftOut", "gradient_sync.every_tensor[single]", "norm"),
    (f"{MUTANTS}:DividedTwice", "loss.token_weights[single]", "gradient_accumulation_steps"),
    (
        f"{MUTANTS}:NeverDivided",
        "loss.token_weights[single]",
        "not divided by the number of tokens",
    ),
    (f"{MUTANTS}:WorldSizeForgotten", "gradient_sync.world_invariance[ddp-2]", "world_size"),
    (f"{MUTANTS}:NeverReduced", "gradient_sync.world_invariance[ddp-2]", "not reduced"),
]


@pytest.mark.parametrize(("subject", "wanted", "cause"), BUGS, ids=[bug[0] for bug in BUGS])
def test_the_first_no_points_at_the_bug(subject, wanted, cause, session_of):
    session = session_of(subject)
    strategy = "ddp" if "ddp" in wanted else "single"  # bugs of ranks do not show in one process
    asked = []
    for check, setting in questions(subject):
        if setting.strategy == strategy:
            result = run_check(session, check, setting)
            asked.append(f"{check.id}[{setting}]")
            if result.outcome != "passed":
                break
    assert asked[-1] == wanted, result.text
    assert cause in result.text


def test_every_step_is_a_check_and_gives_advice():
    for step in diagnosis.STEPS:
        assert step.check in all_checks()
        assert step.question.endswith("?")
    assert diagnosis.advice("gradient_sync.world_invariance") == (
        "  diagnostic: step 3 of 8: is the update independent of the number of ranks? No. If no step "
        "before it failed, look at the factor world_size, which DDP and FSDP2 divide by, the token "
        "count, which is summed over ranks, and whether gradients are reduced at all."
    )
    one, four = (Setting(strategy=s, world_size=n) for s, n in (("ddp", 1), ("ddp", 4)))
    assert not any(
        diagnosis.is_step(step.check, at) for step in diagnosis.STEPS for at in (one, four)
    )
    assert diagnosis.place_of("loss.targets", one) > diagnosis.place_of("loss.targets", TWO)


TWO = Setting(strategy="fsdp2", world_size=2)


def test_the_keyword_selects_the_steps_of_any_subject_in_their_order(pytester):
    command = ("--pyargs", "pytest_ranks.conformance", "--collect-only", "-q")
    result = pytester.runpytest_subprocess(*command, "-k", "diagnostic")
    chosen = [line.replace("::", ".") for line in result.outlines if "::" in line]
    assert chosen == [f"{check.id}[{setting}]" for check, setting in questions(REFERENCE)]


def test_a_failing_step_says_what_it_means(pytester):
    command = (
        "--pyargs",
        "pytest_ranks.conformance",
        "-x",
        "-p",
        "no:randomly",
        "-k",
        "diagnostic",
    )
    subject = "--ranks-subject=pytest_ranks.reference.mutants:ScheduleEndsEarly"
    result = pytester.runpytest_subprocess(*command, subject)
    result.assert_outcomes(passed=1, failed=1, deselected=None)
    result.stdout.fnmatch_lines(
        [
            "*overfitting.single_sample[[]single[]]*",
            f"{diagnosis.advice('overfitting.single_sample')}",
        ]
    )
