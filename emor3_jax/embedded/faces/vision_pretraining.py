"""Vision pretraining: the policy predicts the emotion of an image from the image alone.

For faces it precedes the QA examples of `pretrain`: these have a hundred tokens per image, so few
images are seen in the time. Here the prompt holds nothing but the image and the first words of its
description. Only two tokens are predicted, so that a step costs hardly more than the vision tower:
the label's first at `<|vision_end|>`, and after the caption prefix the first token of the
description, as QA examples want it there. The prefix gets RoPE positions as if a question lay
between it and the image, of another length in each step.

1. The patch embedding starts as a whitening of the images' patches (Coates, Ng and Lee, 2011,
   "An analysis of single-layer networks in unsupervised feature learning"), in half of its columns.
2. Each head of the tower is initialised to attend to one neighbour of every patch, as a 3 x 3
   convolution would (Zheng, Li and Lucey, 2024, "Structured initialization for attention in vision
   transformers", arXiv:2404.01139; theirs solves for the kernels of queries and keys, while rotary
   positions let their biases alone express it).
3. Images may be mixed in pairs (Zhang et al., 2018, "mixup", arXiv:1710.09412), after they were
   warped and partly erased (`embedded.faces.augment`).
4. Matrices are trained by Muon (Jordan, 2024; with the scale of Liu et al., 2025, arXiv:2502.16982,
   eq. 4), everything else by Adam.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from emor3_jax.embedded.faces.captions import CaptionBatch, CaptionLoader
from emor3_jax.embedded.pretrain import fit, forward_images
from emor3_jax.io.console import Console
from emor3_jax.models import Policy
from emor3_jax.models.rope import vision_table
from emor3_jax.rl.update import TrainState, apply_gradients
from emor3_jax.types import Images, Prompt

WHITENED = 8192
"""Number of images whose patches determine the whitening."""

# Added to the variance of a direction before 1 / sqrt(variance), and the scale of a whitened
# patch's entries.
_NOISE = 1e-2
_SCALE = 0.5

# Margin of an axis's score for the neighbour itself over the mean of all, for each of the two
# fastest frequencies; and the factor on the kernels, which add to it by content.
_NEARNESS = 6.0
_CONTENT = 0.3


def whiten_patches(kernel: jax.Array, patches: np.ndarray) -> jax.Array:
    """Returns a patch embedding whose first half whitens the patches along their main directions.

    Args:
      kernel: float32[C, D] as initialised; its other half stays.
      patches: float32[N, C] of some images, N well over C.
    """
    half = kernel.shape[1] // 2
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    variances, directions = variances[::-1][:half], directions[:, ::-1][:, :half]
    first = _SCALE * directions / np.sqrt(np.maximum(variances, 0) + _NOISE)
    return kernel.at[:, : first.shape[1]].set(first)


def init_local_attention(qkv: dict, policy: Policy, seed: int) -> dict:
    """Returns query and key parameters with which each head attends to one neighbour of a patch.

    Each head draws one of the 3 x 3 neighbours; heads of a layer differ as far as these suffice.

    Args:
      qkv: `kernel` float32[layers, C, 3 * C] and `bias` float32[layers, 3 * C], head by head.
      policy: the policy; heads of its tower have 8 components or more.
      seed: of the draw.
    """
    vision = policy.shapes.vision
    layers, heads, dim = len(qkv["bias"]), vision.num_heads, vision.head_dim
    neighbours = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(9), (layers, 1)), axis=1)
    offsets = neighbours[np.resize(order.T, (heads, layers)).T]
    cosine, sine = map(np.asarray, vision_table(jnp.asarray(offsets), dim))
    # After RoPE, a key has the angle of its own position, and a query that of the neighbour.
    fast = np.arange(dim // 2) % (dim // 4) < 2
    size = np.where(fast, np.sqrt(_NEARNESS * dim**0.5), 0.0)
    bias = np.array(qkv["bias"]).reshape(layers, heads, 3, dim)
    bias[:, :, 0] = np.concatenate([size * cosine, size * sine], axis=-1)
    bias[:, :, 1] = np.concatenate([size, np.zeros(dim // 2)])
    kernel = np.array(qkv["kernel"]).reshape(layers, -1, heads, 3, dim)
    kernel[:, :, :, :2] *= _CONTENT
    return {
        "kernel": jnp.asarray(kernel.reshape(qkv["kernel"].shape)),
        "bias": jnp.asarray(bias.reshape(qkv["bias"].shape)),
    }


def make_muon(
    learning_rate: float, warmup_steps: int, steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Returns Muon for matrices and Adam for the rest, after clipping the gradient norm.

    The learning rate warms up, stays constant, and decays to 0 over the last 70 % of the steps.

    Args:
      learning_rate: the peak; scaled so that both optimizers' updates have the same size.
      warmup_steps: updates until the peak.
      steps: number of updates.
      weight_decay: of matrices, times the learning rate.
    """
    falling = steps - int(0.7 * steps)
    schedule = optax.schedules.join_schedules(
        (
            optax.schedules.warmup_constant_schedule(0.0, learning_rate, warmup_steps),
            optax.schedules.linear_schedule(learning_rate, 0.0, steps - falling),
        ),
        (max(falling, warmup_steps),),
    )

    def shapes(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(_matrix, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule,
            weight_decay=weight_decay,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=shapes,
        ),
    )


