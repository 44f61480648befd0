from __future__ import annotations

import pytest
import torch

from pytest_ranks.conformance import Capabilities, Trained
from pytest_ranks.conformance.subject import (
    SubjectRef,
    find_subject,
    full_parameters,
    inspect_subject,
    validated,
)
from pytest_ranks.errors import BadInputError


class Plain:
    capabilities = Capabilities(world_sizes={1, 2}, strategies={"single", "ddp"})

    def train(self, job):
        return None


class WithoutTrain:
    capabilities = Capabilities()

    def trian(self, job):
        return None


class WithoutCapabilities:
    def train(self, job):
        return None


class WithoutJob:
    capabilities = Capabilities()

    def train(self):
        return None


class Exporting:
    capabilities = Capabilities(export=True)

    def train(self, job):
        return None


def test_defaults_are_closed():
    declared = Capabilities()
    assert declared.world_sizes == {1}
    assert declared.strategies == {"single"}
    for name in ("clip", "packing", "gradient_accumulation", "resume", "lora", "export"):
        assert not declared.has(name)


def test_requirements_are_looked_up_by_name_and_value():
    declared = Capabilities(precision={"fp32", "bf16"}, packing="rows")
    assert declared.has("precision:bf16")
    assert declared.has("packing")
    assert not declared.has("clip")
    assert not declared.has("optimizers:adamw")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"strategy": {"ddp"}}, "'strategy' is not a capability. Did you mean 'strategies'?"),
        (
            {"strategies": {"dpp"}},
            "expected a set of some of 'single', 'ddp', 'fsdp2'. Did you mean 'ddp'?",
        ),
        ({"strategies": "ddp"}, "strategies: found 'ddp', expected a set of some of"),
        ({"strategies": set()}, "strategies: found set(), expected a set of some of"),
        ({"world_sizes": {0}}, "world_sizes: found {0}, expected a set of whole numbers above 0"),
        ({"world_sizes": 2}, "world_sizes: found 2, expected a set of whole numbers above 0"),
        ({"world_sizes": {True}}, "world_sizes: found {True}, expected a set of whole numbers"),
        (
            {"packing": "row"},
            "packing: found 'row', expected one of None, 'rows', 'step', 'wrapped'",
        ),
        ({"clip": "yes"}, "clip: found 'yes', expected True or False"),
        ({"tail": "wrap"}, "tail: found 'wrap', expected one of 'drop', 'pad', 'partial', 'carry'"),
    ],
)
def test_a_wrong_capability_is_refused_by_name(declared, message):
    with pytest.raises(BadInputError) as caught:
        Capabilities(**declared)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (
            "nonsense",
            "found 'nonsense', expected 'package.module:Class' or 'path/to/file.py:Class'",
        ),
        ("no.such.module:Thing", "cannot be imported: ModuleNotFoundError"),
        ("no/such/file.py:Thing", "there is no Python file"),
        ("pytest_ranks.subjects.reference:ReferenceTrianer", "Did you mean 'ReferenceTrainer'?"),
        ("pytest_ranks.subjects.reference:config_of", "expected a class with `capabilities`"),
        (WithoutTrain, "has no method train(self, job). Did you mean 'trian'?"),
        (WithoutCapabilities, "`capabilities` is None, expected Capabilities(...)"),
        (WithoutJob, "found train(self), expected train(self, job)"),
        (Exporting, "declares export=True but has no method export(self, out_dir)"),
    ],
)
def test_a_subject_that_cannot_be_used_is_refused_in_one_sentence(subject, message):
    with pytest.raises(BadInputError) as caught:
        inspect_subject(find_subject(subject))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_inside_a_function_is_refused():
    class Local:
        capabilities = Capabilities()

    with pytest.raises(BadInputError, match="move the class to the top of its module"):
        find_subject(Local)


def test_a_file_that_does_not_import_is_refused(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_library\n")
    with pytest.raises(
        BadInputError,
        match="cannot be imported: ModuleNotFoundError: No module named 'no_such_library'",
    ):
        inspect_subject(find_subject(f"{file}:Mine"))


def test_a_class_of_this_file_is_found_again_by_its_reference():
    ref = find_subject(Plain)
    assert isinstance(ref, SubjectRef)
    assert ref.file == __file__
    assert inspect_subject(ref) is Plain.capabilities


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "train returned NoneType on rank 0, expected Trained"),
        ({"parameters": {}}, "train returned dict on rank 0, expected Trained"),
        (Trained(), "Trained has both or none of parameters and model_dir"),
        (
            Trained(parameters={}, model_dir="x"),
            "Trained has both or none of parameters and model_dir",
        ),
        (
            Trained(parameters={}, history=[{"step": 1}]),
            "a history row has loss=None, expected a number",
        ),
        (Trained(parameters={}, history=[{"loss": "low"}]), "a history row has loss='low'"),
        (Trained(parameters={}, history=None), "history=None, expected a list with a dict"),
        (Trained(parameters={}, history=[3]), "a history row is 3, expected a dict with at least"),
        (Trained(parameters={"a": 1}), "the parameter 'a' is of type int, expected a torch.Tensor"),
    ],
)
def test_a_wrong_result_is_refused(result, message):
    with pytest.raises(BadInputError) as caught:
        validated(result, ref="mylib:Mine")
    assert message in str(caught.value)


def test_full_parameters_sees_through_wrappers():
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    names = list(full_parameters(plain))
    assert list(full_parameters(torch.compile(plain))) == names

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert list(full_parameters(Wrapper(plain))) == names
    copied = full_parameters(plain)["0.weight"]
    copied.zero_()
    assert plain[0].weight.abs().sum() > 0
