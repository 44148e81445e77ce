"""Reference pass, policy update and imitation over grouped batches, in micro-batches of groups."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emor3_jax.data.batch import Batch
from emor3_jax.episode import bucket
from emor3_jax.models.lora import Lora
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.layers import Remat
from emor3_jax.rl import losses
from emor3_jax.rl.update import TrainState, accumulate, apply_gradients
from emor3_jax.rollout.generate import Samples
from emor3_jax.rollout.packing import Packing
from emor3_jax.rollout.score import Score, score_responses


class LossOptions(NamedTuple):
    """The loss of the config's `policy_update` section; hashable, a static argument.

    Attributes:
      clip_low, clip_high, clip_dual, kl_coef, ratio, kl: see `losses.policy_loss`.
      mean, limit: see `losses.token_weights`.
      entropy: also report the entropy, for one more pass over the logits.
      mask_truncated: leave out responses that were cut off (DAPO, arXiv 2503.14476).
    """

    clip_low: float
    clip_high: float
    clip_dual: float
    kl_coef: float
    mean: str
    entropy: bool = True
    ratio: str = "token"
    kl: str = "k3"
    limit: int | None = None
    mask_truncated: bool = False

    def weights(self, samples: Samples) -> jax.Array:
        """Returns the weight of each token of an update's responses, float32[B, G, T]."""
        mask = samples.mask
        if self.mask_truncated:
            mask &= samples.ended[..., None]
        return losses.token_weights(mask, self.mean, limit=self.limit)


class ScoreOptions(NamedTuple):
    """How responses are scored; hashable, a static argument.

    Attributes:
      temperature: of the rollout.
      dtype, remat, chunk: see `score_responses`.
    """

    temperature: float
    dtype: Any
    remat: Remat
    chunk: int


@jax.jit
def sampler_gap(logprobs: jax.Array, samples: Samples) -> jax.Array:
    """Returns how far log-probabilities, float32[B, G, T], are from the sampler's, in the mean."""
    gap = jnp.where(samples.mask, jnp.abs(logprobs - samples.logprobs), 0.0)
    return jnp.sum(gap) / jnp.sum(samples.lengths)


def trim(samples: Samples, longest: int, sizes: Sequence[int]) -> Samples:
    """Cuts padding off the end: the smallest of `sizes` that holds the longest response.

    Args:
      samples: of length T.
      longest: length of the longest response, at most T.
      sizes: rising lengths; T itself is used if none of them is enough.
    """
    t = samples.tokens.shape[-1]
    size = min(bucket(longest, (*sizes, t)), t)
    return samples._replace(
        tokens=samples.tokens[..., :size], logprobs=samples.logprobs[..., :size]
    )


def micro_batches(batch: Batch, merge: int, count: int) -> Batch:
    """Cuts a batch into `count` micro-batches of whole prompts with their images.

    Micro-batch `i` takes rows `i, count + i, …`: a batch that is cut over devices stays in place.

    Args:
      batch: each prompt has the same number of images, in the prompts' order.
      merge: patches that the merger joins (spatial_merge_size squared).
      count: must divide B.

    Returns:
      The batch with [count, …] in front of every leaf, image slots counted within a micro-batch.
    """
    rows = batch.last_token.shape[0]
    images, windows, length = batch.images.mask.shape
    slots = images // rows * windows * length // merge
    row = jnp.arange(rows)[:, None]
    moved = batch.prompt.image_slots - row * slots + row // count * slots
    image_slots = jnp.where(batch.prompt.image_slots >= 0, moved, -1)
    by_prompt = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]), batch.images)
    batch = batch._replace(prompt=batch.prompt._replace(image_slots=image_slots), images=by_prompt)
    micro = jax.tree.map(lambda x: _cut(x, count), batch)
    return micro._replace(
        images=jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[3:]), micro.images)
    )


def _cut(x: jax.Array, count: int) -> jax.Array:
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def _score(
    params: dict,
    batch: Batch,
    samples: Samples,
    packing: Packing | None,
    banned: jax.Array,
    config: Config,
    options: ScoreOptions,
    entropy: bool = False,
    features: jax.Array | None = None,
) -> Score:
    return score_responses(
        config,
        params,
        batch.prompt,
        batch.images,
        batch.last_token,
        batch.next_position,
        samples.tokens,
        samples.lengths,
        banned=banned,
        temperature=options.temperature,
        dtype=options.dtype,
        remat=options.remat,
        chunk=options.chunk,
        entropy=entropy,
        packing=packing,
        features=features,
    )


@partial(jax.jit, static_argnames=("config", "options", "count"))
def response_logprobs(
    params: dict,
    batch: Batch,
    samples: Samples,
    packing: Packing | None,
    banned: jax.Array,
    features: jax.Array | None = None,
    *,
    config: Config,
    options: ScoreOptions,
    count: int,
) -> jax.Array:
    """Returns the responses' log-probabilities under a policy, float32[B, G, T].

    Args:
      params: of the reference, or of the policy itself, to recompute what the sampler recorded.
      batch, samples: the prompts and their responses.
      packing: how responses share rows, or None.
      banned: bool[V].
      features: float[B, S, D], what the tower made of the pictures; None asks it.
      config: of the policy.
      options: how to score.
      count: micro-batches, must divide B.
    """
    merge = config.vision.spatial_merge_size**2
    cut = jax.tree.map(lambda x: _cut(x, count), (samples, packing, features))
    micro = (micro_batches(batch, merge, count), *cut[:2]), cut[2]

    def score(micro: tuple) -> jax.Array:
        rows, seen = micro
        return _score(params, *rows, banned, config, options, features=seen).logprobs

    logprobs = jax.lax.map(score, micro)
    return jnp.swapaxes(logprobs, 0, 1).reshape(samples.tokens.shape)


