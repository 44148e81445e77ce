"""What the programs of a step are, and what they keep in memory, by the config."""

import jax
import pytest
from ml_collections import ConfigDict
from support import tiny_step

from emor3_jax.compiler.record import Recorder, device_bytes
from emor3_jax.compiler.step import step_programs
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.parallel.program import Program

REFERENCE = {"cast_matrices", "reference", "refresh", "average", "encode", "take images"}


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


def test_a_frozen_tower_keeps_no_moments() -> None:
    config = tiny_step.make_config()
    free = bytes_of(programs_of(config)["update"], "optimizer")
    config.policy.freeze_vision_tower = True
    frozen = bytes_of(programs_of(config)["update"], "optimizer")
    tower = sum(x.size for x in jax.tree.leaves(tiny_step.POLICY.param_shapes()["visual"]))
    assert free - frozen == 2 * 4 * tower


def test_a_first_moment_in_bfloat16_is_counted() -> None:
    config = tiny_step.make_config()
    whole = bytes_of(programs_of(config)["update"], "optimizer")
    config.policy_update.mu_dtype = "bfloat16"
    half = bytes_of(programs_of(config)["update"], "optimizer")
    assert whole - half == 2 * sum(x.size for x in jax.tree.leaves(tiny_step.POLICY.param_shapes()))
