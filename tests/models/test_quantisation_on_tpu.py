"""int8 weights, compiled for TPUs that need not be there: the loops convert none of them ahead."""

import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from emor3_jax.compiler.record import Recorder
from emor3_jax.models.layers import Mlp
from emor3_jax.models.quantisation import quantise_layers
from emor3_jax.parallel import topology
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.parallel.program import Program, as_gathered_params, whole

# More than the 128 MiB of memory on the chip, in which temporaries would not be counted.
LAYERS, WIDTH, HIDDEN, LANES, TOKENS = 8, 2048, 8192, 32, 16
WEIGHTS = 3 * LAYERS * WIDTH * HIDDEN


class Layer(nn.Module):
    """A layer of the decoder without its attention."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps bfloat16[LANES, WIDTH]."""
        return x + Mlp(HIDDEN, False, jnp.bfloat16, name="mlp")(x), None


STACK = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)


def decode(params: Any, x: jax.Array, *, ahead: bool = False) -> jax.Array:
    """Runs the layers once a token; with `ahead`, they are converted before the first one."""
    if ahead:
        kernels = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        params = jax.lax.optimization_barrier(kernels)
    layers = params["model"]["layers"]
    return jax.lax.fori_loop(
        0, TOKENS, lambda _, x: STACK(name="layers").apply({"params": layers}, x, None)[0], x
    )


def lay(mesh: Mesh, params: Any) -> Any:
    return as_gathered_params(mesh, jax.eval_shape(quantise_layers, params))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.loads_tpu_compiler
@pytest.mark.parametrize("name", ["v5e-4", "v6e-4"])
def test_a_loop_over_tokens_reads_int8_weights(name: str) -> None:
    mesh = make_mesh(1, -1, 1, topology.parse(name).devices())
    x = whole(mesh, jax.ShapeDtypeStruct((LANES, WIDTH), jnp.bfloat16))
    layers = jax.eval_shape(
        lambda: STACK().init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), None)["params"]
    )
    params = lay(mesh, {"model": {"layers": layers}})
    record = Recorder(mesh)
    with jax.set_mesh(mesh):
        for ahead in (False, True):
            options = {"ahead": ahead}
            function = jax.jit(decode, static_argnames="ahead")
            alive = {"parameters": params}
            record(Program(f"decode {ahead}", function, (params, x), options, alive))
    kept, converted = record.reports
    # A byte for each, and scales.
    assert WEIGHTS < kept.resident["parameters"] < 1.01 * WEIGHTS
    assert kept.made < WEIGHTS / 16
    # The check sees what it looks for.
    assert converted.made > 1.9 * WEIGHTS
