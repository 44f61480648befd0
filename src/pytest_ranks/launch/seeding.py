"""The random generators of a rank, seeded alike before each test."""

from __future__ import annotations

import functools
import random
import sys

SEED = 0


def load_generators() -> None:
    """Import what `seed_everything` needs: a rank that does so itself takes 7 ms for it."""
    if (numpy := sys.modules.get("numpy")) is not None:
        _ = numpy.random  # which numpy imports when it is first looked up


def seed_everything() -> None:
    """Seed Python's, numpy's and torch's generators, those that are loaded."""
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    if (torch := sys.modules.get("torch")) is None:
        return
    if _has_accelerator():
        torch.manual_seed(SEED)
    else:
        # the whole of it formats the stack for each kind of device that is not there: 0.5 ms
        torch.default_generator.manual_seed(SEED)


def _has_accelerator() -> bool:
    """Return whether torch was built for a kind of device, and has one here."""
    import torch

    found = torch.accelerator.current_accelerator()
    return found is not None and (found.type != "cuda" or _has_cuda())


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
