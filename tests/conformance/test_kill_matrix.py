"""Each planted bug is killed by the checks that it names, for the cause that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_ranks.conformance.check import all_checks
from pytest_ranks.conformance.materials import Materials
from pytest_ranks.conformance.self_check import (
    Chosen,
    SharedRanks,
    chosen_mutants,
    clean_checks,
    in_one_line,
    kill,
    pass_clean,
    print_matrix,
    start_ranks,
)
from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.host import RankHost

MUTANTS = chosen_mutants()
CLEAN = [
    pytest.param(subject, name, id=f"{subject.rpartition(':')[2]}-{name}")
    for subject, names in clean_checks(MUTANTS).items()
    for name in names
]


@pytest.fixture(scope="session")
def host() -> Iterator[RankHost]:
    with start_ranks() as ranks:
        yield ranks


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill-matrix")


@pytest.fixture(scope="session")
def materials(folder: Path) -> Materials:
    return Materials(folder)


@pytest.mark.parametrize("chosen", MUTANTS, ids=lambda chosen: chosen.mutant.name)
def test_a_mutant_is_killed_for_its_cause(
    chosen: Chosen, host: RankHost, folder: Path, materials: Materials
) -> None:
    entries = kill(SharedRanks(chosen.mutant.subject, folder, host, materials), chosen)
    survived = [in_one_line(entry) for entry in entries if not entry.killed]
    assert not survived, "\n".join([chosen.mutant.summary, *survived])


@pytest.mark.parametrize(("subject", "name"), CLEAN)
def test_a_clean_subject_passes(
    subject: str, name: str, host: RankHost, folder: Path, materials: Materials
) -> None:
    (entry,) = pass_clean(SharedRanks(subject, folder, host, materials), [name])
    assert entry.killed, entry.result.text


def test_every_check_has_a_mutant() -> None:
    killers = {name.partition("[")[0] for chosen in MUTANTS for name in chosen.kills}
    assert sorted(set(all_checks()) - killers) == []


@pytest.mark.parametrize("chosen", MUTANTS, ids=lambda chosen: chosen.mutant.name)
def test_a_mutant_says_what_it_is(chosen: Chosen) -> None:
    mutant = chosen.mutant
    assert mutant.row
    assert mutant.summary.endswith(".")
    assert not mutant.issue or mutant.issue.startswith("https://")
    assert mutant.kills
    assert all(len(fragment) >= 4 for fragment in mutant.kills.values())


def test_suites_choose_the_mutants_that_they_kill() -> None:
    only = chosen_mutants(["loss.any_forward"])
    assert [entry.mutant.name for entry in only] == ["MeanOfMeansWithoutKeywords"]


def test_an_unknown_mutant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(BadInputError, match=r"'MeanOfMean' is no mutant\..*'MeanOfMeans'"):
        chosen_mutants(only=["MeanOfMean"])


def test_the_matrix_names_survivors_and_failing_clean_checks(host: RankHost, folder: Path) -> None:
    (mutant,) = chosen_mutants(only=["NeverZeroed"])
    check = "gradient_sync.gradients_are_cleared[single]"
    killed = kill(SharedRanks(mutant.mutant.subject, folder, host), mutant)
    lines: list[str] = []
    assert print_matrix(killed, lines.append) == 0
    assert lines[-1] == "1 of 1 mutants killed; clean subject passes 0 checks"

    wrong = Chosen(mutant=mutant.mutant, kills={check: "another cause"})
    survived = kill(SharedRanks(mutant.mutant.subject, folder, host), wrong)
    unclean = pass_clean(SharedRanks(mutant.mutant.subject, folder, host), [check])
    lines = []
    assert print_matrix([*survived, *unclean], lines.append) == 1
    assert "SURVIVED: failed, but not for 'another cause'" in lines[1]
    assert f"clean subject  {check}  FAILS: failed" in lines[2]
    assert lines[-1] == "0 of 1 mutants killed; clean subject passes 0 of 1 checks"
