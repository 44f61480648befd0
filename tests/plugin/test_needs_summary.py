from __future__ import annotations

from pytest_ranks.report.needs import Row
from pytest_ranks.report.terminal import table


def test_each_kind_of_need_has_a_line_and_each_reason(pytester, with_gpus) -> None:
    with_gpus(1)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("count", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2, 3, 3)])
        def test_gpu(count): pass

        @pytest.mark.trainium
        @pytest.mark.requires("pytest")
        def test_trainium(): pass

        @pytest.mark.requires("pytest", "pytest>=8")
        def test_package(): pass

        @pytest.mark.ranks([1, 2])
        def test_ranks(): pytest.skip("not today")

        def test_plain(): pass
        """
    )
    lines = pytester.runpytest().outlines
    start = next(n for n, line in enumerate(lines) if "ranks: what tests needed" in line)
    how = "(nvidia-smi: 1 device, driver 570.86.15)"
    no_neuron = (
        "(neuron-ls: absent; /sys/devices/virtual/neuron_device: absent; /dev/neuron*: absent)"
    )
    assert lines[start + 1 : start + 6] == [
        "need        selected   ran  skipped  why",
        f"gpu                4     1        3  2 x needs 3 GPUs, found 1 {how}",
        f"                                     1 x needs 2 GPUs, found 1 {how}",
        f"trainium           1     0        1  needs 1 Trainium core, found 0 {no_neuron}",
        f"requires           2     1        1  1 x needs 1 Trainium core, found 0 {no_neuron}",
    ]
    assert [line[:10] for line in lines[start + 6 : start + 8]] == ["ranks ws=1", "ranks ws=2"]


def test_a_session_without_needs_has_no_summary(pytester) -> None:
    pytester.makepyfile("def test_plain(): pass")
    assert "what tests needed" not in pytester.runpytest().stdout.str()


def test_a_quiet_session_has_no_summary(pytester, with_gpus) -> None:
    with_gpus(0)
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): pass")
    assert "what tests needed" not in pytester.runpytest("-q").stdout.str()


def test_an_expected_failure_that_does_not_run_says_so(pytester, with_gpus) -> None:
    with_gpus(1)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        @pytest.mark.xfail(run=False, reason="crashes the driver")
        def test_it(): pass
        """
    )
    result = pytester.runpytest()
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["gpu  *  1     0        1  *[[]NOTRUN[]] crashes the driver"])


def test_a_repeated_test_counts_once(pytester, with_gpus) -> None:
    with_gpus(1)
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): pass")
    result = pytester.runpytest(
        "test_a_repeated_test_counts_once.py",
        "--keep-duplicates",
        "test_a_repeated_test_counts_once.py",
    )
    result.stdout.fnmatch_lines(["gpu  *  1     1        0"])


def test_a_single_reason_of_all_tests_is_not_counted() -> None:
    rows = [Row(label="gpu", selected=3, ran=0, skipped=3, why={"too old": 3})]
    assert table(rows) == [
        "need  selected   ran  skipped  why",
        "gpu          3     0        3  too old",
    ]
