"""What a zygote does before it forks."""

from __future__ import annotations

import subprocess
import sys

import pytest

BODY = """
import gc
from pytest_ranks.launch.preparation import keeping_all
{before}
was = gc.isenabled(), gc.get_freeze_count()
with keeping_all():
    made = [[] for _ in range(10_000)]  # as an import does; a look for garbage would come in between
    inside = gc.isenabled()
print(was[0], inside, gc.isenabled(), gc.get_freeze_count() - was[1] >= 10_000)
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [("pass", "True False True True"), ("gc.disable()", "False False False True")],
)
def test_what_is_imported_is_no_garbage_and_none_of_a_collectors_business(before, expected):
    done = subprocess.run(
        [sys.executable, "-c", BODY.format(before=before)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == expected, done.stderr


def test_what_every_rank_would_import_to_be_seeded_is_imported_once():
    pytest.importorskip("numpy")
    body = """
import sys
from pytest_ranks.launch.preparation import prepare
from pytest_ranks.launch.seeding import seed_everything
from pytest_ranks.launch.wire import Prepare
prepare(Prepare(modules=("numpy", "torch")))
before = set(sys.modules)
seed_everything()
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
