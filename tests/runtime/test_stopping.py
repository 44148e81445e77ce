"""Runs that are asked to stop: real signals to real processes, and notices of a cloud."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import compiler_flags
from support.serving import serving
from support.tiny_run import make_config, make_folder, read_metrics

from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.runtime import run as run_module
from emor3_jax.runtime.stopping import STOPPED, MaintenanceWatch, Stopped, StopSignal
from emor3_jax.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("stopping"))


def start(folder: Path, workdir: Path, moment: str) -> subprocess.CompletedProcess:
    """Runs `stopped_run`, in a process group of its own, which must be empty afterwards."""
    environment = os.environ | {
        "XLA_FLAGS": compiler_flags.FAST,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    script = str(Path(__file__).with_name("stopped_run.py"))
    process = subprocess.Popen(
        [sys.executable, script, str(folder), str(workdir), moment],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    printed = process.communicate(timeout=600)

    def gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    assert eventually(gone)
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def steps_of(workdir: Path) -> list[int]:
    """Returns the checkpoints of a run."""
    checkpoints = Checkpoints(workdir, keep=None)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def long(*values: object) -> object:
    """Returns a case of `make test-long`."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def stopped(folder):
    """Runs a program once, that a signal stops at a moment; returns how it ended."""
    return functools.cache(lambda moment: start(folder, folder / moment, moment))


@pytest.mark.parametrize(
    ("moment", "saved", "logged", "said"),
    [
        ("startup", [], None, "stopped as asked, before the first step"),
        long("first_evaluation", [], None, "stopped as asked, before the first checkpoint"),
        long("evaluation", [2], [0, 1, 2], "stopped as asked, saved after step 2"),
        long("last_evaluation", [1], [0, 1], "stopped as asked, saved after step 1"),
        long("rollout", [1], [0, 1], "stopped as asked, saved after step 1"),
        long("compiling", [1], [0, 1], "not waited for after 1 seconds"),
        long("update", [2], [0, 1, 2], "stopped as asked, saved after step 2"),
        ("group", [1], [0, 1], "stopped"),
    ],
)
def test_a_signal_at_any_moment_keeps_the_last_finished_step(
    folder, stopped, moment, saved, logged, said
):
    workdir, done = folder / moment, stopped(moment)
    printed = done.stdout + done.stderr
    assert done.returncode == STOPPED, printed[-3000:]
    assert said in printed
    # No process complained of what it was told.
    assert "Traceback" not in printed and "KeyboardInterrupt" not in printed
    # Nor does anything of the workers stay behind.
    assert "leaked" not in printed
    assert "asked to stop: what is under way is finished and saved" in printed
    if logged is None:
        assert not (workdir / "metrics.jsonl").exists() and not saved
    else:
        assert [row["step"] for row in read_metrics(workdir)] == logged
        assert steps_of(workdir) == saved


def test_a_run_that_was_stopped_within_a_step_goes_on_exactly(folder, stopped):
    """From the checkpoint after step 1, in the rollout of step 2."""
    assert stopped("rollout").returncode == STOPPED
    resumed, whole = folder / "resumed", folder / "whole"
    shutil.copytree(folder / "rollout", resumed)
    config = make_config(folder)
    config.evaluate.every, config.evaluate.during = 10, 6
    train(config, resumed)
    train(config, whole)
    rows, wanted = read_metrics(resumed), read_metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for name in ("reward/overall", "policy/loss", "policy/grad_norm", "eval/test/accuracy"):
        for row, other in zip(rows, wanted, strict=True):
            assert row.get(name) == other.get(name), name


@pytest.fixture
def stop():
    # The tests may run under `nohup`, which ignores it.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    listening = StopSignal(300.0)
    yield listening
    listening.restore()
    signal.signal(signal.SIGHUP, before)


def eventually(condition) -> bool:
    """Returns whether something becomes true within a minute."""
    for _ in range(6000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_request_is_heard_between_pieces_of_work(stop):
    stop.check()
    stop.request()
    assert eventually(lambda: stop.requested)
    with pytest.raises(Stopped):
        stop.check()


def test_a_closed_terminal_is_a_request_to_stop_however_often_it_says_so(stop, capsys):
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGHUP)
    assert eventually(lambda: "asked to stop" in capsys.readouterr().err)
    with pytest.raises(Stopped):
        stop.check()


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listening = StopSignal(300.0)
        listening.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        listening.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_a_library_has_taken_is_taken_back(stop):
    # As in C, where Python knows nothing of it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert eventually(lambda: stop.requested)


def test_an_update_that_has_taken_the_finished_state_is_waited_for():
    run, tries, told = object.__new__(run_module.Run), iter([False, False, True]), []
    run._save_finished, run._say_stopped = lambda: next(tries), lambda: told.append(list(tries))
    run._rescue()
    assert told == [[]]


