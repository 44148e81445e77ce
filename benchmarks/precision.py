"""What bfloat16 changes in log-probabilities. python -m benchmarks.precision [--config.key=value …]

Samples responses to EmoScenes with the layers' arithmetic in float32 and in bfloat16, scores each
of them in both, and compares the log-probability of every token with the sampler's own. The weights
are the same float32 ones. Needs the embedded base policy; trains it first if it is not there.
"""

import dataclasses
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

from configs import cpu_demo
from emor3_jax import prepare
from emor3_jax.io.console import Console
from emor3_jax.learner.logprobs import planned_logprobs
from emor3_jax.models import LoadedPolicy
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.runtime.job import start_jax
from emor3_jax.types import Experience

DTYPES = ("float32", "bfloat16")
_CONFIG = config_flags.DEFINE_config_dict("config", cpu_demo.get_config())


def in_dtype(loaded: LoadedPolicy, name: str) -> LoadedPolicy:
    """Returns the policy with another compute type, and the same parameters."""
    return dataclasses.replace(loaded, policy=loaded.policy.with_compute(dtype=jnp.dtype(name)))


def main(_: list[str]) -> None:
    """Prints the table."""
    config: ConfigDict = _CONFIG.value
    say = Console("precision")
    start_jax(config.log.compile_cache)
    mesh = make_mesh()
    loaded = prepare.load_policy(config, say, mesh)
    data = prepare.open_data(config, loaded)
    batches = [shard_batch(next(data.train).batch, mesh) for _ in range(4)]
    print(f"{date.today()}, {jax.default_backend()}\n")
    print(
        "| sampled in | scored in | tokens | difference, mean | 99.9 % | largest | ratio, mean |"
        " outside [0.8, 1.3] |\n|---|---|---|---|---|---|---|---|"
    )
    for sampled in DTYPES:
        policy = in_dtype(loaded, sampled)
        rollout = prepare.make_rollout(config, policy, data.labels["train"], mesh)
        samples = [
            rollout.respond(policy.params, batch, jax.random.key(i))[1]
            for i, batch in enumerate(batches)
        ]
        for scored in DTYPES:
            learner, _ = prepare.make_learner(config, in_dtype(loaded, scored), mesh, imitate=True)
            differences = []
            for batch, each in zip(batches, samples, strict=True):
                given = Experience(batch, each, None, None, None)
                given, plan, _ = learner.plan(given)
                found = planned_logprobs(
                    policy.params,
                    batch,
                    given.samples,
                    plan,
                    rollout.suppressed,
                    policy=learner.spec.policy,
                    spec=learner.spec.logprobs._replace(temperature=rollout.sampling.temperature),
                )
                difference = found - given.samples.logprobs
                differences.append(np.asarray(difference)[np.asarray(given.samples.mask)])
            differences = np.concatenate(differences)
            size, ratio = np.abs(differences), np.exp(differences)
            clipped = np.mean((ratio < 0.8) | (ratio > 1.3))
            print(
                f"| {sampled} | {scored} | {len(size):,} | {size.mean():.1e} |"
                f" {np.quantile(size, 0.999):.1e} | {size.max():.1e} | {ratio.mean():.5f} |"
                f" {100 * clipped:.3f} % |"
            )


if __name__ == "__main__":
    app.run(main)
