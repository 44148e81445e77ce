"""The victim: a tiny run in a process of its own, to which something happens at a moment of it."""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from support import tiny_run
from support.interrupted import before

from emor3_jax import prepare
from emor3_jax.config import reward_term
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.metrics import MetricWriter
from emor3_jax.learner.learner import Learner
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.runtime import cli, job
from emor3_jax.runtime import run as run_module
from emor3_jax.runtime.stopping import Stopped
from emor3_jax.train import train

# The server of these processes has no threads of JAX when it forks.
warnings.filterwarnings("ignore", message=r".*os\.fork\(\)")

CALLS: dict[str, tuple[Any, str]] = {
    "opening the data": (prepare, "open_data"),
    "sampling": (Rollout, "__call__"),
    "updating": (Learner, "update"),
    "logging": (MetricWriter, "write"),
    "saving": (Checkpoints, "save"),
    "writing the policy": (run_module, "save_whole"),
    "ending a step": (run_module.Run, "evaluate"),
}
"""Name of a moment → what is called then."""

FILES = {
    "a file of a checkpoint": "/checkpoints/",
    "a file of the policy": "/policy.new",
    "a line of metrics": "/metrics.jsonl",
    "a file of events": "/events/",
    "a prediction": "/predictions/",
}
"""Name of a moment → part of the path of a file or folder that is made, renamed or removed then."""

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


class Fault(NamedTuple):
    """What happens, and when.

    Attributes:
      moment: of `CALLS` or `FILES`.
      call: the n-th time, from 1 on.
      deed: of `DEEDS`.
      delay: seconds from the moment to the deed, which is then another thread's.
      workers: processes that read data.
    """

    moment: str
    call: int
    deed: str
    delay: float = 0.0
    workers: int = 0


def kill() -> None:
    """Ends this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk() -> None:
    """Lets no file grow over 4 KiB, as a disk without room does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def pause(there: Path = Path("go on")) -> None:
    """Waits until somebody makes the file "go on" in the current folder."""
    Path("paused").touch()
    while not there.exists():
        time.sleep(0.02)


def lose_a_file() -> None:
    """Fails as where a file is gone."""
    raise FileNotFoundError(2, "No such file or directory", "gone.png")


DEEDS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "full": fill_the_disk,
    "pause": pause,
    "lose": lose_a_file,
    **{
        name: lambda number=number: os.kill(os.getpid(), number)
        for name, number in (
            ("TERM", signal.SIGTERM),
            ("INT", signal.SIGINT),
            ("HUP", signal.SIGHUP),
        )
    },
    **{
        f"group {name}": lambda number=number: os.killpg(0, number)
        for name, number in (
            ("TERM", signal.SIGTERM),
            ("INT", signal.SIGINT),
            ("HUP", signal.SIGHUP),
        )
    },
}


def make_config(folder: Path) -> ConfigDict:
    """Six steps without reflections and reference, a checkpoint every second, two evaluations."""
    config = tiny_run.make_config(folder)
    config.steps, config.checkpoint.every, config.evaluate.every = 6, 2, 3
    config.reflect.enabled, config.policy_update.kl = False, "off"
    config.log.compile_cache = config.log.compile_cache or str(folder / "compiled")
    config.reward.terms.length = reward_term(
        weight=0.05, function="support.tiny_run:share_of_length"
    )
    return config


def watch_files(part: str, call: int, action: Callable[[], None]) -> None:
    """Lets something happen right before the n-th change of files whose path has a part."""
    calls = [0]

    def hear(event: str, args: tuple) -> None:
        if event == "open":
            _, mode, flags = args
            writes = mode and set(mode) & set("wax+")
            if not writes and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event not in _CHANGES:
            return
        if isinstance(args[0], (str, os.PathLike)) and part in os.fspath(args[0]):
            calls[0] += 1
            if calls[0] == call:
                action()

    sys.addaudithook(hear)


def delayed(action: Callable[[], None], seconds: float) -> Callable[[], None]:
    """Returns a function that lets a thread do something a little later."""
    if not seconds:
        return action

    def later() -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()

    return later


def set_trap(fault: Fault) -> None:
    """Prepares a fault in this process."""
    action = delayed(DEEDS[fault.deed], fault.delay)
    if fault.moment in CALLS:
        before(*CALLS[fault.moment], fault.call, action)
    else:
        watch_files(FILES[fault.moment], fault.call, action)


def count_steps(place: Path) -> None:
    """Writes to a file how many steps were taken."""
    record = run_module.Run.record

    def counted(self: run_module.Run, step: int, *args: Any) -> None:
        record(self, step, *args)
        place.write_text(str(step))

    run_module.Run.record = counted


def keep_all_programs() -> None:
    """Keeps small compiled programs too: each victim runs them once."""
    start = job.start_jax

    def start_jax(*args: Any, **options: Any) -> job.CompileCounter:
        found = start(*args, **options)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        return found

    job.start_jax = start_jax


def run(folder: Path, workdir: Path, fault: Fault, environment: dict[str, str]) -> None:
    """Runs, in a process group of its own, what it prints going to `workdir.log`.

    Args:
      folder: holds policy and data.
      workdir: of the run; `workdir.steps` then says how many steps were taken.
      fault: what happens.
      environment: of the process; that of the server may be of other tests, which started it.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    place = workdir.with_name(workdir.name + ".files")
    place.mkdir(exist_ok=True)
    os.chdir(place)
    log = os.open(workdir.with_name(workdir.name + ".log"), os.O_WRONLY | os.O_CREAT, 0o644)
    pipe, written = os.pipe()
    # Through a process of its own, so that a full disk does not silence it.
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.setsid()
        os.close(written)
        while data := os.read(pipe, 65536):
            os.write(log, data)
        os._exit(0)
    os.close(pipe)
    for number in (1, 2):
        os.dup2(written, number)
    os.close(written)
    config = make_config(folder)
    config.data.workers = fault.workers
    keep_all_programs()
    count_steps(workdir.with_name(workdir.name + ".steps"))
    set_trap(fault)
    with cli.errors_told():
        try:
            result = train(config, workdir)
        except Stopped:
            result = None
        cli.end(result, may_stop=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
