"""Each test asks by readings of its own whether all is as it was at first, then leaves one thing behind."""

import builtins
import gc
import locale
import logging
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy
import pytest
import torch
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
        "path": list(sys.path),
        "argv": list(sys.argv),
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
        "print": print,
        "sleep": time.sleep,
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
