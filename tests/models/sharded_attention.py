"""Splash attention over meshes of 8 fake devices against one device. Run by test_attention."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.attention import Own, Shared, attend
from emor3_jax.parallel.mesh import make_mesh

rng = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


arrays = draw(4, 2, 128, 4, 8), draw(4, 2, 2, 8, 128), draw(4, 2, 2, 128, 8)
prefix = Shared(
    draw(4, 2, 8, 40), draw(4, 2, 40, 8), jnp.arange(40) < jnp.array([[40], [3], [20], [39]])
)


def loss(backend, q, k, v):
    own = Own(k, v, jnp.ones((4, 2, 128), bool), causal=True)
    out = attend(q, [prefix, own], backend)
    return jnp.sum(jnp.sin(out)), out


def run(backend):
    return jax.jit(jax.grad(lambda *x: loss(backend, *x), argnums=(0, 1, 2), has_aux=True))(*arrays)


expected = run("xla")
# The last cuts heads more finely than there are key heads; 8 parts of 4 prompts cannot be.
for shape in ((4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 2, 4)):
    with jax.set_mesh(make_mesh(*shape)):
        actual = run("splash_interpret")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), actual, expected)
    print(shape, "equal")