_TWICE = """
import os, signal, time
from emor3_jax.runtime.stopping import StopSignal
stop = StopSignal(300.0)
stop.request()
time.sleep(1.2)
for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)
time.sleep(0.1)
print("requested", stop.requested, flush=True)
time.sleep(1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_signals_of_one_second_are_one_request_and_a_later_one_ends_at_once():
    # As when a process group is told: make passes on what the run has heard itself. A notice of
    # the cloud before them is no signal: the machine's own, seconds later, is the first.
    ended = subprocess.run(
        [sys.executable, "-c", _TWICE], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert ended.stdout == "requested True\n"
    # By the signal itself, or by the thread that heard it first.
    assert ended.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_handlers_and_wakeup_are_those_of_before_once_it_is_over():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    kept = signal.set_wakeup_fd(theirs.fileno())
    try:
        listening = StopSignal(300.0)
        listening.restore()
        listening.restore()
        listening.request()
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
        assert signal.set_wakeup_fd(theirs.fileno()) == theirs.fileno()
        assert not listening.requested
    finally:
        signal.set_wakeup_fd(kept)
        ours.close()
        theirs.close()


@pytest.mark.parametrize(
    ("values", "noticed"),
    [
        ({"preempted": "TRUE", "maintenance-event": "NONE"}, True),
        ({"preempted": "FALSE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}, True),
        ({"preempted": "FALSE", "maintenance-event": "NONE"}, False),
        ({"preempted": "FALSE", "maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, False),
        ({}, False),
    ],
)
def test_notices_of_the_metadata_server_are_heard(monkeypatch, values, noticed):
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            name = self.path.removeprefix("/computeMetadata/v1/instance/")
            asked.append(name)
            self.send_response(200 if name in values else 404)
            self.end_headers()
            self.wfile.write(values.get(name, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    heard = threading.Event()
    with serving(server), contextlib.closing(MaintenanceWatch(heard.set, every=0.01)):
        if noticed:
            assert heard.wait(60)
        else:
            # It asks again and again, and hears nothing.
            assert eventually(lambda: asked.count("maintenance-event") >= 3)
            assert not heard.is_set()


def test_an_answer_that_is_none_does_not_end_the_questions(monkeypatch):
    answers = [b"no HTTP", b"HTTP/1.1 200 OK\r\n\r\n\xff", b"HTTP/1.1 200 OK\r\n\r\nTRUE"]

    class Broken(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])

    server = socketserver.TCPServer(("localhost", 0), Broken)
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_address[1]}")
    heard = threading.Event()
    with serving(server), contextlib.closing(MaintenanceWatch(heard.set, every=0.01)):
        assert heard.wait(60)
    # Nor does a name that is no host's.
    for name in ("bad host", "a:b", "[::"):
        monkeypatch.setenv("GCE_METADATA_HOST", name)
        with contextlib.closing(MaintenanceWatch(lambda: None, every=60.0)) as watch:
            assert watch._read("preempted") == ""


def test_a_time_longer_than_clocks_know_is_waited_for(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    stop = StopSignal(1e300)
    (watcher,) = (thread for thread in threading.enumerate() if thread.name == "stop signal")
    stop.request()
    assert eventually(lambda: stop.requested)
    stop.restore()
    watcher.join(60)
    assert not watcher.is_alive() and not failed


def test_nothing_is_asked_where_there_is_no_cloud(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr("emor3_jax.runtime.stopping._PRODUCT", Path("/no/such/file"))
    threads = threading.active_count()
    MaintenanceWatch(lambda: None).close()
    assert threading.active_count() == threads


def test_checkpoints_are_due_by_minutes_of_the_first_host(folder, monkeypatch):
    config = make_config(folder)
    config.evaluate.every = config.checkpoint.every = 10
    config.checkpoint.minutes, config.checkpoint.keep = 5.0, 9
    now, saved = [0.0], []
    save, record = Checkpoints.save, run_module.Run.record

    def recorded(self, step, *args):
        # Steps of two minutes, but the second one, which takes four.
        now[0] += 240.0 if step == 2 else 120.0
        record(self, step, *args)

    class Clock:
        perf_counter = staticmethod(time.perf_counter)
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(run_module, "time", Clock)
    monkeypatch.setattr(run_module.Run, "record", recorded)
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *args: saved.append(step) or save(self, step, *args)
    )
    config.steps = 4
    assert train(config, folder / "minutes")
    # Six minutes after the start, and after the last step; not four minutes after the second.
    assert saved == [2, 4]
    assert steps_of(folder / "minutes") == [2, 4]


SYNC = """
import os, signal, sys, time
from emor3_jax.parallel import hosts
hosts.start()
import jax
assert hosts.jax_takes_sigterm()
for step in range(1, 2000):
    if step == 5 and hosts.is_first():
        os.kill(os.getpid(), signal.SIGTERM)
    if hosts.reached_sync_point(step):
        break
    # As an agreement once a step does.
    hosts.exchange(step)
    time.sleep(0.01)
print("stopped after", step, flush=True)
jax.distributed.shutdown()
"""


def test_jax_preemption_service_names_one_step_for_all_hosts():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_PREEMPTION_SERVICE": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": str(ROOT),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SYNC],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    steps = {text.split("stopped after ")[1].split()[0] for text in said}
    assert len(steps) == 1 and int(steps.pop()) > 5
