"""Run by test_sharding in a process with 8 devices: prints the largest difference to one device."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
from emor3_jax.rollout.score import score_responses

from emor3_jax.parallel.mesh import make_mesh, param_shardings, shard_batch


def load_setting(prompts: int):
    path = Path(__file__).parents[1] / "rollout" / "conftest.py"
    spec = importlib.util.spec_from_file_location("rollout_conftest", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.build_setting(prompts)


def main() -> None:
    setting = load_setting(8)
    rng = np.random.default_rng(0)
    responses = rng.integers(8, 60, (8, 2, 6)).astype(np.int32)
    lengths = rng.integers(1, 7, (8, 2)).astype(np.int32)
    rows = (setting.prompt, setting.images, setting.last, setting.position, responses, lengths)
    used = np.arange(6) < lengths[..., None]

    @jax.jit
    def loss_and_gradient(params, rows):
        def loss(params):
            score = score_responses(
                setting.config, params, *rows, banned=setting.banned, temperature=1.0, chunk=8
            )
            return np.float32(1 / used.sum()) * (score.logprobs * used).sum()

        return jax.value_and_grad(loss)(params)

    wanted = loss_and_gradient(setting.params, rows)
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)):
        mesh = make_mesh(*sizes)
        params = jax.device_put(setting.params, param_shardings(setting.params, mesh))
        with jax.set_mesh(mesh):
            found = loss_and_gradient(params, shard_batch(rows, mesh))
        errors = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-6)), wanted, found
        )
        print(*sizes, max(jax.tree.leaves(errors)))


if __name__ == "__main__":
    main()
