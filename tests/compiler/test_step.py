"""What the programs of a step are, and what they keep in memory, by the config."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import tiny_run, tiny_step

from emor3_jax.compiler.record import Recorder, device_bytes
from emor3_jax.compiler.step import step_programs
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.parallel.program import Program
from emor3_jax.prepare.shapes import read_policy_shapes

REFERENCE = {"cast_matrices", "no_reference", "reference", "refresh", "average"}
REFERENCE |= {"encode", "take images"}


def programs_of(config: ConfigDict) -> dict[str, Program]:
    """Name → program of a step, none of them compiled."""
    mesh, found, sent = make_mesh(1, 1, 1, jax.devices()[:1]), {}, None
    record = Recorder(mesh, lambda name: False)
    programs = step_programs(mesh, config, tiny_step.POLICY, tiny_step.QUESTIONS)
    while True:
        try:
            program = programs.send(sent)
        except StopIteration:
            return found
        found[program.name] = program
        sent = record(program)


def bytes_of(program: Program, kind: str) -> int:
    """Bytes of all arrays of a kind that are in memory meanwhile, each counted once."""
    held = {id(x): x for x in jax.tree.leaves(program.alive[kind])}
    return sum(map(device_bytes, held.values()))


@pytest.mark.parametrize("kind", ["frozen", "refresh", "average"])
def test_without_a_kl_there_is_no_reference_in_any_program(kind: str) -> None:
    config = tiny_step.make_config()
    config.reference.kind = kind
    with_kl = programs_of(config)
    config.policy_update.kl = "off"
    config.reference.image_cache = 2**20
    without = programs_of(config)
    assert "reference" in with_kl and set(with_kl) - set(without) <= REFERENCE
    assert not REFERENCE & set(without)
    trained = bytes_of(without["update"], "parameters")
    assert trained == sum(4 * x.size for x in jax.tree.leaves(tiny_step.POLICY.param_shapes()))
    # An average stays in float32; the others are kept as bfloat16 rounds them.
    shares = {"frozen": 1.4, "refresh": 1.4, "average": 1.99}
    assert bytes_of(with_kl["update"], "parameters") > shares[kind] * trained


def test_a_frozen_tower_keeps_neither_moments_nor_gradients() -> None:
    config = tiny_step.make_config()
    free = bytes_of(programs_of(config)["update"], "optimizer")
    config.policy.freeze_vision_tower = True
    frozen = bytes_of(programs_of(config)["update"], "optimizer")
    tower = sum(x.size for x in jax.tree.leaves(tiny_step.POLICY.param_shapes()["visual"]))
    assert free - frozen == 3 * 4 * tower


def test_a_first_moment_in_bfloat16_is_counted() -> None:
    config = tiny_step.make_config()
    whole = bytes_of(programs_of(config)["update"], "optimizer")
    config.policy_update.mu_dtype = "bfloat16"
    half = bytes_of(programs_of(config)["update"], "optimizer")
    assert whole - half == 2 * sum(x.size for x in jax.tree.leaves(tiny_step.POLICY.param_shapes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_run.make_folder(tmp_path_factory.mktemp("step"))


def patches_beside(folder: Path, **fields: Any) -> dict[str, list[tuple[int, ...]]]:
    """Returns program → shapes of the patches that are on the devices while it runs."""
    config = tiny_run.make_config(folder)
    config.policy.dtype = "bfloat16"
    config.update_from_flattened_dict(fields)
    mesh, found = make_mesh(), {}
    policy, texts = read_policy_shapes(config)
    frame = policy.shapes.vision.frame_dim
    record = Recorder(mesh, lambda name: False)
    with jax.set_mesh(mesh):
        programs, sent = step_programs(mesh, config, policy, texts.questions), None
        while True:
            try:
                program = programs.send(sent)
            except StopIteration:
                return found
            leaves = {id(x): x for x in jax.tree.leaves((program.alive, program.args))}
            images = [x for x in leaves.values() if np.ndim(x) == 5 and x.shape[-1] == frame]
            assert {x.dtype for x in images} <= {jnp.dtype(jnp.bfloat16)}, program.name
            found[program.name] = sorted(x.shape[:1] for x in images)
            sent = record(program)


def test_the_images_of_the_next_step_come_with_the_update(folder):
    found = patches_beside(folder)
    for name in ("decode", "coherence", "reference", "advantage"):
        assert found[name] == [(4,)], name
    # The updates read the whole batch of the step.
    for name in ("no_gradients", "update", "apply"):
        assert found[name] == [(4,), (4,)], name
    # They wait while an evaluation during training takes its own.
    assert found["evaluate.decode"] == [(4,), (4,)]


def test_what_is_done_for_each_wave_is_called_so_often() -> None:
    config = tiny_step.make_config()
    found = programs_of(config)
    waves = config.rollout.prompts // config.rollout.refill
    assert waves == 2
    for name in ("prefill", "take_out", "coherence", "consistency"):
        assert found[name].calls == waves, name
    assert found["join"].calls == found["reward"].calls == 1
