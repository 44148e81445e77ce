"""The arrays that lie on the devices beside each program of a step."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_run

from emor3_jax.compiler.record import Recorder
from emor3_jax.compiler.step import step_programs
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.prepare.shapes import read_policy_shapes


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
    # The prompts of the step, whole until they are split in two updates.
    for name in ("decode", "coherence", "reference", "advantage"):
        assert found[name] == [(4,)], name
    assert found["split"] == [(2,), (4,)]
    assert found["update"] == [(2,), (2,), (4,)]
    # They wait while an evaluation during training takes its own.
    assert found["evaluate decode"] == [(4,), (4,)]


def test_a_single_update_reads_the_whole_batch_beside_the_next(folder):
    found = patches_beside(folder, **{"policy_update.prompts": 4})
    assert "split" not in found
    assert found["update"] == [(4,), (4,)]
