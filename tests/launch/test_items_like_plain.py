"""The same file as a plain test and on two ranks: the reports have to be the same."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

BEHAVIOURS = """
import logging, os, sys, unittest, warnings
import pytest

MARK

LIVE = []


def outer(factor):
    def inner(value):
        return factor * value
    return inner


@pytest.fixture(scope="session")
def of_session(tmp_path_factory):
    yield tmp_path_factory.mktemp("session")
    LIVE.append("session")


@pytest.fixture(scope="module")
def of_module():
    counter = [0]
    yield counter
    LIVE.append("module")


@pytest.fixture(scope="class")
def of_class():
    return object()


@pytest.fixture(params=["p", "q"])
def with_parameters(request):
    return request.param


@pytest.fixture
def number(of_module):
    return 5


@pytest.fixture(autouse=True)
def around(monkeypatch):
    monkeypatch.setenv("AROUND", "yes")


def test_fixtures_of_all_scopes(number, of_module, of_session, with_parameters):
    assert number == 5 and of_session.is_dir() and with_parameters in "pq"
    of_module[0] += 1


def test_a_module_fixture_lives_on(of_module):
    assert of_module[0] == 2


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("value", ["a", "b"], ids=str.upper)
def test_parameters_and_closures(factor, value):
    assert outer(factor)(value) == value * factor


class TestClass:
    seen = None

    def setup_method(self):
        self.ready = True

    def test_first(self, of_class):
        assert self.ready
        TestClass.seen = of_class

    def test_second(self, of_class):
        assert TestClass.seen is of_class


class TestUnit(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.value = 3

    def test_equal(self):
        self.assertEqual(self.value, 3)

    def test_different(self):
        self.assertEqual(self.value, 4)

    @unittest.skip("unit skip")
    def test_skipped(self):
        raise AssertionError


def test_monkeypatch(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONLY_HERE", "1")
    assert os.environ["AROUND"] == "yes" and os.getcwd() == str(tmp_path)


def test_monkeypatch_is_undone(tmp_path):
    assert "ONLY_HERE" not in os.environ and os.getcwd() != str(tmp_path)


def test_capsys(capsys):
    print("out")
    assert capsys.readouterr().out == "out\\n"


def test_capfd(capfd):
    os.write(2, b"err")
    assert capfd.readouterr().err == "err"


def test_caplog(caplog):
    logging.getLogger("x").warning("logged")
    assert caplog.messages == ["logged"]


def test_caplog_of_a_logger_that_does_not_propagate(caplog):
    alone = logging.getLogger("alone")
    alone.propagate = False
    with caplog.at_level(logging.INFO, "alone"):
        alone.info("not heard")  # pytest attaches when a phase begins
    assert caplog.messages == []
    alone.propagate = True


STANDING = logging.getLogger("standing")
STANDING.propagate = False


def test_log_of_a_logger_that_does_not_propagate(caplog):
    STANDING.error("stands alone")
    assert caplog.messages == ["stands alone"]
    assert not STANDING.handlers


def test_recwarn(recwarn):
    warnings.warn("noted")
    assert len(recwarn) == 1


def test_raises():
    with pytest.raises(ValueError, match="expected"):
        raise ValueError("expected")


def test_request(request):
    assert request.node.name == "test_request"
    request.addfinalizer(lambda: None)


def test_a_late_fixture(request):
    assert request.getfixturevalue("number") == 5


def test_properties(record_property):
    record_property("answer", 42)


def test_assertion_is_explained():
    left, right = [1, 2, 3], [1, 2, 4]
    assert left == right


def test_pytest_fail():
    pytest.fail("said so")


def test_pytest_fail_without_trace():
    pytest.fail("said so", pytrace=False)


def test_system_exit():
    sys.exit(3)


def test_skip():
    pytest.skip("in the body")


@pytest.fixture
def skipping():
    pytest.skip("in a fixture")


def test_skip_in_setup(skipping):
    raise AssertionError


@pytest.mark.skip(reason="by mark")
def test_skip_mark():
    raise AssertionError


@pytest.mark.skipif(sys.version_info > (3,), reason="by condition")
def test_skipif():
    raise AssertionError


@pytest.mark.xfail(reason="known")
def test_xfail():
    raise ValueError


@pytest.mark.xfail(reason="known", strict=True)
def test_xfail_strict():
    raise ValueError


@pytest.mark.xfail(reason="not any more")
def test_xpass():
    pass


@pytest.mark.xfail(reason="not any more", strict=True)
def test_xpass_strict():
    pass


@pytest.mark.xfail(raises=ValueError, reason="of a kind")
def test_xfail_raises():
    raise ValueError


@pytest.mark.xfail(raises=ValueError, reason="of a kind")
def test_xfail_raises_another():
    raise KeyError("other")


@pytest.mark.xfail(run=False, reason="never run")
def test_xfail_not_run():
    os._exit(3)


def test_imperative_xfail():
    pytest.xfail("here")


@pytest.fixture
def failing_setup():
    raise RuntimeError("in setup")


@pytest.fixture
def failing_teardown():
    yield
    raise RuntimeError("in teardown")


def test_error_in_setup(failing_setup):
    pass


def test_error_in_teardown(failing_teardown):
    pass


def test_failure_and_error_in_teardown(failing_teardown):
    raise ValueError("in call")


@pytest.fixture
def xfailing():
    pytest.xfail("in a fixture")


def test_xfail_in_setup(xfailing):
    raise AssertionError


@pytest.mark.xfail
def test_xfail_of_a_failing_setup(failing_setup):
    raise AssertionError


def test_no_such_fixture(nowhere):
    pass


def test_torch_is_there():
    import torch
    assert torch.ones(2).sum() == 2
"""
ON_RANKS = "pytestmark = pytest.mark.ranks(2)"


@pytest.fixture(scope="module")
def plain(run_session):
    return run_session({"test_it.py": BEHAVIOURS.replace("MARK", "")}, "-p", "no:randomly")


@pytest.fixture(scope="module")
def on_ranks(run_session):
    # without rerunfailures, which starts a thread, the zygote is a fork of the session
    arguments = ("-p", "no:randomly", "-p", "no:rerunfailures", "--junitxml=junit.xml")
    return run_session({"test_it.py": BEHAVIOURS.replace("MARK", ON_RANKS)}, *arguments)


def by_id(session):
    found = {}
    for row in session.rows:
        found.setdefault(row.id, []).append(row.summary)
    return found


def test_every_report_is_that_of_a_plain_test(plain, on_ranks):
    expected, got = by_id(plain), by_id(on_ranks)
    assert got == expected, on_ranks.output
    assert len(got) == 47
    assert on_ranks.returncode == plain.returncode == 1


def test_an_assertion_is_explained_as_in_a_plain_test(plain, on_ranks):
    explained = "E       assert [1, 2, 3] == [1, 2, 4]"
    assert explained in plain.call("test_assertion_is_explained").text
    text = on_ranks.call("test_assertion_is_explained").text
    assert explained in text
    assert text.startswith("rank ")
    assert text.endswith("reproduce: pytest 'test_it.py::test_assertion_is_explained'")


def test_properties_come_along(on_ranks):
    assert ["answer", 42] in on_ranks.call("test_properties").properties


def test_the_reason_of_a_skip_comes_along(on_ranks):
    assert "in the body" in on_ranks.call("test_skip").text
    assert "in a fixture" in on_ranks.call("test_skip_in_setup").text
