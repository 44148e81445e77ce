"""Run by test_hosts, as one process of several or alone: jobs on four devices, one after the other.

    python host_run.py FOLDER JOBS

FOLDER holds policy and data. JOBS is JSON: [[workdir, steps, interrupt], …]. With `interrupt` this
process gets SIGTERM while that batch is read, which is during the step before; 0 lets it be. Later
jobs find the programs of the earlier ones compiled. Each job prints `job WORKDIR` before anything
else, and `ended` or `stopped` at last.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict
from support import tiny_run

from emor3_jax import prepare
from emor3_jax.config import reward_term
from emor3_jax.train import train

_OPEN_DATA = prepare.open_data


def make_config(folder: Path, steps: int) -> ConfigDict:
    config = tiny_run.make_config(folder)
    config.steps = steps
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 1
    config.rollout.prompts, config.rollout.responses = 8, 2
    config.policy_update.prompts, config.policy_update.micro_prompts = 4, 4
    # Responses of a random policy differ in this alone.
    config.reward.terms.letters = reward_term(weight=0.05, text="support.tiny_run:letters")
    # So that a run that is to end earlier takes the same steps.
    config.policy_update.schedule = "constant"
    config.evaluate.during = 4
    # Each process compiles all of it; training asks the questions over both.
    config.evaluate.reflect = False
    return config


def interrupted(number: int) -> Callable:
    """Returns an `open_data` that sends this process SIGTERM when the n-th batch is asked for."""

    def opened(*args, **options):
        data = _OPEN_DATA(*args, **options)
        following = type(data.train).__next__

        class Signalling(type(data.train)):
            asked = 0

            def __next__(self):
                type(self).asked += 1
                if self.asked == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                return following(self)

        data.train.__class__ = Signalling
        return data

    return opened


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for workdir, steps, interrupt in jobs:
        print("job", workdir, flush=True)
        prepare.open_data = interrupted(interrupt) if interrupt else _OPEN_DATA
        results = train(make_config(folder, steps), Path(workdir))
        print("ended" if results else "stopped", flush=True)


if __name__ == "__main__":
    main()
