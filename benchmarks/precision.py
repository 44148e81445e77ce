"""What bfloat16 changes in log-probabilities. python -m benchmarks.precision [--config.key=value …]

Samples responses to EmoScenes with the layers' arithmetic in float32 and in bfloat16, scores each
of them in both, and compares the log-probability of every token with the sampler's own. The weights
are the same float32 ones. Needs the embedded base policy; trains it first if it is not there.
"""

from datetime import date

import jax
import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

from configs import cpu_demo
from emor3_jax import prepare
from emor3_jax.io.console import Console
from emor3_jax.learner import response_logprobs
from emor3_jax.parallel.mesh import make_mesh, shard_batch

DTYPES = ("float32", "bfloat16")
_CONFIG = config_flags.DEFINE_config_dict("config", cpu_demo.get_config())


def main(_: list[str]) -> None:
    """Prints the table."""
    config: ConfigDict = _CONFIG.value
    say = Console("precision")
    prepare.start_jax(config.log.compile_cache)
    mesh = make_mesh()
    policy = prepare.load_policy(config, say, mesh)
    data = prepare.open_data(config, policy)
    batches = [shard_batch(next(data.train)[0], mesh) for _ in range(4)]
    print(f"{date.today()}, {jax.default_backend()}\n")
    print(
        "| sampled in | scored in | tokens | difference, mean | 99.9 % | largest | ratio, mean |"
        " outside [0.8, 1.3] |\n|---|---|---|---|---|---|---|---|"
    )
    for sampled in DTYPES:
        config.policy.dtype = sampled
        actor = prepare.make_actor(config, policy, data.labels["train"])
        rule = prepare.rollout_rule(config, policy)
        samples = [
            actor.roll_out(
                policy.params,
                batch,
                jax.random.key(i),
                responses=config.rollout.responses,
                rule=rule,
            )[1]
            for i, batch in enumerate(batches)
        ]
        for scored in DTYPES:
            config.policy.dtype = scored
            options = prepare.score_options(config)
            differences = np.concatenate(
                [
                    np.asarray(
                        response_logprobs(
                            policy.params,
                            batch,
                            each,
                            None,
                            actor.banned,
                            config=policy.config,
                            options=options,
                            count=4,
                        )
                        - each.logprobs
                    )[np.asarray(each.mask)]
                    for batch, each in zip(batches, samples, strict=True)
                ]
            )
            size, ratio = np.abs(differences), np.exp(differences)
            clipped = np.mean((ratio < 0.8) | (ratio > 1.3))
            print(
                f"| {sampled} | {scored} | {len(size):,} | {size.mean():.1e} |"
                f" {np.quantile(size, 0.999):.1e} | {size.max():.1e} | {ratio.mean():.5f} |"
                f" {100 * clipped:.3f} % |"
            )


if __name__ == "__main__":
    app.run(main)
