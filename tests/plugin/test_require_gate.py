from __future__ import annotations

import pytest

TITLE = "ranks: required tests did not run"
NO_GPU = "needs 1 GPU, found 0 (CUDA, ROCm, Intel XPU: absent)"
TESTS = """
import pytest

@pytest.mark.gpu
def test_one(): pass

@pytest.mark.gpu
def test_two(): pass

@pytest.mark.multi_gpu
def test_many(): pass

def test_plain(): pass
"""


def assert_gate(result, *sentences: str) -> None:
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    lines = result.outlines
    start = next(n for n, line in enumerate(lines) if TITLE in line)
    assert tuple(lines[start + 1 : start + 1 + len(sentences)]) == sentences
    assert not lines[start + 1 + len(sentences)].startswith("--ranks-require")
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


def assert_no_gate(result, code: int = pytest.ExitCode.OK) -> None:
    assert result.ret == code
    assert TITLE not in result.stdout.str() + result.stderr.str()


def test_missing_hardware_fails_the_session(pytester, with_gpus) -> None:
    with_gpus(0)
    pytester.makepyfile(TESTS)
    assert_no_gate(pytester.runpytest())
    assert_gate(
        pytester.runpytest("--ranks-require=gpu:1,multi_gpu:2"),
        "--ranks-require: gpu:1 is not met: 2 gpu tests were selected, none ran: needs 1 GPU, "
        "found 0 (CUDA software without device; NVML: not asked; nvidia-smi: 0 devices)",
        "--ranks-require: multi_gpu:2 is not met: 1 multi_gpu test was selected, none ran: needs "
        "2 GPUs, found 0 (CUDA software without device; NVML: not asked; nvidia-smi: 0 devices)",
    )


def test_the_session_passes_where_the_tests_ran(pytester, with_gpus) -> None:
    with_gpus(2)
    pytester.makepyfile(TESTS)
    assert_no_gate(pytester.runpytest("--ranks-require=gpu:1,multi_gpu:2"))


def test_tests_on_fewer_devices_than_required_do_not_count(pytester, with_gpus) -> None:
    with_gpus(2)
    pytester.makepyfile(TESTS)
    assert_gate(
        pytester.runpytest("--ranks-require=gpu:1,multi_gpu:4"),
        "--ranks-require: multi_gpu:4 is not met: 1 multi_gpu test ran, with 2 devices at most",
    )


def test_a_multi_gpu_test_is_no_gpu_test(pytester, with_gpus) -> None:
    with_gpus(2)
    pytester.makepyfile(TESTS)
    assert_gate(
        pytester.runpytest("--ranks-require=gpu:1", "-k", "many"),
        "--ranks-require: gpu:1 is not met: no gpu test was selected",
    )


def test_a_session_without_any_test_fails(pytester) -> None:
    pytester.makepyfile(TESTS)
    assert_gate(
        pytester.runpytest("--ranks-require=gpu:1", "-k", "nothing"),
        "--ranks-require: gpu:1 is not met: no gpu test was selected",
    )


def test_the_source_of_the_requirement_is_named(pytester, monkeypatch) -> None:
    pytester.makepyfile("def test_plain(): pass")
    monkeypatch.setenv("RANKS_REQUIRE", "trainium")
    result = pytester.runpytest()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    sentence = "RANKS_REQUIRE: trainium:1 is not met: no trainium test was selected"
    assert sentence in result.outlines


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("pass", True),
        ("assert False", True),
        ("pytest.xfail('known')", True),
        ("pytest.skip('not today')", False),
    ],
)
def test_a_test_ran_when_its_body_was_not_skipped(pytester, with_gpus, body, counts) -> None:
    with_gpus(1)
    pytester.makepyfile(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\n")
    result = pytester.runpytest("--ranks-require=gpu")
    if counts:
        assert TITLE not in result.stdout.str()
    else:
        assert_gate(
            result,
            "--ranks-require: gpu:1 is not met: 1 gpu test was selected, none ran: not today",
        )


def test_a_test_whose_setup_fails_did_not_run(pytester, with_gpus) -> None:
    with_gpus(1)
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def broken():
            raise RuntimeError

        @pytest.mark.gpu
        def test_it(broken): pass
        """
    )
    assert_gate(
        pytester.runpytest("--ranks-require=gpu"),
        "--ranks-require: gpu:1 is not met: 1 gpu test was selected, none ran: error in setup",
    )


def test_a_teardown_that_skips_takes_nothing_back(pytester, with_gpus) -> None:
    with_gpus(1)
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def leaves_by_skipping():
            yield
            pytest.skip("too late")

        @pytest.mark.gpu
        def test_it(leaves_by_skipping): pass
        """
    )
    assert_no_gate(pytester.runpytest("--ranks-require=gpu"))


