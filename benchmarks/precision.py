"""What bfloat16 and int8 change. python -m benchmarks.precision [--config=FILE]

Samples responses to EmoScenes with the layers' arithmetic in float32, in bfloat16, and in bfloat16
with int8 weights in the decoder's layers (`rollout.weight_dtype`), scores each of them in float32
and in bfloat16, and compares the log-probability of every token with the sampler's own. Then
compares gradients of all parameters in bfloat16 with those in float32, of two losses on the same
responses. The weights are the same float32 ones. Needs the embedded base policy; trains it first if
it is not there.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

from configs import cpu_demo
from emor3_jax import prepare
from emor3_jax.io.console import Console
from emor3_jax.learner.gradients import UpdateSpec
from emor3_jax.learner.learner import Learner
from emor3_jax.learner.logprobs import planned_logprobs, score_responses
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.params import leaves
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.rl.correction import mismatch
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.runtime.job import start_jax
from emor3_jax.types import Batch, Experience, Samples, split

DTYPES = ("float32", "bfloat16")
SAMPLERS = {
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "int8": ("bfloat16", True),
}
"""Name → compute type, and whether the weights are quantised."""

MICRO_BATCHES = 4
_CONFIG = config_flags.DEFINE_config_file("config", cpu_demo.__file__)


def in_dtype(loaded: LoadedPolicy, name: str) -> LoadedPolicy:
    """Returns the policy with another compute type, and the same parameters."""
    return dataclasses.replace(loaded, policy=loaded.policy.with_compute(dtype=jnp.dtype(name)))


def group_of(path: str) -> str:
    """Returns the row of a parameter."""
    if "embed_tokens" in path or path.startswith("lm_head"):
        return "embedding and head (tied)" if "embed_tokens" in path else "head"
    part = "tower" if path.startswith("visual") else "decoder"
    return f"{part}, {'matrices' if path.endswith('kernel') else 'norms and biases'}"


def gradient(
    spec: UpdateSpec,
    params: dict,
    data: Sequence[tuple[Batch, Samples, np.ndarray]],
    suppressed: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns path → gradient of the weighted sum of log-probabilities, in micro-batches.

    Args:
      spec: with the policy and its compute type.
      params: of the policy.
      data: batches of prompts, their responses, and the weight of each token.
      suppressed: bool[V], ids that the sampler could not draw.
    """

    @jax.jit
    @jax.grad
    def one(params: dict, batch: Batch, samples: Samples, weights: jax.Array) -> jax.Array:
        found = score_responses(spec.policy, params, batch, samples, spec.logprobs, suppressed)
        return -jnp.sum(weights * found.logprobs)

    parts = [part for given in data for part in split(given, MICRO_BATCHES)]
    total = [jax.device_get(one(params, *part)) for part in parts]
    return dict(leaves(jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *total)))


def gradient_errors(found: dict, wanted: dict) -> Iterator[str]:
    """Yields the rows of the table of gradients."""
    for group in dict.fromkeys(map(group_of, wanted)):
        paths = [path for path in wanted if group_of(path) == group]
        exact = np.concatenate([wanted[path].ravel() for path in paths])
        difference = np.concatenate([found[path].ravel() for path in paths]) - exact
        size = np.sum(exact**2)
        error = np.sqrt(np.sum(difference**2) / size)
        bias = np.sum(difference * exact) / size
        yield f"{group} | {exact.size:,} | {100 * error:.2f} % | {100 * bias:+.2f} %"


def print_gradients(
    config: ConfigDict, loaded: LoadedPolicy, data: Sequence[tuple[Batch, Samples]], suppressed: Any
) -> None:
    """Prints the table of gradients.

    Args:
      config: of the run.
      loaded: the policy.
      data: batches of prompts and their responses.
      suppressed: bool[V], ids that the sampler could not draw.
    """
    print(
        "\n| loss | parameters | number | relative error | bias |\n|---|---|---|---|---|",
        flush=True,
    )
    total = sum(int(np.sum(samples.lengths)) for _, samples in data)
    rng = np.random.default_rng(0)
    signs = [rng.normal(size=(*samples.lengths.shape, 1)) for _, samples in data]
    for name, advantages in (("imitation", [np.ones_like(x) for x in signs]), ("policy", signs)):
        weighted = [
            (batch, samples, np.float32(each * np.asarray(samples.mask) / total))
            for (batch, samples), each in zip(data, advantages, strict=True)
        ]
        exact, rough = (
            gradient(
                prepare.make_update_spec(config, in_dtype(loaded, dtype).policy),
                loaded.params,
                weighted,
                suppressed,
            )
            for dtype in DTYPES
        )
        for row in gradient_errors(rough, exact):
            print(f"| {name} | {row} |", flush=True)


def differences(
    learner: Learner, rollout: Rollout, params: dict, data: Sequence[tuple[Batch, Samples]]
) -> np.ndarray:
    """Returns how far the learner's log-probability of each token is from the sampler's.

    Args:
      learner: who scores.
      rollout: who sampled.
      params: float32 parameters of both.
      data: batches of prompts and their responses.

    Returns:
      float32[number of tokens], in nats.
    """
    found = []
    spec = learner.spec.logprobs._replace(temperature=rollout.sampling.temperature)
    for batch, samples in data:
        given, plan, _ = learner.plan(Experience(batch, samples, None, None, None))
        scored = planned_logprobs(
            params,
            batch,
            given.samples,
            plan,
            rollout.suppressed,
            policy=learner.spec.policy,
            spec=spec,
        ).logprobs
        difference = np.asarray(scored - given.samples.logprobs)
        found.append(difference[np.asarray(given.samples.mask)])
    return np.concatenate(found)


def mismatch_row(found: np.ndarray) -> str:
    """Returns a row of the table of log-probabilities, of `differences`."""
    size, ratio = np.abs(found), np.exp(found)
    clipped = np.mean((ratio < 0.8) | (ratio > 1.3))
    everyone = np.ones(found.shape, bool)
    ess = float(mismatch(found, np.zeros_like(found), everyone)["sampler_ess"])
    return (
        f"{len(size):,} | {size.mean():.1e} | {np.quantile(size, 0.999):.1e} | {size.max():.1e} |"
        f" {ratio.mean():.5f} | {100 * clipped:.3f} % | {100 * ess:.3f} %"
    )


def main(_: list[str]) -> None:
    """Prints the tables."""
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
        " outside [0.8, 1.3] | effective sample size |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, (dtype, int8) in SAMPLERS.items():
        policy = in_dtype(loaded, dtype)
        rollout = prepare.make_rollout(config, policy, data.labels["train"], mesh)
        rollout = dataclasses.replace(rollout, int8=int8)
        sampled = [
            rollout.respond(policy.params, batch, jax.random.key(i))[1]
            for i, batch in enumerate(batches)
        ]
        for scored in DTYPES:
            learner, _ = prepare.make_learner(config, in_dtype(loaded, scored), mesh, imitate=True)
            pairs = list(zip(batches, sampled, strict=True))
            found = differences(learner, rollout, policy.params, pairs)
            print(f"| {name} | {scored} | {mismatch_row(found)} |", flush=True)
        if dtype == "bfloat16" and not int8:
            samples = sampled
    given = list(zip(batches, samples, strict=True))
    print_gradients(config, loaded, given, rollout.suppressed)


if __name__ == "__main__":
    app.run(main)
