"""The marks: their signatures, what they mean, and what a test item needs because of them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_ranks.hardware.found import Hardware
    from pytest_ranks.hardware.requirements import Need
    from pytest_ranks.launch.spec import RankSpec

# The parameter that tells the items of `ranks([1, 2, 4])` apart.
RANKS_PARAMETER = "_ranks_spec"


def gpu(
    count: int = 1,
    *,
    vendor: str | None = None,
    memory: int | str | None = None,
    capability: tuple[int, int] | str | None = None,
) -> tuple[Need, ...]:
    """Return what the mark `gpu` with these arguments asks for.

    Args:
        count: how many GPUs.
        vendor: "cuda", "rocm" or "xpu"; None means any of them.
        memory: bytes, or a text such as "40GiB", that each GPU has at least.
        capability: the least architecture version of each GPU, (9, 0) or "9.0".

    Raises:
        BadInputError: an argument cannot be used.
    """
    from pytest_ranks.hardware import requirements

    return (
        requirements.DeviceNeed(
            kind="gpu",
            count=_at_least("gpu", "count", count, 1),
            among=requirements.parse_vendor(vendor),
            memory=None if memory is None else requirements.parse_memory(memory),
            capability=None if capability is None else requirements.parse_capability(capability),
        ),
    )


def multi_gpu(count: int = 2) -> tuple[Need, ...]:
    """Return what the mark `multi_gpu` with these arguments asks for.

    Raises:
        BadInputError: the count is not a whole number of at least 2.
    """
    from pytest_ranks.hardware.requirements import DeviceNeed

    return (DeviceNeed(kind="multi_gpu", count=_at_least("multi_gpu", "count", count, 2)),)


def trainium(cores: int = 1) -> tuple[Need, ...]:
    """Return what the mark `trainium` with these arguments asks for.

    Raises:
        BadInputError: the number of cores is not a whole number of at least 1.
    """
    from pytest_ranks.hardware.requirements import DeviceNeed

    number = _at_least("trainium", "cores", cores, 1)
    return (DeviceNeed(kind="trainium", count=number, among=("neuron",)),)


def requires(*packages: str) -> tuple[Need, ...]:
    """Return what the mark `requires` with these arguments asks for.

    Args:
        packages: modules or distributions, each with an optional version: "flash_attn>=2.8".

    Raises:
        BadInputError: nothing is named, or a text cannot be read.
    """
    from pytest_ranks.hardware.requirements import parse_package

    if not packages:
        raise BadInputError("expected at least one package, such as requires('flash_attn>=2.8').")
    return tuple(parse_package(package) for package in packages)


def _at_least(mark: str, name: str, value: object, least: int) -> int:
    """Return a count that a mark was given, if it is one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        hint = " For one GPU use the mark gpu." if mark == "multi_gpu" and value == 1 else ""
        raise BadInputError(f"{name}={value!r}, expected a whole number of at least {least}.{hint}")
    return value


# Dataclasses would cost every pytest session half a millisecond more, each.
class Mark(NamedTuple):
    """One mark.

    Attributes:
        name: how it is written after `pytest.mark.`.
        signature: its arguments.
        text: what it means, for `pytest --markers`.
        needs: makes its needs from its arguments; None for `ranks`, whose function is
            `launch.spec.ranks`.
    """

    name: str
    signature: str
    text: str
    needs: Callable[..., tuple[Need, ...]] | None


