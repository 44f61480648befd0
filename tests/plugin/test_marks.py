from __future__ import annotations

import inspect
import textwrap

import pytest

from pytest_ranks import marks
from pytest_ranks.launch.spec import ranks


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("gpu(cout=2)", "gpu(cout=...): unknown argument 'cout', did you mean 'count'?"),
        (
            "gpu(1, 2)",
            "gpu(1, 2): found 2 arguments without a name, expected count alone; write others by name.",
        ),
        ("gpu(0)", "gpu: count=0, expected a whole number of at least 1."),
        ("gpu('2')", "gpu: count='2', expected a whole number of at least 1."),
        ("gpu(True)", "gpu: count=True, expected a whole number of at least 1."),
        (
            "gpu(vendor='nvidia')",
            "gpu: vendor='nvidia' is unknown; choose from cuda, rocm, xpu. Did you mean 'cuda'?",
        ),
        (
            "gpu(memory='40GB')",
            "gpu: memory='40GB' is no size; write bytes or a text such as '40GiB'.",
        ),
        (
            "gpu(capability=9.0)",
            "gpu: capability=9.0 is no version; write (9, 0) or '9.0'.",
        ),
        (
            "multi_gpu(1)",
            "multi_gpu: count=1, expected a whole number of at least 2. For one GPU use the mark "
            "gpu.",
        ),
        (
            "trainium(count=2)",
            "trainium(count=...): unknown argument 'count', expected cores.",
        ),
        (
            "requires()",
            "requires: expected at least one package, such as requires('flash_attn>=2.8').",
        ),
        (
            "requires('flash attn')",
            "requires: 'flash attn' is no requirement; write a module or distribution with a "
            "version, such as 'flash_attn>=2.8'.",
        ),
        (
            "requires(torch='2')",
            "requires(torch=...): unknown argument 'torch', expected texts without a name: requires('torch').",
        ),
        (
            "trainium(1, 2)",
            "trainium(1, 2): found 2 arguments without a name, expected cores alone.",
        ),
        ("gpu(1, count=1)", "gpu: count is given twice, expected it once."),
        (
            "ranks(2, 3)",
            "ranks(2, 3): found 2 arguments without a name, expected world_size alone; write "
            "others by name.",
        ),
        (
            "ranks(100)",
            "ranks: world size 100, expected at most 64 (default); allow more with "
            "--ranks-max-world-size=100.",
        ),
    ],
)
def test_a_bad_mark_is_one_sentence_and_other_tests_go_on(
    pytester, mark: str, message: str
) -> None:
    pytester.makepyfile(
        test_it=f"""
        import pytest

        @pytest.mark.{mark}
        def test_bad():
            print("ran all the same")

        def test_other(): pass
        """
    )
    result = pytester.runpytest("--strict-markers", "-rA")
    result.assert_outcomes(errors=1, passed=1)
    assert f"test_it.py::test_bad: mark {message}" in result.outlines
    assert "ran all the same" not in result.stdout.str()
    assert "INTERNALERROR" not in result.stdout.str()


@pytest.mark.parametrize("mark", ["ranks()", "ranks(0)", "ranks(2, 3)", "ranks(world_sz=2)"])
def test_the_engines_own_sentence_about_a_bad_ranks_mark_is_shown(pytester, mark: str) -> None:
    pytester.makepyfile(
        test_it=f"""
        import pytest

        @pytest.mark.{mark}
        def test_bad(): pass

        def test_other(): pass
        """
    )
    result = pytester.runpytest()
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.re_match_lines([r"test_it\.py::test_bad: mark ranks\(.*\)?: .*"])


def test_a_bad_mark_on_a_module_fails_each_of_its_tests_only(pytester) -> None:
    pytester.makepyfile(
        test_bad="""
        import pytest
        pytestmark = pytest.mark.gpu(cout=2)

        def test_a(): pass
        def test_b(): pass
        """,
        test_good="def test_c(): pass",
    )
    pytester.runpytest().assert_outcomes(errors=2, passed=1)


def test_a_bad_mark_fails_a_session_that_only_collects(pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.gpu(cout=2)
        def test_bad(): pass
        """
    )
    result = pytester.runpytest("--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (
        "test_it.py::test_bad: mark gpu(cout=...): unknown argument 'cout', did you mean 'count'?"
        in (result.stderr.str())
    )


def test_a_deselected_bad_mark_harms_nobody(pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu(cout=2)
        def test_bad(): pass

        def test_other(): pass
        """
    )
    pytester.runpytest("-k", "other").assert_outcomes(passed=1, deselected=1)


