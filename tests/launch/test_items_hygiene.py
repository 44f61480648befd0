"""What tests leave behind in their ranks: seen, named, put back; or the ranks are replaced."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")

# Every test first asks whether all is as it was when the file was collected, by readings of its
# own, and then leaves one thing behind.
LEAVING = """
import builtins, gc, locale, logging, multiprocessing, os, resource, signal, socket
import subprocess, sys, tempfile, threading, time, warnings
import numpy, pytest, torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2)
logging.getLogger("mine")


def state():
    umask = os.umask(0)
    os.umask(umask)
    cudnn = torch.backends.cudnn
    return {
        "environment": {name: os.environ.get(name) for name in ("LEFT", "HOME", "TZ")},
        "hour": time.localtime(0).tm_hour,
        "directory": os.getcwd(),
        "path": list(sys.path), "argv": list(sys.argv),
        "umask": umask,
        "recursion": sys.getrecursionlimit(),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "signal": signal.getsignal(signal.SIGUSR1),
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cores": os.sched_getaffinity(0),
        "locale": locale.setlocale(locale.LC_ALL),
        "tempdir": tempfile.tempdir,
        "sockets": socket.getdefaulttimeout(),
        "print": print, "sleep": time.sleep,
        "root": (logging.root.level, logging.root.manager.disable),
        "handlers": [one for one in logging.root.handlers if type(one) is logging.NullHandler],
        "mine": (logging.getLogger("mine").level, logging.getLogger("mine").disabled),
        "method": multiprocessing.get_start_method(allow_none=True),
        "numpy": numpy.geterr(),
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(1).device,
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "anomaly": torch.is_anomaly_enabled(),
        "denormal": torch.tensor([1e-310], dtype=torch.float64).item(),
        "all_reduce": dist.all_reduce,
        "debug": dist.get_debug_level(),
        "hook": len(torch.nn.modules.module._global_forward_hooks),
        "excepthook": threading.excepthook,
    }


START = state()


def environment():
    os.environ["LEFT"] = "behind"
    del os.environ["HOME"]


def time_zone():
    os.environ["TZ"] = "XYZ-5"
    time.tzset()


def removed_directory():
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def path():
    sys.path.insert(0, "/nowhere")


def argv():
    sys.argv[1:] = ["--left"]


def timer():
    signal.setitimer(signal.ITIMER_REAL, 1000)


def root_logger():
    logging.root.setLevel(logging.DEBUG)
    logging.root.addHandler(logging.NullHandler())


def dict_config():
    import logging.config

    logging.config.dictConfig({"version": 1})


def default_device():
    torch.set_default_device("meta")


def autocast():
    torch.autocast("cpu", dtype=torch.float16).__enter__()


def patched():
    dist.all_reduce = lambda *_, **__: None


def forward_hook():
    torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


def dynamo_settings():
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True


def registered():
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "left_behind"

    transformers.AutoConfig.register("left_behind", Config)  # raises the second time


def thread():
    threading.Thread(target=threading.Event().wait, name="prefetch", daemon=True).start()


def child():
    subprocess.Popen(["sleep", "1000"])


def daemon():  # in a session of its own, and no child of ours any more
    subprocess.run(["sh", "-c", "setsid sleep 1001 &"], check=True)


kept = []


def file():
    kept.append(open(__file__))


def listening():
    kept.append(socket.create_server(("127.0.0.1", 0)))


def inference():
    kept.append(torch.inference_mode())
    kept[-1].__enter__()


def mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    Spy().__enter__()