def _signature(function: Callable[..., object]) -> str:
    """Return a function's signature without its annotations."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


MARKS = (
    Mark(
        name="ranks",
        # Written out, so that a session without such a mark imports nothing of the engine.
        signature="(world_size=None, /, *, dp=None, tp=None, pp=None, cp=None, ep=None, "
        "timeout=None, backend=None, isolate=False, init=True, keep_group=False, fidelity=None, "
        "lowest_fidelity=None, as_rank=None, device=None, "
        "expect_deaths=None)",
        text="run the test on this many rank processes. world_size: a number, or several for one "
        "test item each; dp, tp, pp, cp, ep: sizes of a device mesh, in this order as written; a "
        "size may be the name of a parametrized argument of the test; timeout: "
        "seconds once the ranks are ready; backend: of the process group; isolate: fresh "
        "processes for this test alone; init: whether the process group is initialised before the "
        "test; keep_group: keep it for the next test under the same mark where it is proven clean; "
        "fidelity: how real the ranks are, or several for one test "
        "item each; lowest_fidelity: the lowest that the test is valid on; expect_deaths: rank -> "
        "signal or exit code that has to end its process.",
        needs=None,
    ),
    Mark(
        name="gpu",
        signature=_signature(gpu),
        text="the test needs GPUs, or is skipped. count: how many; vendor: 'cuda', 'rocm' or "
        "'xpu', None for any; memory: of each, bytes or '40GiB'; capability: least of each, "
        "(9, 0) or '9.0'.",
        needs=gpu,
    ),
    Mark(
        name="multi_gpu",
        signature=_signature(multi_gpu),
        text="the test needs several GPUs of one vendor, or is skipped. count: how many.",
        needs=multi_gpu,
    ),
    Mark(
        name="trainium",
        signature=_signature(trainium),
        text="the test needs AWS Trainium, or is skipped. cores: how many logical NeuronCores.",
        needs=trainium,
    ),
    Mark(
        name="requires",
        signature=_signature(requires),
        text="the test needs installed packages, or is skipped. packages: modules or "
        "distributions, each with an optional PEP 440 version, 'flash_attn>=2.8'.",
        needs=requires,
    ),
)


class Asked(NamedTuple):
    """What an item's marks ask for.

    Attributes:
        needs: what the machine has to have.
        spec: the ranks that the item runs on, or None.
        error: the sentence about a mark that cannot be used, or None.
        skip: why the item cannot run as it is asked to, or None.
    """

    needs: tuple[Need, ...] = ()
    spec: RankSpec | None = None
    error: str | None = None
    skip: str | None = None


NOTHING = Asked()
ASKED_KEY = pytest.StashKey[Asked]()
HARDWARE_KEY = pytest.StashKey["Hardware"]()


def _ours(config: pytest.Config) -> dict[str, Mark]:
    """Return the marks that are this plugin's in this project."""
    every = settings(config).hardware_marks
    return {mark.name: mark for mark in MARKS if every or mark.name == "ranks"}


def register(config: pytest.Config) -> None:
    """Declare the marks, for `--markers` and `--strict-markers`."""
    for mark in _ours(config).values():
        config.addinivalue_line("markers", f"{mark.name}{mark.signature}: {mark.text}")


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Make one item for each world size and fidelity that a `ranks` mark lists."""
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is None:
        return
    try:
        specs = _rank_specs(mark, {})
    except BadInputError:  # or a size that is a parameter of the item
        return  # `read` tells it for the item; here it would take the whole module along.
    if len(specs) > 1:
        metafunc.fixturenames.append(RANKS_PARAMETER)
        metafunc.parametrize(RANKS_PARAMETER, specs, ids=_ids(specs))


def _ids(specs: tuple[RankSpec, ...]) -> list[str]:
    """Return the ids of one mark's items; a fidelity is in them where the mark lists several."""
    has_several = len({spec.fidelity for spec in specs}) > 1
    return [f"ws={spec.world_size}" + f"-{spec.fidelity}" * has_several for spec in specs]


def use_fidelity(collector: pytest.Collector, name: str, obj: object) -> None:
    """Have a test with the mark `ranks` use the fixture that says its fidelity, as anyio does."""
    if not isinstance(collector, pytest.Module | pytest.Class):
        return
    own = getattr(obj, "pytestmark", ())
    if not own and collector.get_closest_marker("ranks") is None:
        return
    names = {mark.name for mark in own if isinstance(mark, pytest.Mark)}
    is_marked = "ranks" in names or collector.get_closest_marker("ranks") is not None
    is_used = any("ranks_fidelity" in mark.args for mark in own if isinstance(mark, pytest.Mark))
    if is_marked and not is_used and collector.istestfunction(obj, name):
        pytest.mark.usefixtures("ranks_fidelity")(obj)


def read(item: pytest.Item) -> Asked:
    """Return what an item's marks ask for, read once."""
    asked = item.stash.get(ASKED_KEY, None)
    if asked is None:
        ours = _ours(item.config)
        marks = [mark for mark in item.iter_markers() if mark.name in ours]
        asked = _read(item, marks, ours) if marks else NOTHING
        item.stash[ASKED_KEY] = asked
    return asked


def _read(item: pytest.Item, marks: list[pytest.Mark], ours: dict[str, Mark]) -> Asked:
    """Call each mark's function with the mark's arguments."""
    from pytest_ranks import mark_arguments

    needs: list[Need] = []
    spec: RankSpec | None = None
    skip: str | None = None
    for mark in marks:
        row = ours[mark.name]
        try:
            if row.needs is not None:
                needs += mark_arguments.call(row.needs, mark)
            elif spec is None:  # the closest mark comes first and is the one that counts
                spec, skip = _choose(item, _rank_specs(mark, _parameters(item)))
                needs.append(_ranks_need(spec))
        except BadInputError as error:
            return Asked(error=f"{item.nodeid}: mark {error}")
    return Asked(needs=tuple(dict.fromkeys(needs)), spec=spec, skip=skip)


