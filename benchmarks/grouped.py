"""Grouped against flat: what sharing a prompt saves. python -m benchmarks.grouped

Both score the same responses and differentiate by the parameters, in float32, with the same layers:
grouped as training does it, flat with every response as a prompt and image of its own (the layout
of the release). Prints the medians of several runs, and that the results agree.
"""

import statistics
import time
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.learner.logprobs import LogprobSpec, score_responses
from emor3_jax.models import Policy, parse_config
from emor3_jax.types import Batch, Images, Prompt, Samples

RUNS = 5
CASES = (  # prompts, responses, windows of an image (16 tokens each), text tokens, response tokens
    (8, 4, 1, 64, 64),
    (8, 8, 1, 64, 64),
    (4, 8, 4, 64, 64),
    (4, 8, 16, 64, 64),
)


_CONFIG = {
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [2],
        "out_hidden_size": 192,
    },
    "vocab_size": 1200,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": True,
    "max_position_embeddings": 128_000,
    # Not read: prompts and image slots are given as arrays.
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
"""A Qwen2.5-VL of 2.8 million parameters."""


def small_policy() -> Policy:
    """Returns the policy that both layouts score with."""
    return parse_config(_CONFIG)


def inputs(b: int, windows: int, text: int, seed: int) -> Batch:
    """Returns random prompts, an image in front of each."""
    rng = np.random.default_rng(seed)
    p, slots = windows * 16 + text, np.arange(windows * 16)
    tokens = rng.integers(0, 1200, (b, p)).astype(np.int32)
    image_slots = np.full((b, p), -1, np.int32)
    image_slots[:, 4 : 4 + len(slots)] = slots
    positions = np.broadcast_to(np.arange(p, dtype=np.int32)[None, :, None], (b, p, 3))
    shape = (b, 1, windows, 64)
    patches = rng.normal(size=(*shape, 1176)).astype(np.float32)
    coords = rng.integers(0, 32, (*shape, 2)).astype(np.int32)
    prompt = Prompt(tokens, positions, np.ones((b, p), bool), image_slots)
    ones = np.ones(b, np.int32)
    return Batch(
        prompt=prompt,
        last_token=ones,
        next_position=np.full(b, p, np.int32),
        images=Images(patches, coords, np.ones(shape, bool)),
        # Of rewards and reflections; not read here.
        shared_length=ones,
        shared_position=ones,
        answers=ones,
        grades=ones[:, None],
        weight=ones,
    )


def whole(responses: np.ndarray) -> Samples:
    """Returns responses int32[B, G, T] without padding as samples."""
    lengths = np.full(responses.shape[:2], responses.shape[2], np.int32)
    logprobs = np.zeros(responses.shape, np.float32)
    return Samples(responses, logprobs, lengths, np.ones(lengths.shape, bool))


def main() -> None:
    """Runs the cases and prints the table."""
    policy, spec = small_policy(), LogprobSpec(temperature=1.0, chunk=1024)
    params = policy.init(jax.random.key(0))
    suppressed = np.zeros(policy.shapes.vocab_size, bool)

    @jax.jit
    def gradient(params: dict, batch: Batch, samples: Samples) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            score = score_responses(policy, params, batch, samples, spec, suppressed)
            return score.logprobs.mean()

        return jax.value_and_grad(loss)(params)

    print(f"{date.today()}, {jax.devices()[0].device_kind}, medians of {RUNS} runs\n")
    print(
        "| prompts | responses | prompt tokens | grouped s | flat s | flat / grouped | agree to |"
    )
    print("|---|---|---|---|---|---|---|")
    for b, g, windows, text, t in CASES:
        batch = inputs(b, windows, text, 0)
        p = batch.prompt.tokens.shape[1]
        responses = np.random.default_rng(1).integers(0, 1200, (b, g, t)).astype(np.int32)
        # Each prompt and image g times.
        flat = jax.tree.map(lambda x: np.repeat(x, g, axis=0), batch)  # noqa: B023
        layouts = {
            "grouped": (batch, whole(responses)),
            "flat": (flat, whole(responses.reshape(b * g, 1, t))),
        }
        seconds: dict[str, list[float]] = {name: [] for name in layouts}
        results = {name: jax.block_until_ready(gradient(params, *x)) for name, x in layouts.items()}
        for _ in range(RUNS):
            for name, arguments in layouts.items():
                started = time.perf_counter()
                jax.block_until_ready(gradient(params, *arguments))
                seconds[name].append(time.perf_counter() - started)
        grouped, flat_seconds = (statistics.median(seconds[n]) for n in ("grouped", "flat"))
        gradients = [jax.tree.leaves(results[n][1]) for n in ("grouped", "flat")]
        error = max(
            float(jnp.abs(a - c).max() / (jnp.abs(a).max() + 1e-12))
            for a, c in zip(*gradients, strict=True)
        )
        ratio = flat_seconds / grouped
        print(
            f"| {b} | {g} | {p} | {grouped:.2f} | {flat_seconds:.2f} | {ratio:.1f} | {error:.0e} |"
        )


if __name__ == "__main__":
    main()