def test_unmet_needs_skip_before_any_fixture_and_at_the_tests_own_place(
    pytester, with_gpus
) -> None:
    with_gpus(1)
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.fixture
        def costly():
            raise RuntimeError("set up for a test that cannot run")

        @pytest.mark.gpu(2)
        def test_two(costly): pass

        @pytest.mark.gpu
        @pytest.mark.requires("nosuch_package")
        class TestClass:
            def test_method(self): pass

        @pytest.mark.gpu
        def test_one(): pass
        """
    )
    result = pytester.runpytest("-rs", "--strict-markers", "-W", "error")
    result.assert_outcomes(skipped=2, passed=1)
    how = "(nvidia-smi: 1 device, driver 570.86.15)"
    assert f"SKIPPED [1] test_it.py:7: needs 2 GPUs, found 1 {how}" in result.outlines
    result.stdout.fnmatch_lines(["SKIPPED [[]1] test_it.py*: needs nosuch_package, found none"])


def test_the_machine_is_looked_at_once_and_only_for_a_test_that_runs(pytester) -> None:
    pytester.makeconftest(
        """
        from pathlib import Path
        from pytest_ranks.hardware.probes import probe

        def pytest_ranks_hardware(config):
            print("the probes look")
            return probe(root=Path("/nonexistent"))
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_a(): pass

        @pytest.mark.trainium
        def test_b(): pass

        @pytest.mark.requires("pytest")
        def test_c(): pass
        """
    )
    assert pytester.runpytest("-s").stdout.str().count("the probes look") == 1
    assert "the probes look" not in pytester.runpytest("-s", "-k", "test_c").stdout.str()
    assert "the probes look" not in pytester.runpytest("-s", "--collect-only").stdout.str()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no idea')", "E   RuntimeError: no idea"),
        ("return 3", "pytest_ranks_hardware: found 3, expected what probe() returns"),
    ],
)
def test_a_projects_own_probe_that_fails_fails_the_test(pytester, body, message) -> None:
    pytester.makeconftest(f"def pytest_ranks_hardware(config):\n    {body}")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_it(): pass

        def test_plain(): pass
        """
    )
    result = pytester.runpytest("--ranks-require=gpu")
    result.assert_outcomes(errors=1, passed=1)
    assert "INTERNALERROR" not in result.stdout.str()
    assert message in [line.replace("E       ", "E   ") for line in result.outlines]


def test_a_projects_own_hardware_marks_are_left_alone(pytester) -> None:
    pytester.makeini(
        """
        [pytest]
        ranks_hardware_marks = false
        markers =
            gpu: theirs
            requires: theirs
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu("a100", why="theirs")
        @pytest.mark.requires(feature="fast")
        def test_theirs(): pass
        """
    )
    result = pytester.runpytest("--strict-markers")
    result.assert_outcomes(passed=1)
    assert "what tests needed" not in result.stdout.str()
    markers = pytester.runpytest("--markers").stdout.str()
    assert "@pytest.mark.gpu: theirs" in markers
    assert "@pytest.mark.multi_gpu" not in markers
    assert "@pytest.mark.ranks(" in markers


def test_a_list_of_world_sizes_makes_one_item_each(pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.ranks([1, 2, 4])
        @pytest.mark.parametrize("letter", ["a", "b"])
        def test_many(letter): pass

        @pytest.mark.ranks(dp=2, tp=2)
        def test_one(): pass
        """
    )
    result = pytester.runpytest("--collect-only", "-q")
    ids = [line for line in result.outlines if "::" in line]
    assert ids == [
        *(f"test_it.py::test_many[ws={n}-{x}]" for n in (1, 2, 4) for x in "ab"),
        "test_it.py::test_one",
    ]


def test_a_size_may_be_a_parameter_of_the_test(pytester) -> None:
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.ranks("ws")
        @pytest.mark.parametrize("ws", [1, 2])
        def test_world(rank, ws): assert rank.world_size == ws

        @pytest.mark.ranks(dp="dp", tp="tp")
        @pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1)])
        def test_layout(rank, dp, tp):
            assert (rank.mesh["dp"].size(), rank.mesh["tp"].size()) == (dp, tp)

        @pytest.mark.ranks(tp="tpp")
        @pytest.mark.parametrize("tp", [2])
        def test_misspelt(tp): pass
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(
        "*test_misspelt[[]2[]]: mark ranks(tp='tpp'): expected a number, or the name of a "
        "parametrized argument of the test, which has 'tp'. Did you mean 'tp'?*"
    )


@pytest.mark.parametrize(
    "test",
    [
        """
        class TestOld(unittest.TestCase):
            @pytest.mark.ranks([1, 2])
            def test_old(self): pass
        """,
        """
        @pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.ranks([1, 2]))])
        def test_old(n): pass
        """,
    ],
    ids=["unittest", "parameter"],
)
def test_a_test_that_cannot_be_repeated_says_so(pytester, test: str) -> None:
    pytester.makepyfile("import pytest, unittest\n" + textwrap.dedent(test))
    result = pytester.runpytest()
    result.assert_outcomes(errors=1)
    message = (
        "mark ranks: ws=1, ws=2, expected one: pytest can repeat neither methods of "
        "unittest.TestCase nor a test because of a mark on one of its parameters."
    )
    assert any(line.endswith(message) for line in result.outlines)


def test_without_pytests_own_skip_mark_needs_skip_all_the_same(pytester, with_gpus) -> None:
    with_gpus(0)
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): assert False")
    pytester.runpytest("-p", "no:skipping").assert_outcomes(skipped=1)


def test_the_signature_written_out_for_ranks_is_the_real_one() -> None:
    mark = next(mark for mark in marks.MARKS if mark.name == "ranks")
    real = inspect.signature(ranks)
    plain = [p.replace(annotation=p.empty) for p in real.parameters.values()]
    assert mark.signature == str(real.replace(parameters=plain, return_annotation=real.empty))


def test_the_documentation_lists_every_mark() -> None:
    lines = marks.markdown().splitlines()
    assert [line.split("`")[1].split("(")[0] for line in lines[2:]] == [
        mark.name for mark in marks.MARKS
    ]