LEAVE = {
    "environment": environment,
    "time_zone": time_zone,
    "directory": lambda: os.chdir("/"),
    "removed_directory": removed_directory,
    "path": path,
    "argv": argv,
    "umask": lambda: os.umask(0o077),
    "recursion": lambda: sys.setrecursionlimit(5000),
    "gc": gc.disable,
    "gc_threshold": lambda: gc.set_threshold(1),
    "signal": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    "blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]),
    "timer": timer,
    "limit": lambda: resource.setrlimit(
        resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    ),
    "cores": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
    "tempdir": lambda: setattr(tempfile, "tempdir", "/nowhere"),
    "sockets": lambda: socket.setdefaulttimeout(3),
    "print": lambda: setattr(builtins, "print", len),
    "sleep": lambda: setattr(time, "sleep", len),
    "root_logger": root_logger,
    "logging_disable": lambda: logging.disable(logging.ERROR),
    "logger_level": lambda: logging.getLogger("mine").setLevel(logging.ERROR),
    "method": lambda: multiprocessing.set_start_method("spawn"),
    "numpy": lambda: numpy.seterr(all="raise"),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "default_device": default_device,
    "grad": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(3),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "tf32": lambda: torch.set_float32_matmul_precision("high"),
    "autocast": autocast,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "denormal": lambda: torch.set_flush_denormal(True),
    "patched": patched,
    "debug": lambda: dist.set_debug_level(dist.DebugLevel.DETAIL),
    "hook": forward_hook,
    "excepthook": lambda: setattr(threading, "excepthook", len),
    "dynamo_settings": dynamo_settings,
    "dynamo_settings_again": dynamo_settings,
    "registered": registered,
    "registered_again": registered,
    "child": child,
    "daemon": daemon,
    "dict_config": dict_config,  # closes pytest's own log file
    "thread": thread,
    "file": file,
    "listening": listening,
    "inference": inference,
    "mode": mode,
}


@pytest.mark.parametrize("what", [*LEAVE, "nothing"])
def test_leaves(what, rank, record_property):
    found = state()
    assert {name: found[name] for name in START if found[name] != START[name]} == {}
    record_property("pid", os.getpid())
    if what in LEAVE:
        LEAVE[what]()
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_leaving.py": LEAVING}, "-p", "no:randomly")


def test_every_test_finds_what_the_first_one_found(session):
    bad = [(row.id, row.text) for row in session.rows if row.outcome == "failed"]
    assert bad == [], session.output


PUT_BACK = "Put back after teardown (ranks 0 and 1)"
RETIRED = "Left behind after teardown (ranks 0 and 1)"
KEPT = {
    "environment": "environment LEFT='behind' (was unset)",
    "time_zone": "environment TZ='XYZ-5' (was unset)",
    "directory": "working directory '/' (was '{tmp}')",
    "removed_directory": "working directory 'one that was removed' (was '{tmp}')",
    "path": "sys.path has '/nowhere' (new)",
    "argv": "sys.argv has '--left' (new)",
    "umask": "umask 63 (was 18)",
    "recursion": "recursion limit 5000 (was 1000)",
    "gc": "garbage collection enabled: False (was True)",
    "gc_threshold": "thresholds of garbage collection (1, 10, 10) (was (700, 10, 10))",
    "signal": "signal SIGUSR1 is handled by SIG_IGN (was SIG_DFL)",
    "blocked": "blocked signals {<Signals.SIGUSR2: 12>} (was set())",
    "timer": "an interval timer still runs",
    "limit": "resource limit RLIMIT_NOFILE=(100, ",
    "cores": "CPU affinity {0} (was {0, 1",
    "locale": "locale ",
    "tempdir": "tempfile.tempdir '/nowhere' (was ",
    "sockets": "default timeout of sockets 3.0 (was None)",
    "print": "builtins.print was replaced by len",
    "sleep": "time.sleep was replaced by len",
    "root_logger": "logger 'root' has level DEBUG (was WARNING)\n"
    "logger 'root' has <NullHandler (NOTSET)> (new)",
    "logging_disable": "logging.disable 40 (was 0)",
    "logger_level": "logger 'mine' has level ERROR (was NOTSET)",
    "method": "start method of multiprocessing 'spawn' (was None)",
    "numpy": "numpy.seterr divide='raise' (was 'warn')",
    "dtype": "default dtype torch.float64 (was torch.float32)",
    "default_device": "default device 'meta' (was None)",
    "grad": "gradient mode False (was True)",
    "threads": "number of threads 3 (was 1)",
    "deterministic": "torch deterministic_algorithms=True (was False)",
    "cudnn": "torch cudnn.benchmark=True (was False)",
    "tf32": "precision of float32 matmul='high' (was 'highest')",
    "autocast": "autocast cpu=True (was False)\n"
    "autocast dtype on cpu=torch.float16 (was torch.bfloat16)",
    "anomaly": "anomaly detection (True, True) (was (False, True))",
    "denormal": "denormal numbers flushed: True (was False)",
    "patched": "torch.distributed.all_reduce was replaced by patched.<locals>.<lambda>",
    "debug": "debug level of torch.distributed <DebugLevel.DETAIL: 2> (was <DebugLevel.OFF: 0>)",
    "hook": "hook forward_hook.<locals>.<lambda> on all modules or optimizers (new)",
    "excepthook": "threading.excepthook was replaced by len",
    "dynamo_settings": "setting torch._dynamo.config.suppress_errors=True (was unset)",
    "dynamo_settings_again": "setting torch._dynamo.config.suppress_errors=True (was unset)",
    "registered": "CONFIG_MAPPING of transformers left_behind=registered.<locals>.Config (was unset)",
    "registered_again": "CONFIG_MAPPING of transformers left_behind=",
    "child": "1 child process 'sleep 1000' still runs",
    "daemon": "1 child process 'sleep 1001' still runs",
}
REPLACED = {
    "dict_config": "which it did not open, is closed",
    "thread": "1 thread 'prefetch' still runs",
    "file": "{tmp}/test_leaving.py is still open",
    "listening": "1 socket is still open",
    "inference": "inference mode True (was False)",
    "mode": "Spy was entered and not left",
}