def _matrix(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
    """Returns the matrix axes of a parameter: the last two of kernels; None for others."""
    if path[-1].key != "kernel":
        return None
    return MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))


def caption_logits(policy: Policy, params: dict, prompt: Prompt, images: Images) -> jax.Array:
    """Returns the next-token logits float32[B, 2, V] after the image and after the whole prompt.

    Args:
      policy, params: the policy.
      prompt: `<|vision_start|>`, image, `<|vision_end|>`, and maybe more; B = 1.
      images: one a row.
    """
    hidden, _ = forward_images(policy, params, prompt, images)
    image_end = jnp.max(jnp.where(prompt.image_slots[0] >= 0, jnp.arange(hidden.shape[1]), 0)) + 1
    return policy.logits(params, jnp.stack([hidden[:, image_end], hidden[:, -1]], axis=1))


@partial(jax.jit, static_argnames=("policy", "optimizer", "mix"), donate_argnames="state")
def vision_step(
    state: TrainState,
    prompt: Prompt,
    batch: CaptionBatch,
    *,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    mix: float = 0.0,
    seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step.

    Args:
      state: of the policy; its count of updates and `seed` seed the mixup.
      prompt: as of `caption_logits`.
      batch: the images, of one size, and targets.
      policy: the policy.
      optimizer: that of `state`.
      mix: each image is mixed with the one before it in the batch by a share of Beta(mix, mix),
        the larger share its own; 0 disables mixup.
      seed: of the mixup.

    Returns:
      The new state, and `loss` and `right` (means over both positions of `caption_logits`; a
      prediction is right if it is the target of the image with the larger share) and `grad_norm`.
    """
    shares = jnp.ones(len(batch.targets))
    if mix:
        key = jax.random.fold_in(jax.random.key(seed), state.updates)
        drawn = jax.random.beta(key, mix, mix, shares.shape)
        shares = jnp.maximum(drawn, 1 - drawn)
    others = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), batch)
    patches = shares[:, None, None, None, None]
    patches = patches * batch.images.patches + (1 - patches) * others.images.patches
    images = batch.images._replace(patches=patches)

    def loss_fn(params: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = caption_logits(policy, params, prompt, images)
        loss = sum(
            share[:, None] * optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            for share, targets in ((shares, batch.targets), (1 - shares, others.targets))
        )
        return jnp.mean(loss), {"right": jnp.mean(_correct(logits, batch))}

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, applied = apply_gradients(state, grads, optimizer)
    return state, {"loss": loss, **metrics, **applied}


@partial(jax.jit, static_argnames="policy")
def correct_captions(
    params: dict, prompt: Prompt, batch: CaptionBatch, *, policy: Policy
) -> jax.Array:
    """Returns bool[B, 2]: the targets are the likeliest tokens, at each position."""
    return _correct(caption_logits(policy, params, prompt, batch.images), batch)


def _correct(logits: jax.Array, batch: CaptionBatch) -> jax.Array:
    return jnp.argmax(logits, axis=-1) == batch.targets


def pretrain_vision(
    config: ConfigDict, captions: CaptionLoader, params: dict, say: Console
) -> dict:
    """Returns parameters that predict the caption targets of an image.

    Args:
      config: see `emor3_jax.config.base_policy`.
      captions: the data.
      params: of the policy, as initialised.
      say: the console.
    """
    policy = captions.rows.policy
    stage = config.look
    batches = captions.batches(stage.batch, config.seed)
    prompts = captions.shifted_prompts(config.seed)
    images = [next(batches).images for _ in range(-(-WHITENED // stage.batch))]
    patches = np.concatenate([np.asarray(x.patches)[np.asarray(x.mask)] for x in images])
    visual = params["visual"]
    kernel = whiten_patches(visual["patch_embed"]["kernel"], patches)
    embed = visual["patch_embed"] | {"kernel": kernel}
    qkv = init_local_attention(visual["blocks"]["attn"]["qkv"], policy, config.seed)
    blocks = visual["blocks"] | {"attn": visual["blocks"]["attn"] | {"qkv": qkv}}
    params = params | {"visual": visual | {"patch_embed": embed, "blocks": blocks}}
    optimizer = make_muon(stage.learning_rate, stage.warmup_steps, stage.steps, stage.weight_decay)

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return vision_step(
            *(state, next(prompts), next(batches)),
            policy=policy,
            optimizer=optimizer,
            mix=stage.mix,
            seed=config.seed,
        )

    state = TrainState.create(params, optimizer)
    return fit("vision pretraining", stage.steps, step, state, say).params


def evaluate_captions(
    config: ConfigDict, captions: CaptionLoader, params: dict
) -> tuple[float, float]:
    """Returns the shares of held-out images whose label, and first caption token, is predicted.

    The caption prefix follows the image without a gap.

    Args:
      config: see `emor3_jax.config.base_policy`.
      captions: the data.
      params: of the policy.
    """
    prompt = captions.prompt()
    correct = [
        correct_captions(params, prompt, batch, policy=captions.rows.policy)
        for batch in captions.held_out_batches(config.look.batch)
    ]
    label, caption = np.mean(np.concatenate(correct), axis=0)
    return float(label), float(caption)
