"""Real tiny steps on 8 fake devices; prints the programs that JAX compiled and those foretold.

The sampler is made to end responses early and at different times, so that the batch of the engine
shrinks, grows its cache and admits further prompts.
"""

import json
import logging
import re
import sys
from pathlib import Path
from unittest import mock

import jax
from ml_collections import ConfigDict

from emor3_jax import models, train
from emor3_jax.compiler.record import Recorder
from emor3_jax.compiler.step import step_programs
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.prepare import rollout as prepared
from support import tiny_run

COMPILED = re.compile(r"Compiling jit\(([\w.<>]+)\)")


def everything_else(config: ConfigDict) -> None:
    """What the method leaves out: each program that only an option calls."""
    config.reflect.soft = True
    config.policy_update.advantage = "remax"
    config.policy_update.old_logprobs = "recompute"
    config.policy_update.kl_place = "reward"
    config.policy_update.kl_target = 0.1
    config.reward.overlong, config.reward.overlong_weight = 4, 1.0
    config.rollout.resample = 1
    config.reference.kind = "average"
    config.policy.freeze_vision_tower = True
    config.reference.image_cache = 2**20
    config.evaluate.likelihood = True


def adapters(config: ConfigDict) -> None:
    """The method as it is, with adapters that are merged once a step, then quantised."""
    config.policy.lora_rank = 2
    config.rollout.weight_dtype = "int8"
    config.rollout.unroll = True


CASES = {case.__name__: case for case in (everything_else, adapters)}


def make_config(folder: Path, change: str) -> ConfigDict:
    """Returns a config of two steps of 32 prompts, of which 16 are in flight."""
    config = tiny_run.make_config(folder)
    config.policy.dtype = "bfloat16"
    config.steps, config.checkpoint.every, config.evaluate.every = 2, 2, 1
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 32, 4, 16
    config.rollout.slots, config.rollout.refill, config.rollout.block = 16, 8, 8
    config.policy_update.prompts, config.policy_update.micro_prompts = 16, 8
    config.policy_update.response_lengths = (16,)
    config.evaluate.prompts = 8
    config.evaluate.during = 8
    CASES[change](config)
    return config


def foretold(config: ConfigDict) -> set[str]:
    """Returns the functions of the programs that the objects yield."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    names = set()

    def note(name: str) -> bool:
        return False

    record = Recorder(mesh, note)
    programs = step_programs(
        mesh,
        config,
        models.read_config(config.policy.path),
        {"coherence": (6, 9), "consistency": (4, 7)},
    )
    sent = None
    while True:
        try:
            program = programs.send(sent)
        except StopIteration:
            return names
        names.add(getattr(program.function, "__name__", str(program.function)))
        sent = record(program)


def main(folder: Path, case: str) -> None:
    """Runs and prints."""
    compiled: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := COMPILED.search(record.getMessage()):
                compiled.append(match[1])

    tiny_run.write_policy(folder / "policy")
    tiny_run.write_rows(folder / "train.parquet", 40, 0)
    tiny_run.write_rows(folder / "test.parquet", 8, 1)
    config = make_config(folder, case)
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax._src.interpreters.pxla").addHandler(Listener())
    # About a fifth of all tokens end a response.
    stop = tuple(range(0, 800, 5))
    with mock.patch.object(prepared, "stop_ids", lambda tokenizer: stop):
        train.train(config, folder / "run")
    jax.config.update("jax_log_compiles", False)
    with jax.set_mesh(make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)):
        found = sorted(foretold(config))
    print("\n" + json.dumps({"compiled": sorted(set(compiled)), "foretold": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
