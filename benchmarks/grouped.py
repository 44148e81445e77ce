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
from emor3_jax.rollout.score import score_responses

from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.shapes import Config, VisionConfig
from emor3_jax.types import Images, Prompt

RUNS = 5
CASES = (  # prompts, responses, windows of an image (16 tokens each), text tokens, response tokens
    (8, 4, 1, 64, 64),
    (8, 8, 1, 64, 64),
    (4, 8, 4, 64, 64),
    (4, 8, 16, 64, 64),
)


def small_config() -> Config:
    """Returns a Qwen2.5-VL of 2.8 million parameters."""
    vision = VisionConfig(
        depth=3,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=(2,),
        out_hidden_size=192,
    )
    return Config(
        vision=vision,
        vocab_size=1200,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1e4,
        mrope_section=(4, 6, 6),
        tie_word_embeddings=True,
    )


def inputs(b: int, windows: int, text: int, seed: int) -> tuple[Prompt, Images]:
    """Returns random prompts, an image in front of each."""
    rng = np.random.default_rng(seed)
    p, slots = windows * 16 + text, np.arange(windows * 16)
    tokens = rng.integers(0, 1200, (b, p)).astype(np.int32)
    image_slots = np.full((b, p), -1, np.int32)
    image_slots[:, 4 : 4 + len(slots)] = np.arange(b)[:, None] * len(slots) + slots
    positions = np.broadcast_to(np.arange(p, dtype=np.int32)[None, :, None], (b, p, 3))
    shape = (b, windows, 64)
    patches = rng.normal(size=(*shape, 1176)).astype(np.float32)
    coords = rng.integers(0, 32, (*shape, 2)).astype(np.int32)
    prompt = Prompt(tokens, positions, np.ones((b, p), bool), image_slots)
    return prompt, Images(patches, coords, np.ones(shape, bool))


def repeat(prompt: Prompt, images: Images, g: int) -> tuple[Prompt, Images]:
    """Returns each prompt and image g times, as the flat layout has them."""
    rows = np.repeat(np.arange(len(prompt.tokens)), g)
    each = images.mask.shape[1] * 16
    slots = prompt.image_slots[rows]
    moved = slots - rows[:, None] * each + np.arange(len(rows))[:, None] * each
    prompt = Prompt(*(x[rows] for x in prompt))
    prompt = prompt._replace(image_slots=np.where(slots >= 0, moved, -1).astype(np.int32))
    return prompt, Images(*(x[rows] for x in images))


def main() -> None:
    """Runs the cases and prints the table."""
    config = small_config()
    params = model.init_params(config, jax.random.key(0))
    banned = np.zeros(config.vocab_size, bool)

    @jax.jit
    def gradient(
        params: dict,
        prompt: Prompt,
        images: Images,
        last: jax.Array,
        position: jax.Array,
        responses: jax.Array,
    ) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            score = score_responses(
                config,
                params,
                prompt,
                images,
                last,
                position,
                responses,
                jnp.full(responses.shape[:2], responses.shape[2]),
                banned=banned,
                temperature=1.0,
            )
            return score.logprobs.mean()

        return jax.value_and_grad(loss)(params)

    print(f"{date.today()}, {jax.devices()[0].device_kind}, medians of {RUNS} runs\n")
    print(
        "| prompts | responses | prompt tokens | grouped s | flat s | flat / grouped | agree to |"
    )
    print("|---|---|---|---|---|---|---|")
    for b, g, windows, text, t in CASES:
        prompt, images = inputs(b, windows, text, 0)
        p = prompt.tokens.shape[1]
        responses = np.random.default_rng(1).integers(0, 1200, (b, g, t)).astype(np.int32)
        last, position = np.ones(b, np.int32), np.full(b, p, np.int32)
        flat = (*repeat(prompt, images, g), np.repeat(last, g), np.repeat(position, g))
        layouts = {
            "grouped": (prompt, images, last, position, responses),
            "flat": (*flat, responses.reshape(b * g, 1, t)),
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