def test_a_session_that_stops_early_names_what_was_not_started(pytester, with_gpus) -> None:
    with_gpus(1)
    pytester.makepyfile(
        """
        import pytest

        def test_first():
            assert False

        @pytest.mark.gpu
        def test_it(): pass
        """
    )
    assert_gate(
        pytester.runpytest("--ranks-require=gpu", "-x"),
        "--ranks-require: gpu:1 is not met: 1 gpu test was selected, none ran: not started",
    )


def test_an_interrupted_session_is_not_judged(pytester) -> None:
    pytester.makepyfile("def test_it(): raise KeyboardInterrupt")
    assert_no_gate(
        pytester.runpytest_subprocess("--ranks-require=gpu"), pytest.ExitCode.INTERRUPTED
    )


@pytest.mark.parametrize("option", ["--collect-only", "--fixtures", "--markers", "--version"])
def test_a_session_that_runs_no_tests_by_wish_is_not_judged(pytester, option: str) -> None:
    pytester.makepyfile(TESTS)
    assert_no_gate(pytester.runpytest("--ranks-require=gpu", option))


def test_without_a_terminal_the_reason_is_on_stderr(pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("--ranks-require=trainium", "-pno:terminal")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.errlines == [
        f"{TITLE}:",
        "--ranks-require: trainium:1 is not met: no trainium test was selected",
    ]


def test_without_a_summary_the_reason_is_said_all_the_same(pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("--ranks-require=trainium", "--no-summary")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    sentence = "--ranks-require: trainium:1 is not met: no trainium test was selected"
    assert [*result.outlines, *result.errlines].count(sentence) == 1


def test_ranks_are_required_by_world_size(pytester) -> None:
    pytester.makepyfile(TESTS)
    assert_gate(
        pytester.runpytest("--ranks-require=ranks:2"),
        "--ranks-require: ranks:2 is not met: no ranks test was selected",
    )


class TestUnderXdist:
    @pytest.fixture(autouse=True)
    def xdist(self, monkeypatch) -> None:
        pytest.importorskip("xdist")
        monkeypatch.setenv("PYTEST_ADDOPTS", "-p pytest_ranks.plugin -p xdist.plugin")

    def test_tests_that_ran_on_workers_count(self, pytester, with_gpus) -> None:
        with_gpus(2)
        pytester.makepyfile(TESTS)
        result = pytester.runpytest("-n2", "--ranks-require=gpu:1,multi_gpu:2")
        assert_no_gate(result)
        result.stdout.fnmatch_lines(["gpu  *  2     2        0", "multi_gpu  *  1     1        0"])

    def test_fewer_devices_on_workers_do_not(self, pytester, with_gpus) -> None:
        with_gpus(2)
        pytester.makepyfile(TESTS)
        assert_gate(
            pytester.runpytest("-n2", "--ranks-require=gpu:4"),
            "--ranks-require: gpu:4 is not met: 2 gpu tests ran, with 2 devices at most",
        )

    def test_skips_on_workers_carry_their_reasons(self, pytester, with_gpus) -> None:
        with_gpus(1)
        pytester.makepyfile(TESTS)
        assert_gate(
            pytester.runpytest("-n2", "--ranks-require=multi_gpu:2"),
            "--ranks-require: multi_gpu:2 is not met: 1 multi_gpu test was selected, none ran: "
            "needs 2 GPUs, found 1 (nvidia-smi: 1 device, driver 570.86.15)",
        )

    def test_zero_selected(self, pytester) -> None:
        pytester.makepyfile("def test_plain(): pass")
        assert_gate(
            pytester.runpytest("-n2", "--ranks-require=gpu"),
            "--ranks-require: gpu:1 is not met: no gpu test was selected",
        )

    def test_grouped_tests_count(self, pytester, with_gpus) -> None:
        with_gpus(1)
        pytester.makepyfile(
            """
            import pytest

            @pytest.mark.gpu
            @pytest.mark.xdist_group("one")
            def test_it(): pass
            """
        )
        assert_no_gate(pytester.runpytest("-n1", "--dist=loadgroup", "--ranks-require=gpu"))

    def test_what_workers_selected_and_did_not_run(self, pytester) -> None:
        conftest = """
        def pytest_runtest_protocol(item):
            return True if item.name == "test_swallowed" else None
        """
        pytester.makeconftest(conftest)
        pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_swallowed(): pass")
        assert_gate(
            pytester.runpytest("-n1", "--ranks-require=gpu"),
            "--ranks-require: gpu:1 is not met: 1 gpu test was selected, none ran: not started",
        )

    def test_a_worker_that_dies_with_its_test_did_not_run_it(self, pytester, with_gpus) -> None:
        with_gpus(1)
        pytester.makepyfile(
            """
            import os, signal, pytest

            @pytest.mark.gpu
            def test_it(): os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        result = pytester.runpytest("-n1", "--ranks-require=gpu")
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(["--ranks-require: gpu:1 is not met: *"])
        assert "INTERNALERROR" not in result.stdout.str()