@partial(
    jax.jit,
    static_argnames=("config", "optimizer", "loss", "options", "count"),
    donate_argnames="state",
)
def update(
    state: TrainState,
    batch: Batch,
    samples: Samples,
    packing: Packing | None,
    advantages: jax.Array,
    ref_logprobs: jax.Array | None,
    banned: jax.Array,
    kl_coef: jax.Array | None = None,
    lora: Lora | None = None,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    loss: LossOptions,
    options: ScoreOptions,
    count: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on a batch of groups.

    Args:
      state: parameters and optimizer state, given up to the call.
      batch: the prompts.
      samples: their responses with the behaviour policy's log-probabilities.
      packing: how responses share rows, or None.
      advantages: float32[B, G].
      ref_logprobs: float32[B, G, T], or None for no KL term.
      banned: bool[V].
      kl_coef: float32[], weight of the KL term where it changes with the steps; None is the loss's.
      lora: the base of the adapters, where the state's parameters are these.
      config: of the policy.
      optimizer: optax transformation.
      loss: the loss.
      options: how to score.
      count: micro-batches, must divide B.

    Returns:
      The new state and metrics: those of `losses.policy_loss`, `moved` (how far the responses'
      log-probabilities are from those given, in the mean), `grad_norm`, `skipped`, and `entropy` if
      asked for. All but the loss are means over the tokens that count.
    """
    weights = loss.weights(samples)

    def value(
        score: Score,
        responses: Samples,
        weight: jax.Array,
        advantage: jax.Array,
        ref: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, metrics = losses.policy_loss(
            score.logprobs,
            responses.logprobs,
            advantage,
            weight,
            ref_logprobs=ref,
            ratio=loss.ratio,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            clip_dual=loss.clip_dual,
            kl=loss.kl,
            kl_coef=loss.kl_coef if kl_coef is None else kl_coef,
        )
        gap = jnp.abs(score.logprobs - responses.logprobs)
        metrics["moved"] = jnp.sum(weight * jnp.where(weight > 0, gap, 0.0))
        return value, metrics

    of_loss = weights, advantages, ref_logprobs
    return _learn(
        state,
        batch,
        samples,
        packing,
        of_loss,
        banned,
        lora,
        value,
        config,
        optimizer,
        loss,
        options,
        count,
    )


@partial(
    jax.jit,
    static_argnames=("config", "optimizer", "loss", "options", "count"),
    donate_argnames="state",
)
def imitate(
    state: TrainState,
    batch: Batch,
    samples: Samples,
    packing: Packing | None,
    banned: jax.Array,
    lora: Lora | None = None,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    loss: LossOptions,
    options: ScoreOptions,
    count: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step towards given responses: the mean of their -log-probabilities.

    Prompt tokens carry no loss. Arguments as of `update`; the loss chooses the mean, and responses
    of length 0 count for nothing.

    Returns:
      The new state and metrics: `loss`, `perplexity` of a token, `grad_norm`, `skipped`, and
      `entropy` if asked for.
    """
    weights = loss.weights(samples)

    def value(
        score: Score, _: Samples, weight: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = losses.imitation_loss(score.logprobs, weight)
        return value, {"loss": value}

    state, metrics = _learn(
        state,
        batch,
        samples,
        packing,
        (weights,),
        banned,
        lora,
        value,
        config,
        optimizer,
        loss,
        options,
        count,
    )
    mean = metrics["loss"] / jnp.maximum(weights.sum(), 1e-9)
    return state, metrics | {"perplexity": jnp.exp(mean)}


def _learn(
    state: TrainState,
    batch: Batch,
    samples: Samples,
    packing: Packing | None,
    of_loss: tuple,
    banned: jax.Array,
    lora: Lora | None,
    value: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    config: Config,
    optimizer: optax.GradientTransformation,
    loss: LossOptions,
    options: ScoreOptions,
    count: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on a loss of the responses' scores, summed over micro-batches.

    Args:
      of_loss: what the loss reads of each response, the weights of its tokens first.
      value: (score, responses, *of_loss) of a micro-batch → its part of the loss, and of metrics.
    """
    merge = config.vision.spatial_merge_size**2

    def loss_fn(params: dict, micro: tuple) -> tuple[jax.Array, dict[str, jax.Array]]:
        (rows, responses, rows_of_places), (weight, *rest) = micro
        params = params if lora is None else lora.overlay(params)
        score = _score(
            params, rows, responses, rows_of_places, banned, config, options, loss.entropy
        )
        part, metrics = value(score, responses, weight, *rest)
        if loss.entropy:
            metrics["entropy"] = jnp.sum(weight * jnp.where(weight > 0, score.entropy, 0.0))
        return part, metrics

    cut = jax.tree.map(lambda x: _cut(x, count), (samples, packing, of_loss))
    micro = (micro_batches(batch, merge, count), *cut[:2]), cut[2]
    grads, metrics = accumulate(loss_fn, state.params, micro)
    if loss.mean == "constant":
        # Its weights do not sum to 1, as those that a metric is a mean by should.
        total = jnp.maximum(of_loss[0].sum(), 1e-9)
        metrics = {k: x if k == "loss" else x / total for k, x in metrics.items()}
    state, applied = apply_gradients(state, grads, optimizer)
    return state, metrics | applied
