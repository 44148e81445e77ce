"""Teaches a policy to see: it names the emotion of a picture from the picture alone.

For faces it comes before the lessons of `pretrain`: these have a hundred tokens to each picture, so
few pictures are seen in the time. Here the image stands alone but for the words that a description
begins with. Two tokens are all that is predicted, so that a step costs hardly more than the tower:
the label's first at `<|vision_end|>`, and after those words the first with which a description goes
on, as lessons want it there. The words stand as far from the image as if a question lay between,
each time another.

1. The patch embedding starts as a whitening of the pictures' patches (Coates, Ng and Lee, 2011,
   "An analysis of single-layer networks in unsupervised feature learning"), in half of its columns.
2. Each head of the tower starts by attending to one neighbour of every patch, as a convolution of
   3 x 3 would (Zheng, Li and Lucey, 2024, "Structured initialization for attention in vision
   transformers", arXiv:2404.01139; theirs solves for the kernels of queries and keys, while rotary
   positions let their biases alone say it).
3. Pictures may be mixed in pairs (Zhang et al., 2018, "mixup", arXiv:1710.09412), after they were
   warped and partly hidden (`embedded.warp`).
4. Matrices learn by Muon (Jordan, 2024; with the scale of Liu et al., 2025, arXiv:2502.16982,
   eq. 4), everything else by Adam.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from transformers import PreTrainedTokenizerBase

from emor3_jax.embedded.pretrain import see
from emor3_jax.models.qwen2_5_vl import model, rope
from emor3_jax.models.qwen2_5_vl.config import Config, VisionConfig
from emor3_jax.models.qwen2_5_vl.inputs import Images, Prompt
from emor3_jax.rl.update import TrainState, apply_gradients

# What 1 / sqrt(variance) of a direction is bounded by, and the scale of a whitened patch's entries.
_NOISE = 1e-2
_SCALE = 0.5

# How much an axis's score for the neighbour itself is over the mean of all, for each of the two
# fastest frequencies; and what is left of the kernels that would add to it by content.
_NEARNESS = 6.0
_CONTENT = 0.3


class Looks(NamedTuple):
    """A batch: images, and what each shows.

    Attributes:
      images: one a row.
      names: int32[B, 2], the tokens of what each shows: where the image ends, its label's first;
        where the prompt ends, the first with which a description goes on.
    """

    images: Images
    names: np.ndarray


def first_tokens(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str]) -> dict[str, int]:
    """Returns the first token of each label's name.

    Args:
      tokenizer: of the policy.
      names: by label, with the space before them where one is.

    Raises:
      ValueError: if two names begin with the same token.
    """
    tokens = {
        label: tokenizer(name, add_special_tokens=False).input_ids[0]
        for label, name in names.items()
    }
    if len(set(tokens.values())) < len(tokens):
        raise ValueError(
            f"some of the names {sorted(names.values())} begin with the same token: {tokens}; a "
            "larger vocabulary (model.vocab_size) keeps them apart"
        )
    return tokens


def whitened(kernel: jax.Array, patches: np.ndarray) -> jax.Array:
    """Returns a patch embedding whose first half whitens the patches along their main directions.

    Args:
      kernel: float32[C, D] as initialised; its other half stays.
      patches: float32[N, C] of some pictures, N well over C.
    """
    half = kernel.shape[1] // 2
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    variances, directions = variances[::-1][:half], directions[:, ::-1][:, :half]
    first = _SCALE * directions / np.sqrt(np.maximum(variances, 0) + _NOISE)
    return kernel.at[:, : first.shape[1]].set(first)


def local_heads(qkv: dict, config: VisionConfig, seed: int) -> dict:
    """Returns queries and keys of which each head attends to one neighbour of every patch.

    Which one of the 3 x 3 is drawn for each head, different ones in a layer while there are some.

    Args:
      qkv: `kernel` float32[layers, C, 3 * C] and `bias` float32[layers, 3 * C], head by head.
      config: of the tower; its heads have 8 components or more.
      seed: of the draw.
    """
    layers, heads, dim = len(qkv["bias"]), config.num_heads, config.head_dim
    neighbours = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(9), (layers, 1)), axis=1)
    offsets = neighbours[np.resize(order.T, (heads, layers)).T]
    cosine, sine = (np.asarray(x) for x in rope.vision_table(jnp.asarray(offsets), config))
    # Turned by its place, a key has the angle of its place, and a query that of the place sought.
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
    """Returns Muon for matrices and Adam for the rest, behind a clip of the gradient norm.

    The rate rises, holds, and over the last 70 % of the steps falls to 0.

    Args:
      learning_rate: the highest; scaled so that both optimizers' updates are alike in size.
      warmup_steps: updates until it is reached.
      steps: all updates.
      weight_decay: of matrices, times the rate.
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
    """Returns which axes of a parameter make a matrix: the last two of kernels; None for others."""
    if path[-1].key != "kernel":
        return None
    return MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))


def name_logits(config: Config, params: dict, prompt: Prompt, images: Images) -> jax.Array:
    """Returns the logits float32[B, 2, V] of what follows the image, and of what the whole prompt.

    Args:
      config, params: the policy.
      prompt: `<|vision_start|>`, image, `<|vision_end|>`, and maybe more; B = 1.
      images: one a row.
    """
    hidden, _ = see(config, params, prompt, images)
    image_end = jnp.max(jnp.where(prompt.image_slots[0] >= 0, jnp.arange(hidden.shape[1]), 0)) + 1
    return model.logits(config, params, jnp.stack([hidden[:, image_end], hidden[:, -1]], axis=1))


@partial(jax.jit, static_argnames=("config", "optimizer", "mix"), donate_argnames="state")
def look_step(
    state: TrainState,
    prompt: Prompt,
    looks: Looks,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    mix: float = 0.0,
    seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step.

    Args:
      state: of the policy; its count of updates and `seed` seed the mixing.
      prompt: as of `name_logits`.
      looks: the batch; the images of one size.
      config, optimizer: the policy's and its own.
      mix: each picture is mixed with the one before it in the batch by a share of Beta(mix, mix),
        the larger part its own; 0 mixes none.
      seed: of the mixing.

    Returns:
      The new state, and `loss` and `right` (the means of both places of `name_logits`; right is
      what the larger share shows) and `grad_norm`.
    """
    shares = jnp.ones(len(looks.names))
    if mix:
        key = jax.random.fold_in(jax.random.key(seed), state.updates)
        drawn = jax.random.beta(key, mix, mix, shares.shape)
        shares = jnp.maximum(drawn, 1 - drawn)
    others = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), looks)
    patches = shares[:, None, None, None]
    patches = patches * looks.images.patches + (1 - patches) * others.images.patches
    images = looks.images._replace(patches=patches)

    def loss_fn(params: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = name_logits(config, params, prompt, images)
        loss = sum(
            share[:, None] * optax.softmax_cross_entropy_with_integer_labels(logits, names)
            for share, names in ((shares, looks.names), (1 - shares, others.names))
        )
        return jnp.mean(loss), {"right": jnp.mean(_right(logits, looks))}

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, applied = apply_gradients(state, grads, optimizer)
    return state, {"loss": loss, **metrics, **applied}


@partial(jax.jit, static_argnames="config")
def named_right(params: dict, prompt: Prompt, looks: Looks, *, config: Config) -> jax.Array:
    """Returns bool[B, 2], whether the names are the likeliest at both places of `name_logits`."""
    return _right(name_logits(config, params, prompt, looks.images), looks)


def _right(logits: jax.Array, looks: Looks) -> jax.Array:
    return jnp.argmax(logits, axis=-1) == looks.names
