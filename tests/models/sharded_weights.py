"""Reads a policy onto 8 fake devices and compares it with what was written. Run by test_weights."""

import os
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from support import tiny

from emor3_jax import models
from emor3_jax.parallel.mesh import make_mesh, param_shardings

policy = tiny.make_policy(tie_word_embeddings=False)
params = tiny.strong_params(policy)
for shape in ((1, 8, 1), (2, 2, 2), (1, 2, 4)):
    mesh = make_mesh(*shape)
    with tempfile.TemporaryDirectory() as folder:
        models.save(models.LoadedPolicy(policy, params), folder)
        read = models.weights.read_params(
            folder, policy, shardings=lambda shapes, mesh=mesh: param_shardings(shapes, mesh)
        )
        jax.tree.map(np.testing.assert_array_equal, read, params)
        wanted = param_shardings(params, mesh)
        cut = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), read, wanted)
        assert all(jax.tree.leaves(cut))
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(read))
        # What lies on several devices is written as well, and bit for bit.
        models.save(models.LoadedPolicy(policy, read), folder)
        jax.tree.map(
            np.testing.assert_array_equal, models.weights.read_params(folder, policy), params
        )
print(f"{jax.device_count()} devices: equal")
