"""Results lie as foretold: so compiling some programs says of them what compiling all does."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from support import compiler_flags

from emor3_jax.compiler.record import Recorder
from emor3_jax.parallel import mesh as meshes
from emor3_jax.parallel.program import Program, by_prompts, laid_out, whole

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize(("case", "mesh"), [("adapters", "2x2x2"), ("everything_else", "1x2x4")])
def test_every_program_lays_its_results_out_as_foretold(case: str, mesh: str) -> None:
    environment = os.environ | {
        "XLA_FLAGS": compiler_flags.on_devices(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-m", "support.layout_check", case, mesh]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unlike"] == []
    assert {"weight_sync", "prefill", "coherence", "reference", "update"} <= set(found["compared"])
    assert {"unroll", "merge.model/layers/self_attn/q_proj"} <= set(found["compared"]) or (
        case != "adapters"
    )


def test_a_function_foretells_its_own_layout_and_a_program_may_differ() -> None:
    mesh = meshes.make_mesh(1, -1, 1)
    x = whole(mesh, jax.ShapeDtypeStruct((4, 3), jnp.float32))

    @jax.jit
    @laid_out(by_prompts)
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    plain = jax.jit(lambda x: 2 * x)
    assert Program("double", double, (x,)).results(mesh).sharding.spec == P(("data", "fsdp"))
    assert Program("plain", plain, (x,)).results(mesh).sharding.spec == P()
    second = Program("double", double, (x,), layout=partial(by_prompts, axis=1)).results(mesh)
    assert second.sharding.spec == P(None, ("data", "fsdp"))
    # Not compiled, and compiled: the same.
    foretold, compiled = (
        Recorder(mesh, partial(lambda wanted, name: wanted, wanted))(
            Program("double", double, (x,))
        )
        for wanted in (False, True)
    )
    assert foretold.sharding.is_equivalent_to(compiled.sharding, 2)
    # Without a mesh nothing is constrained.
    assert double(jnp.ones((2, 2))).sum() == 8


def test_rows_that_the_mesh_does_not_divide_stay_whole() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4, 1), meshes.AXES)
    laid = by_prompts(mesh, [jax.ShapeDtypeStruct((n, 2), jnp.int32) for n in (16, 4, 12)])
    assert [x.sharding.spec for x in laid] == [P(("data", "fsdp")), P(None), P(None)]