def sections_of(session, what):
    row = session.call(f"test_leaves[{what}]")
    if row.outcome == "skipped":
        pytest.skip(row.text)
    row = session.of(f"test_leaves[{what}]")[-1]
    return {name: text for name, text in row.sections if "after teardown" in name}


def pid(session, what):
    return dict(session.call(f"test_leaves[{what}]").properties)["pid"]


def folder_of(session):
    return next(line.split()[-1] for line in session.output.splitlines() if "rootdir:" in line)


@pytest.mark.parametrize("what", KEPT)
def test_what_can_be_put_back_is_and_is_noted(session, what):
    if what == "cores" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("needs two cores")
    said = sections_of(session, what)
    assert list(said) == [PUT_BACK], said
    expected = KEPT[what].replace("{tmp}", folder_of(session))
    assert expected in said[PUT_BACK]
    names = [*KEPT, *REPLACED, "nothing"]
    assert pid(session, what) == pid(session, names[names.index(what) + 1])


@pytest.mark.parametrize("what", REPLACED)
def test_ranks_are_replaced_where_something_cannot_be_put_back(session, what):
    said = sections_of(session, what)
    assert RETIRED in said, said
    expected = REPLACED[what].replace("{tmp}", folder_of(session))
    assert expected in said[RETIRED]
    names = [*REPLACED, "nothing"]
    assert pid(session, what) != pid(session, names[names.index(what) + 1])
    line = f"test_leaving.py::test_leaves[{what}]: {said[RETIRED].splitlines()[0]} (ranks 0 and 1)"
    assert line in session.output


def test_the_summary_names_only_what_cost_ranks(session):
    summary = session.output.split("ranks: replaced after what a test left behind")[1]
    assert "[environment]" not in summary
    assert summary.count("test_leaving.py::test_leaves") == len(REPLACED)


def test_a_test_that_leaves_nothing_is_told_nothing(session):
    assert sections_of(session, "nothing") == {}


