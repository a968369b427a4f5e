"""Forked ranks are what started ones are: `forks` and `fork_server`."""

from __future__ import annotations

import json
import os
import signal
import time

import forks
import pytest
from processes import alive, check_ranks, run_ranks

REPORT = """
import json, os, random, signal, sys, threading
MODULES = [name for name in ("opensmp", "smp", "tensorflow", "processes") if name in sys.modules]
import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

def opened(name):
    try:
        file = os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
    return os.path.basename(file.partition(":")[0])

untouched = context._context is None
drawn = [float(tf.random.uniform([])), random.random(), np.random.rand()]
drawn.append(float(keras.random.uniform([])))
own = {
    "argv": sys.argv[1:],
    "path": sys.path[0] == os.getcwd() == os.path.dirname(__file__),
    "main": sys.modules["__main__"].__dict__ is globals() and __name__ == "__main__",
    "session": os.getsid(0) == os.getpgid(0) == os.getpid(),
    "parent": os.getppid(),
    "variable": os.environ.get("OPENSMP_PARTITIONS"),
    "variables": sorted(os.environ),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "files": [opened(name) for name in os.listdir("/proc/self/fd")],
    "untouched": untouched,
    "stdin": sys.stdin.read(),
    "threads": threading.active_count(),
}
print("OWN", json.dumps(own))
print("MODULES", MODULES)
print("UNLIKE", json.dumps([hash("a"), *drawn]))
print("to the errors", file=sys.stderr)
"""


def told(results, word):
    return [
        line.removeprefix(word).strip()
        for result in results
        for line in result.lines
        if line.startswith(word)
    ]


@pytest.fixture(scope="module")
def forked():
    return (
        check_ranks(REPORT, 2, {"partitions": 2}, args=["a", 1], fresh=False),
        check_ranks(REPORT, 2, fresh=False),
    )


@pytest.fixture(scope="module")
def started():
    return check_ranks(REPORT, 2, {"partitions": 2}, args=["a", 1], fresh=True)


def test_a_forked_rank_has_of_its_own_what_a_started_one_has(forked, started):
    first, _ = forked
    own = told(first, "OWN")
    assert own == told(started, "OWN")
    assert json.loads(own[0])["argv"] == ["a", "1"]
    assert json.loads(own[0])["parent"] == os.getpid()
    assert all("to the errors" in result.lines for result in first)


def test_only_tensorflow_and_keras_are_there_before(forked, started):
    assert told(forked[0], "MODULES") == ["['tensorflow']"] * 2
    assert told(started, "MODULES") == ["[]"] * 2


def test_nobody_draws_the_random_numbers_of_another(forked):
    first, second = ([json.loads(line) for line in told(results, "UNLIKE")] for results in forked)
    for number in range(5):
        drawn = {ranks[rank][number] for ranks in (first, second) for rank in (0, 1)}
        # The hash seed is that of the server, and each rank has a server of its own.
        assert len(drawn) == (2 if number == 0 else 4), number


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit('words')", 1, "words"),
        ("os._exit(9)", 9, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.abort()", -signal.SIGABRT, ""),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT, "KeyboardInterr"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, ""),
        ("atexit.register(print, 'at exit')", 0, "at exit"),
        ("threading.Timer(0.5, print, ['a thread']).start()", 0, "a thread"),
    ],
)
def test_the_end_of_a_forked_rank_is_that_of_a_started_one(ends, code, says):
    script = f"import atexit, os, signal, sys, threading, time\n{ends}\n"
    for fresh in (False, True):
        (result,) = run_ranks(script, 1, fresh=fresh)
        assert result.code == code, result.output
        assert says in (result.lines or [""])[-1]


def test_what_a_forked_rank_has_started_ends_with_it(tmp_path):
    script = """
    import pathlib, subprocess, sys, time
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(sys.argv[1]).write_text(str(child.pid))
    """
    run_ranks(script, 1, args=[tmp_path / "child"], fresh=False)
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 20
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_a_rank_that_hangs_is_ended():
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not end within 2 s\n.*\nwords"):
        run_ranks(
            "import time\nprint('words', flush=True)\ntime.sleep(600)\n", 1, seconds=2, fresh=False
        )


@pytest.mark.parametrize("name", ["TF_CPP_MIN_LOG_LEVEL", "PYTHONHASHSEED"])
def test_what_an_import_may_have_read_is_a_reason_to_start_a_process(name):
    script = f"import os, sys; print('tensorflow' in sys.modules, os.environ[{name!r}])\n"
    (result,) = check_ranks(script, 1, environ={name: "1"}, fresh=False)
    assert result.lines == ["False 1"]


def test_numbers_of_threads_are_read_after_the_fork():
    script = """
    import os
    import tensorflow as tf
    before = len(os.listdir("/proc/self/task"))
    tf.zeros([2]) + 1.0
    print(len(os.listdir("/proc/self/task")) - before)
    """
    names = ("TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS")

    def threads(number, fresh=False):
        (result,) = check_ranks(script, 1, environ=dict.fromkeys(names, number), fresh=fresh)
        return int(result.lines[-1])

    few, many = threads(3), threads(30)
    assert many - few >= 27
    assert many == threads(30, fresh=True)


@pytest.fixture
def own_servers(monkeypatch):
    """Servers that no other test has started for an environment of its own."""
    monkeypatch.setattr(forks, "_servers", [])
    yield
    for server in forks._servers:
        server._end()


@pytest.mark.usefixtures("own_servers")
def test_of_many_ranks_the_last_ones_are_started():
    script = "import sys; print('tensorflow' in sys.modules)\n"
    lines = [result.lines for result in check_ranks(script, forks.SERVERS + 1, fresh=False)]
    assert lines == [["True"]] * forks.SERVERS + [["False"]]


def test_a_server_ends_with_the_process_that_has_started_it(tmp_path):
    """However that ends."""
    script = """
    import os, pathlib, signal, sys, forks, processes
    processes.run_ranks("pass\\n", 2, fresh=False)
    pids = [str(server._process.pid) for server in forks._servers]
    pathlib.Path(sys.argv[1]).write_text(" ".join(pids))
    os.kill(os.getpid(), signal.SIGKILL)
    """
    (result,) = run_ranks(script, 1, args=[tmp_path / "pids"], fresh=True)
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert result.code == -signal.SIGKILL
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))


UNSTARTED = """
import threading
import fork_server
import tensorflow as tf

def told():
    try:
        fork_server.check_unstarted()
    except RuntimeError as error:
        return str(error)

print(told())
ends = threading.Event()
threading.Thread(target=ends.wait).start()
print(told())
ends.set()
import opensmp
print(told())
tf.config.list_logical_devices()
print(told())
"""


def test_a_server_that_would_share_more_than_imports_does_not_fork():
    (result,) = check_ranks(UNSTARTED, 1, fresh=True)
    nothing, thread, ours, runtime = result.lines[-4:]
    assert nothing == "None"
    assert "A thread of Python's runs" in thread
    assert "'opensmp'] are imported" in ours
    assert "TensorFlow's runtime has started" in runtime
