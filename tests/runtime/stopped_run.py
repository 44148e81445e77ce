"""Run by test_stopping as a process of its own: a tiny run that gets a real signal at a moment.

    python stopped_run.py FOLDER WORKDIR MOMENT

FOLDER holds policy and data. MOMENT is a row of `MOMENTS`, or "never".
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict
from support import tiny_run
from support.interrupted import before

from emor3_jax import prepare
from emor3_jax.data.pipeline import EvalBatches
from emor3_jax.learner.learner import Learner
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.runtime import cli
from emor3_jax.runtime.stopping import Stopped
from emor3_jax.train import train


def interrupt() -> None:
    """Sends SIGTERM to this process, as a machine that is taken away does."""
    os.kill(os.getpid(), signal.SIGTERM)


def second_batch(evaluation: int) -> None:
    """Interrupts the n-th evaluation at its second batch."""
    iterate, calls = EvalBatches.__iter__, [0]

    def batches(self: EvalBatches) -> Iterator:
        calls[0] += 1
        for index, prompts in enumerate(iterate(self)):
            if (calls[0], index) == (evaluation, 1):
                interrupt()
            yield prompts

    EvalBatches.__iter__ = batches


def startup(config: ConfigDict) -> None:
    """While the data is opened."""
    before(prepare, "open_data", 1, interrupt)


def first_evaluation(config: ConfigDict) -> None:
    """Before the first step."""
    second_batch(1)


def evaluation(config: ConfigDict) -> None:
    """After step 2, which no checkpoint was due after."""
    second_batch(2)


def last_evaluation(config: ConfigDict) -> None:
    """After the last step."""
    config.steps, config.evaluate.every = 1, 10
    second_batch(2)


def rollout(config: ConfigDict) -> None:
    """When the reflections of step 2 are asked; each evaluation has one of its two batches too."""
    config.evaluate.every = 10
    before(Rollout, "reflect", 2 + 2, interrupt)


def compiling(config: ConfigDict) -> None:
    """In step 2, within a library that does not come back."""
    config.evaluate.every, config.checkpoint.stop_seconds = 10, 1.0

    def stuck() -> None:
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        os.posix_spawn("/bin/sh", ["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}"], os.environ)
        # Held already, by this thread: Python's own handlers never get a turn.
        library.pthread_mutex_lock(mutex)

    before(Learner, "score", 2, stuck)


def update(config: ConfigDict) -> None:
    """Between the updates of step 2, the first of which has taken the state of step 1."""
    config.evaluate.every, config.checkpoint.stop_seconds = 10, 1.0

    def slow() -> None:
        interrupt()
        time.sleep(4)

    before(Learner, "update", 4, slow)


def group(config: ConfigDict) -> None:
    """Ctrl-C in step 2 reaches the workers that decode images too."""
    config.evaluate.every, config.data.workers = 10, 2
    before(Learner, "score", 2, lambda: os.killpg(0, signal.SIGINT))


MOMENTS = {
    moment.__name__: moment
    for moment in (
        *(startup, first_evaluation, evaluation, last_evaluation),
        *(rollout, compiling, update, group),
    )
}


def main(folder: Path, workdir: Path, moment: str) -> None:
    """Runs three steps, with a checkpoint after the last one only."""
    config = tiny_run.make_config(folder)
    config.checkpoint.every, config.checkpoint.stop_seconds = 10, 300.0
    config.evaluate.during = 6
    if moment != "never":
        MOMENTS[moment](config)
    try:
        result = train(config, workdir)
    except Stopped:
        result = None
    cli.end(result, may_stop=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
