from __future__ import annotations

import pytest

from pytest_ranks import _compat
from pytest_ranks.errors import BadInputError, UnavailableError
from pytest_ranks.launch.injection.triggers import AfterSeconds, AtCollective, AtStep, parse, step

NAMES = (
    "all_reduce, all_reduce_coalesced, broadcast, reduce, all_gather, all_gather_coalesced, "
    "all_gather_into_tensor, reduce_scatter, reduce_scatter_tensor, gather, scatter, all_to_all, "
    "all_to_all_single, barrier, monitored_barrier, send, recv"
)


@pytest.mark.parametrize(
    ("at", "after", "trigger"),
    [
        (None, None, None),
        ("all_reduce#3", None, AtCollective(name="all_reduce", number=3)),
        ("#5", None, AtCollective(name="", number=5)),
        (step(2), None, AtStep(number=2, when="before")),
        (None, 0, AfterSeconds(seconds=0.0)),
    ],
)
def test_triggers_are_read(at, after, trigger):
    assert parse("faults.kill", at, after) == trigger


def test_a_step_is_shown_as_it_is_written():
    assert [repr(step(2)), repr(step(3, when="after"))] == ["step(2)", "step(3, when='after')"]


FORMS = (
    "expected a collective and its number, such as 'all_reduce#3', '#5' for the fifth of any name, "
    "or step(2)."
)


@pytest.mark.parametrize(
    ("at", "after", "text"),
    [
        ("all_reduce", None, f"faults.kill(at='all_reduce'): {FORMS}"),
        (3, None, f"faults.kill(at=3): {FORMS}"),
        (
            "all_reduc#3",
            None,
            f"faults.kill(at='all_reduc#3'): unknown collective 'all_reduc', expected one of "
            f"{NAMES}. Did you mean 'all_reduce#3'?",
        ),
        ("barrier#0", None, "faults.kill(at='barrier#0'): number 0, they are counted from 1."),
        (None, "1", "faults.kill(after='1'): expected a number of seconds, 0 or more."),
        (step(1), 1, "faults.kill(at=step(1), after=1): expected one of them."),
    ],
)
def test_bad_triggers_get_one_sentence(at, after, text):
    with pytest.raises(BadInputError) as caught:
        parse("faults.kill", at, after)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"number": 0}, "step(0): expected a whole number of at least 1."),
        ({"number": True}, "step(True): expected a whole number of at least 1."),
        (
            {"number": 1, "when": "befor"},
            "step(1, when='befor'): expected 'before' or 'after' the parameters change. "
            "Did you mean 'before'?",
        ),
    ],
)
def test_bad_steps_get_one_sentence(arguments, text):
    with pytest.raises(BadInputError) as caught:
        step(**arguments)
    assert str(caught.value) == text


def test_a_torch_that_hides_its_collectives_is_named(monkeypatch):
    torch = pytest.importorskip("torch")
    from pytest_ranks.launch.injection.collective_calls import Collectives

    monkeypatch.setattr(_compat, "intercept_operators", lambda *_: None)
    with pytest.raises(UnavailableError) as caught:
        Collectives(lambda _, issue: issue()).start()
    assert str(caught.value) == (
        f"collectives cannot be seen in torch {torch.__version__}: it lacks the names of its "
        "dispatcher that this needs (found in 2.11 to 2.13)."
    )


S = 4000  # bytes of 1,000 numbers


@pytest.mark.parametrize(
    ("name", "arguments", "steps", "moved"),
    [
        ("all_reduce", "in", 6, 1.5 * S),
        ("all_gather", "outs in", 3, 3 * S),
        ("all_gather_into_tensor", "outs in", 3, 3 * S),
        ("reduce_scatter", "out ins", 3, 3 * S),
        ("reduce_scatter_tensor", "out ins", 3, 3 * S),
        ("all_to_all_single", "ins ins", 3, 0.75 * 4 * S),
        ("broadcast", "in", 3, S),
        ("reduce", "in", 3, S),
        ("gather", "outs in group 1", 1, 3 * S),
        ("gather", "outs in group 0", 1, S),
        ("scatter", "out ins group 1", 1, 3 * S),
        ("scatter", "out ins group 0", 1, S),
        ("barrier", "one", 6, 0),
        ("send", "in", 1, S),
    ],
)
def test_a_collective_costs_what_the_ring_model_says(name, arguments, steps, moved):
    """Four ranks, of which this is number 1."""
    torch = pytest.importorskip("torch")
    from pytest_ranks.launch.injection.collective_calls import Issued
    from pytest_ranks.launch.injection.slow_link import SlowLink, cost

    one = torch.zeros(1000)
    values = {
        "in": [one],
        "out": [one],
        "ins": [[one] * 4],
        "outs": [[one] * 4],
        "one": torch.zeros(1),
        "group": object(),
        "0": 0,
        "1": 1,
    }

    def issued(size):
        return Issued(
            name=name,
            number=1,
            total=1,
            group="0",
            group_number=1,
            group_size=size,
            group_rank=1,
            arguments=tuple(values[word] for word in arguments.split()),
        )

    assert cost(issued(4)) == (steps, moved)
    assert cost(issued(1)) == (0, 0)
    link = SlowLink(bandwidth=S, latency=10)
    assert link.seconds(issued(4)) == steps * 10 + moved / S
