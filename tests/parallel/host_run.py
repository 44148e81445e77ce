"""Run by test_hosts, as one process of several or alone: a job on four devices.

    python host_run.py FOLDER WORKDIR STEPS [INTERRUPT]

FOLDER holds policy and data. With INTERRUPT=n this process gets SIGTERM while the n-th batch is
read, which is during step n - 1.
"""

import os
import signal
import sys
from pathlib import Path

from ml_collections import ConfigDict
from support import tiny_run

from emor3_jax import prepare
from emor3_jax.config import reward_term
from emor3_jax.train import train


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
    return config


def interrupt(number: int) -> None:
    """Sends this process SIGTERM when the n-th batch of training is asked for."""
    open_data = prepare.open_data

    def opened(*args):
        data = open_data(*args)
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

    prepare.open_data = opened


def main() -> None:
    folder, workdir = map(Path, sys.argv[1:3])
    if len(sys.argv) > 4:
        interrupt(int(sys.argv[4]))
    results = train(make_config(folder, int(sys.argv[3])), workdir)
    print("ended" if results else "stopped")


if __name__ == "__main__":
    main()
