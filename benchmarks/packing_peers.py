"""Other people's packers, called as they are installed, behind one shape.

Each peer is the code of its own distribution: the functions that pack are taken out of the installed
file, because the packages around them import whole training stacks. Those that know no ranks make bins,
which are dealt out in their order. A peer that is not installed says so.
"""

from __future__ import annotations

import ast
import heapq
import importlib
from collections import defaultdict, deque
from collections.abc import Callable
from importlib import metadata
from itertools import chain
from typing import Any

from pytest_ranks.reference.packing_comparison import Refused

MicroBatches = list[list[list[int]]]  # for each micro-batch, for each rank, indices
Packer = Callable[[list[int], int, int], MicroBatches]


def functions(distribution: str, file: str, names: tuple[str, ...], **known: Any) -> dict[str, Any]:
    """Return definitions out of an installed file, with the names that they use.

    Raises:
        ImportError: the distribution, or a module that its code uses, is not installed.
    """
    try:
        found = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed") from None
    path = next((one for one in found if str(one) == file), None)
    if path is None:
        raise ImportError(f"{distribution} {metadata.version(distribution)} has no {file}")
    tree = ast.parse(path.read_text())
    kept = [one for one in tree.body if getattr(one, "name", None) in names]
    scope = {"__name__": file, **known}
    exec(compile(ast.Module(body=kept, type_ignores=[]), file, "exec"), scope)
    return scope


def dealt(bins: list[list[int]], world_size: int) -> MicroBatches:
    """Deal bins out to ranks in their order."""
    groups = [bins[start : start + world_size] for start in range(0, len(bins), world_size)]
    return [group + [[] for _ in range(world_size - len(group))] for group in groups]


def instructlab() -> Packer:
    """instructlab-training's LPT: each rank asks for its own part."""
    numba, numpy = importlib.import_module("numba"), importlib.import_module("numpy")
    names = (
        *("_lpt_check_heap", "_lpt_distribute_heap", "_batch_to_minibatches_lpt_core"),
        "batch_lengths_to_minibatches_lpt",
    )
    found = functions(
        "instructlab-training",
        "instructlab/training/batch_packer.py",
        names,
        njit=numba.njit,
        int64=numba.int64,
        np=numpy,
    )["batch_lengths_to_minibatches_lpt"]

    def pack(lengths: list[int], capacity: int, world_size: int) -> MicroBatches:
        parts = [found(lengths, capacity, world_size, rank) for rank in range(world_size)]
        return [
            [[index for index in indices if index >= 0] for indices in ranks]
            for ranks in zip(*parts, strict=True)
        ]

    return pack


def verl() -> Packer:
    """verl's Karmarkar-Karp over ranks, then over as many micro-batches as fit on every rank."""
    found = functions(
        "verl",
        "verl/utils/seqlen_balancing.py",
        ("karmarkar_karp", "get_seqlen_balanced_partitions"),
        heapq=heapq,
        chain=chain,
    )["get_seqlen_balanced_partitions"]

    def pack(lengths: list[int], capacity: int, world_size: int) -> MicroBatches:
        try:
            own = found(lengths, world_size, equal_size=True)
            tokens = [sum(lengths[index] for index in part) for part in own]
            count = max(1, -(-max(tokens) // capacity))
            while True:  # its own rule, raised until all fit: as it is, rows pass the limit
                parts = [
                    [
                        [part[i] for i in group]
                        for group in found([lengths[i] for i in part], count, equal_size=False)
                    ]
                    for part in own
                ]
                loads = [sum(lengths[i] for i in group) for part in parts for group in part]
                if max(loads) <= capacity:
                    break
                count += 1
        except AssertionError as error:
            raise Refused(str(error)) from None
        for part in parts:
            part.sort(key=lambda group: -sum(lengths[i] for i in group))
        return [list(ranks) for ranks in zip(*parts, strict=True)]

    return pack


def axolotl() -> Packer:
    """axolotl's first-fit, dealt."""
    numba, numpy = importlib.import_module("numba"), importlib.import_module("numpy")
    names = ("ffd_check", "pack_group", "_process_group", "pack_parallel")
    found = functions(
        "axolotl", "axolotl/utils/samplers/multipack.py", names, numba=numba, np=numpy
    )

    def pack(lengths: list[int], capacity: int, world_size: int) -> MicroBatches:
        bins = found["pack_group"](
            numpy.array(lengths), 0, capacity, len(lengths), max(len(lengths), 1), False
        )
        return dealt([list(map(int, one)) for one in bins], world_size)

    return pack


def trl() -> Packer:
    """TRL's best-fit decreasing, dealt."""
    numpy, arrow = importlib.import_module("numpy"), importlib.import_module("pyarrow")
    compute = importlib.import_module("pyarrow.compute")
    found = functions(
        "trl",
        "trl/data_utils.py",
        ("_SegmentTree", "_pack_bfd", "_check_if_columns_can_be_packed"),
        np=numpy,
        pa=arrow,
        pyarrow=arrow,
        pc=compute,
        defaultdict=defaultdict,
        deque=deque,
        Literal=__import__("typing").Literal,
    )["_pack_bfd"]

    def pack(lengths: list[int], capacity: int, world_size: int) -> MicroBatches:
        table = arrow.table(
            {"index": arrow.array([[i] * length for i, length in enumerate(lengths)])}
        )
        packed = found(table, capacity)
        bins = [list(dict.fromkeys(row)) for row in packed["index"].to_pylist()]
        return dealt(bins, world_size)

    return pack


def binpacking() -> Packer:
    """binpacking.to_constant_volume, which ms-swift calls, dealt."""
    found = importlib.import_module("binpacking").to_constant_volume

    def pack(lengths: list[int], capacity: int, world_size: int) -> MicroBatches:
        items = list(enumerate(lengths))
        bins = found(items, capacity, weight_pos=1)
        return dealt([[index for index, _ in one] for one in bins], world_size)

    return pack


PEERS: dict[str, Callable[[], Packer]] = {
    "instructlab-training LPT": instructlab,
    "verl Karmarkar-Karp": verl,
    "TRL best-fit, dealt": trl,
    "axolotl first-fit, dealt": axolotl,
    "binpacking (ms-swift), dealt": binpacking,
}
