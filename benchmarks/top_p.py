"""Top-p by a search beside top-p by sorting. python -m benchmarks.top_p

Both cut the same distributions over Qwen2.5's vocabulary, in turns; prints the medians of several
runs, and that they keep the same ids.
"""

import statistics
import time
from datetime import date
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.rollout.sampling import nucleus

RUNS = 5
VOCABULARY = 151_936
CASES = ((1, 0.95), (16, 0.95), (64, 0.95))
"""Tokens that are sampled at once, and top-p."""


def sorted_nucleus(probs: jax.Array, top_p: float) -> jax.Array:
    """Returns what `nucleus` does: ids from the most probable on until their mass is `top_p`."""
    ranked = jnp.sort(probs, axis=-1, descending=True)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    threshold = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(probs >= threshold, probs, 0.0)


def main() -> None:
    """Prints the table."""
    print(f"{date.today()}, {jax.default_backend()}, medians of {RUNS} runs\n")
    print("| tokens | top-p | ids kept | sort s | search s | sort / search | equal |")
    print("|---|---|---|---|---|---|---|")
    for tokens, top_p in CASES:
        logits = 3 * np.random.default_rng(0).normal(size=(tokens, VOCABULARY))
        probs = jax.nn.softmax(jnp.float32(logits))
        ways = [jax.jit(partial(way, top_p=top_p)) for way in (sorted_nucleus, nucleus)]
        kept = [np.asarray(way(probs)) for way in ways]
        seconds: list[list[float]] = [[], []]
        for _ in range(RUNS):
            for way, times in zip(ways, seconds, strict=True):
                started = time.perf_counter()
                way(probs).block_until_ready()
                times.append(time.perf_counter() - started)
        slow, fast = map(statistics.median, seconds)
        print(
            f"| {tokens} | {top_p} | {np.mean((kept[0] > 0).sum(axis=-1)):,.0f} | {slow:.3f} |"
            f" {fast:.3f} | {slow / fast:.0f} | {'yes' if np.array_equal(*kept) else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
