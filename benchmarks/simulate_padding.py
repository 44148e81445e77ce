"""Padding of reference and update under drawn response lengths, before and after: no device.

    python -m benchmarks.simulate_padding [--steps=30]

The planner is the learner's own (`learner.micro_batches`), with the settings of a config; lengths
are log-normal with a mean of about 265 tokens, 1 % of them cut at the longest. Prompts and images
are taken at their largest, which leaves the least memory for prompts that share rows. "Before" is
one shape for all prompts of the step, each response in a row of its own.
"""

import argparse
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks.options import whole
from configs import tpu_v5e
from emor3_jax import prepare
from emor3_jax.learner.learner import plan_spec
from emor3_jax.learner.micro_batches import RowSizes, Shape, plan_step
from emor3_jax.models import published
from emor3_jax.types import bucket

_MEAN, _SPREAD = 4.985, 1.135
"""Of the logarithms: a mean of 265 tokens where 1 % is cut at 2,048."""


class PaddingFound(NamedTuple):
    """What a simulation found, means over its steps.

    Attributes:
      before, after: real over padded response tokens.
      shapes: of the micro-batches of a step.
      all_shapes: of all steps.
      micro_batches: of a step.
    """

    before: float
    after: float
    shapes: float
    all_shapes: int
    micro_batches: float


def draw_lengths(shape: tuple[int, int], most: int, seed: int) -> np.ndarray:
    """Returns drawn response lengths, int[B, G] from 1 to `most`."""
    drawn = np.random.default_rng(seed).lognormal(_MEAN, _SPREAD, shape)
    return np.clip(np.ceil(drawn), 1, most).astype(np.int64)


def simulate_padding(config: ConfigDict, chips: int, attention: str, steps: int) -> PaddingFound:
    """Plans the micro-batches of some steps.

    Args:
      config: of the run; its policy is a published one.
      chips: of the slice.
      attention: back end.
      steps: drawn, with seeds 0, 1, …
    """
    policy = published(config.policy.path)
    assert policy is not None, config.policy.path
    policy = policy.with_compute(attention=attention)
    parts = chips // config.mesh.tensor
    step = prepare.make_step_spec(config)
    spec = plan_spec(policy, step, parts)
    b, g, t = config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens
    windows, prompt = step.buckets.windows[-1], step.buckets.prompt[-1]
    patches = policy.shapes.vision.window_patches
    before, after, shapes, counts, every = [], [], [], [], set()
    for seed in range(steps):
        lengths = draw_lengths((b, g), t, seed)
        sizes = RowSizes(lengths, *(np.full(b, n) for n in (prompt, windows, windows * patches)))
        plan = plan_step(sizes, Shape(prompt, windows, t), step.buckets, spec)
        found = plan.padding(sizes, patches)
        longest = bucket(int(lengths.max()), (*step.buckets.length, t))
        before.append(lengths.sum() / (b * g * longest))
        after.append(found["padding/response"])
        shapes.append(found["padding/shapes"])
        counts.append(sum(map(len, plan.updates)))
        every |= plan.shapes()
    means = [float(np.mean(x)) for x in (before, after, shapes, counts)]
    return PaddingFound(*means[:3], len(every), means[3])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=whole(1), default=30)
    print_table(parser.parse_args().steps)


def print_table(steps: int) -> None:
    """Prints a table of simulations of so many steps."""
    print("3B, configs/tpu_v5e.py:chips=64; real over padded response tokens\n")
    print("| attention | balance | before | after | micro-batches | shapes a step | in all |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for attention in ("splash", "xla"):
        for balance in (False, True):
            config = tpu_v5e.get_config("3b,chips=64")
            config.policy_update.balance = balance
            found = simulate_padding(config, 64, attention, steps)
            print(
                f"| {attention} | {balance} | {found.before:.2f} | {found.after:.3f} | "
                f"{found.micro_batches:.0f} | {found.shapes:.1f} | {found.all_shapes} |"
            )


if __name__ == "__main__":
    main()