STRICT = '''
import os, subprocess, threading
import pytest, torch

pytestmark = pytest.mark.ranks(2)


def test_leaks(rank):
    os.environ["A"] = "1"
    threading.Thread(target=threading.Event().wait, name="prefetch", daemon=True).start()


def test_leaks_on_one(rank):
    if rank.index == 1:
        os.chdir("/")


def test_leaks_unevenly(rank):
    os.environ["A"] = str(rank.index)
    torch.set_default_dtype(torch.float64)


@pytest.mark.xfail
def test_leaks_where_failure_is_expected(rank):
    os.environ["A"] = "1"
    raise ValueError


def test_fails_and_leaks(rank):
    os.environ["A"] = "1"
    raise ValueError("its own")


def test_undoes_what_it_does(rank, monkeypatch, tmp_path):
    monkeypatch.setenv("A", "1")
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=len, args=("x",))
    thread.start()
    subprocess.run(["true"], check=True)
    with torch.inference_mode(), torch.autocast("cpu"), (tmp_path / "x").open("w"):
        pass


def test_a_thread_that_is_about_to_end_is_none(rank):
    from concurrent.futures import ThreadPoolExecutor

    ThreadPoolExecutor(1).submit(len, "x").result()


def test_groups_end_with_the_test(rank):
    group = torch.distributed.new_group([0, 1])
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()


def test_a_loader_with_workers(rank):
    data = torch.utils.data.TensorDataset(torch.arange(4))
    loader = torch.utils.data.DataLoader(data, num_workers=1)
    assert len(list(loader)) == 4


def test_multiprocessing(rank):
    import multiprocessing
    from multiprocessing import shared_memory

    with multiprocessing.Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
    block = shared_memory.SharedMemory(create=True, size=10)
    block.close()
    block.unlink()


def test_tqdm(rank):
    tqdm = pytest.importorskip("tqdm")
    for _ in tqdm.tqdm(range(2)):
        pass


def test_accelerate(rank):
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.state.PartialState._shared_state == {}
    assert accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3).num_processes == 2


def test_accelerate_again(rank):
    accelerate = pytest.importorskip("accelerate")
    assert accelerate.state.PartialState._shared_state == {}
    assert accelerate.state.GradientState().num_steps == 1


def compiled(x):
    return x + 1


@pytest.mark.parametrize("time", [1, 2])
def test_compile(rank, time):
    torch.compile(compiled, backend="eager")(torch.ones(1))
    assert torch._dynamo.convert_frame.FRAME_COUNTER == 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Changes one of each kind, and undoes it in the end."""
    os.environ["WIDE"] = "1"
    torch.set_default_dtype(torch.float64)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="wide")
    thread.start()
    child = subprocess.Popen(["sleep", "1002"])
    file = open(tmp_path_factory.mktemp("wide") / "x", "w")
    yield child
    assert os.environ.pop("WIDE") == "1"
    torch.set_default_dtype(torch.float32)
    stop.set()
    thread.join()
    child.kill()
    child.wait()
    file.close()


@pytest.mark.parametrize("time", [1, 2])
def test_with_a_wide_fixture(rank, wide, time):
    assert os.environ["WIDE"] == "1"
    assert torch.get_default_dtype() == torch.float64
    assert wide.poll() is None


def test_spoils_a_wide_fixture(rank, wide):
    os.environ["WIDE"] = "2"


def test_has_the_wide_fixture_anew(rank, wide):
    assert os.environ["WIDE"] == "1"


@pytest.fixture(scope="class")
def careless():
    os.environ["CARELESS"] = "1"
    child = subprocess.Popen(["sleep", "1003"])


class TestWithACarelessFixture:
    def test_first(self, rank, careless):
        pass

    def test_last(self, rank, careless):
        pass


@pytest.fixture(scope="module")
def outer():
    os.environ["BOTH"] = "outer"
    yield
    del os.environ["BOTH"]


@pytest.fixture(scope="class")
def inner(outer):
    os.environ["BOTH"] = "inner"
    yield
    os.environ["BOTH"] = "outer"


class TestWithTwo:
    def test_inner(self, rank, inner):
        assert os.environ["BOTH"] == "inner"


def test_outer(rank, outer):
    assert os.environ["BOTH"] == "outer"


def test_nothing_is_left(rank):
    assert {"A", "WIDE", "CARELESS", "BOTH"}.isdisjoint(os.environ)
'''


