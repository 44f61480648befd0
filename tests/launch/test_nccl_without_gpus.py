"""Ranks with a GPU each, on a machine that has none: skipped with the reason, never run on the CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")


def test_ranks_with_nccl_are_skipped_where_there_are_no_gpus(pytester, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.ranks(2, backend="nccl")
        def test_on_gpus(rank):
            assert rank.device.type == "cuda"
        """
    )
    result = pytester.runpytest_subprocess("-rs", "-p", "no:randomly")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * backend 'nccl': needs 2 *found 0*"])
