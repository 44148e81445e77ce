"""Run by test_sharding with 8 devices: prints how many tokens differ from one device's."""

import jax
import numpy as np
from sharded_score import load_setting

from emor3_jax.parallel.mesh import make_mesh, param_shardings
from emor3_jax.rollout.engine import Plan
from emor3_jax.rollout.generate import SamplingRule


def main() -> None:
    one = load_setting(16)
    rule = SamplingRule(10, 0.0, 1.0, (7, 20, 31, 42, 58))
    plan = Plan(slots=8, refill=8, block=4, halvings=1)
    wanted = one.roll_out_in(plan, rule, 0, 4)
    for sizes in ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)):
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            params = jax.device_put(one.params, param_shardings(one.params, mesh))
            sharded = one._replace(params=params)
            for each in sharded.finish(plan, rule, 0, 4):
                for x, axis in ((each.prefix.k, 1), (each.samples.tokens, 0)):
                    held = x.sharding.shard_shape(x.shape)[axis]
                    assert held == x.shape[axis] // (sizes[0] * sizes[1]), x.sharding
            found = sharded.roll_out_in(plan, rule, 0, 4)
        print(*sizes, float(np.sum(np.asarray(found.tokens) != np.asarray(wanted.tokens))))


if __name__ == "__main__":
    main()