@pytest.fixture(scope="module")
def strict(run_session):
    arguments = ("-p", "no:randomly", "-o", "ranks_strict_hygiene=true")
    return run_session({"test_strict.py": STRICT}, *arguments)


FAILING = {
    "test_leaks": "test_leaks leaked on ranks 0 and 1: environment A='1' (was unset); "
    "1 thread 'prefetch' still runs",
    "test_leaks_on_one": "test_leaks_on_one leaked on rank 1: working directory '/' (was ",
    "test_leaks_unevenly": "test_leaks_unevenly leaked on rank 0: environment A='0' (was unset); "
    "on ranks 0 and 1: default dtype torch.float64 (was torch.float32); "
    "on rank 1: environment A='1' (was unset)",
    "test_leaks_where_failure_is_expected": "test_leaks_where_failure_is_expected leaked on "
    "ranks 0 and 1: environment A='1' (was unset)",
    "test_spoils_a_wide_fixture": "test_spoils_a_wide_fixture leaked on ranks 0 and 1: "
    "environment WIDE='2' (was '1')",
    "test_last": "test_last leaked on ranks 0 and 1: environment CARELESS='1' (was unset) (from "
    "the class fixture 'careless'); 1 child process 'sleep 1003' still runs (from the class "
    "fixture 'careless')",
}


@pytest.mark.parametrize("name", FAILING)
def test_strict_hygiene_fails_the_test_that_leaked(strict, name):
    row = next(row for row in strict.of(name) if row.outcome == "failed")
    # an expected failure stays one
    phase = "teardown" if name == "test_leaks_where_failure_is_expected" else "call"
    assert (row.when, row.outcome, row.wasxfail) == (phase, "failed", None)
    lines = row.text.splitlines()
    assert lines[0].startswith(FAILING[name])
    assert lines[1] == (
        "undo it in the test or in the teardown of its fixture (monkeypatch does), or set "
        "ranks_strict_hygiene=false: then what can be put back is, and else the ranks are replaced"
    )
    assert lines[2].startswith("reproduce: pytest 'test_strict.py::")


def test_a_failure_of_its_own_comes_before_a_leak(strict):
    row = strict.call("test_fails_and_leaks")
    assert row.text.splitlines()[0].endswith("ValueError: its own")
    last = strict.of("test_fails_and_leaks")[-1]
    assert [PUT_BACK, "environment A='1' (was unset)"] in last.sections


def test_strict_hygiene_fails_nothing_else(strict):
    bad = {row.id.rpartition("::")[2] for row in strict.rows if row.outcome == "failed"}
    assert bad == {*FAILING, "test_fails_and_leaks"}, strict.output


REUSED = """
import os, threading
import pytest

pytestmark = pytest.mark.ranks(2)


@pytest.fixture(autouse=True)
def noted(rank, record_property):
    assert "A" not in os.environ
    record_property("pid", os.getpid())


def test_fails():
    os.environ["A"] = "1"
    raise ValueError


def test_has_the_same_ranks():
    pass


def test_fails_and_leaves_a_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    raise ValueError


def test_has_others():
    pass
"""


def test_ranks_that_hold_something_are_replaced_also_where_failures_are_no_reason(run_session):
    arguments = ("-p", "no:randomly", "-o", "ranks_reuse_after_failure=true")
    session = run_session({"test_reused.py": REUSED}, *arguments)
    names = ("test_fails", "test_has_the_same_ranks", "test_fails_and_leaves_a_thread")
    pids = [dict(session.of(name)[1].properties)["pid"] for name in (*names, "test_has_others")]
    assert pids[0] == pids[1] == pids[2] != pids[3]