def _rank_specs(mark: pytest.Mark, parameters: Mapping[str, object]) -> tuple[RankSpec, ...]:
    """Call the function that has the real signature of `ranks`; its errors name the mark."""
    from pytest_ranks import mark_arguments
    from pytest_ranks.launch.spec import fill, ranks

    arguments, keywords = fill(mark.args, mark.kwargs, parameters)
    call: Callable[..., tuple[RankSpec, ...]] = ranks  # it checks what the mark's author wrote
    mark_arguments.check_positional(ranks, mark)
    return call(*arguments, **keywords)


def _choose(item: pytest.Item, specs: tuple[RankSpec, ...]) -> tuple[RankSpec, str | None]:
    """Return the spec of this item, within the most ranks that a test may ask for, or a skip."""
    from pytest_ranks.launch.fidelity.choice import choose

    parameters = _parameters(item)
    if len(specs) > 1 and RANKS_PARAMETER not in parameters:
        raise BadInputError(
            f"ranks: {', '.join(_ids(specs))}, expected one: pytest can repeat neither methods of "
            "unittest.TestCase nor a test because of a mark on one of its parameters."
        )
    chosen = settings(item.config)
    spec, skip = choose(item, parameters.get(RANKS_PARAMETER, specs[0]), parameters, chosen)
    if spec.is_limited and spec.world_size > chosen.max_world_size:
        source = chosen.source("max_world_size")
        raise BadInputError(
            f"ranks: world size {spec.world_size}, expected at most {chosen.max_world_size} "
            f"({source}); allow more with --ranks-max-world-size={spec.world_size}."
        )
    return spec, skip


def _parameters(item: pytest.Item) -> Mapping[str, Any]:
    """Return the values of an item's parametrized arguments."""
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def _ranks_need(spec: RankSpec) -> Need:
    """Return what the machine has to have for a spec."""
    from pytest_ranks.hardware.requirements import RanksNeed

    return RanksNeed(world_size=spec.world_size, backend=spec.backend, fidelity=spec.fidelity)


def hardware(config: pytest.Config) -> Hardware:
    """Return what this machine has, looked at once a session and only when asked."""
    if HARDWARE_KEY not in config.stash:
        from pytest_ranks.hardware.found import Hardware

        found = config.hook.pytest_ranks_hardware(config=config)
        if not isinstance(found, Hardware):
            text = f"pytest_ranks_hardware: found {found!r}, expected what probe() returns"
            pytest.fail(text, pytrace=False)
        config.stash[HARDWARE_KEY] = found
    return config.stash[HARDWARE_KEY]


def skip_reason(item: pytest.Item) -> str | None:
    """Return why an item cannot run on this machine, or None where it can."""
    asked = read(item)
    if asked.skip is not None or not asked.needs:
        return asked.skip
    from pytest_ranks.hardware.requirements import unmet

    for need in asked.needs:
        reason = unmet(need, hardware=lambda: hardware(item.config))
        if reason is not None:
            return reason
    return None


def enforce(item: pytest.Item) -> None:
    """Fail an item whose mark is bad; have one skipped whose need is not met."""
    error = read(item).error
    if error is not None:
        pytest.fail(error, pytrace=False)
    reason = skip_reason(item)
    if reason is not None:
        skip(item, reason)


def skip(item: pytest.Item, reason: str) -> None:
    """Have an item skipped that is about to be set up.

    The skip is left to pytest's own mark, which reports the test's place, not ours.
    """
    if not item.config.pluginmanager.has_plugin("skipping"):
        pytest.skip(reason)
    item.add_marker(pytest.mark.skip(reason=reason))


def fail_collect_only(session: pytest.Session) -> None:
    """Report bad marks where no test will run that could.

    Raises:
        pytest.UsageError: there is a bad mark in a session that only collects.
    """
    if session.config.option.collectonly:
        errors = [error for item in session.items if (error := read(item).error)]
        if errors:
            raise pytest.UsageError(*errors)


def markdown() -> str:
    """Return the marks as a table of the documentation."""
    rows = [f"| `{mark.name}{mark.signature}` | {mark.text} |" for mark in MARKS]
    return "\n".join(["| mark | what it means |", "| --- | --- |", *rows]) + "\n"
