"""Log-probabilities of given responses, grouped: the pass of the reference and of the update."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.learner.micro_batches import Shape, StepPlan
from emor3_jax.learner.packing import pack, unpack
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.mesh import put_own_rows, shard_rows, take_own_rows
from emor3_jax.parallel.program import by_prompts, laid_out
from emor3_jax.types import Batch, Packing, Samples


class LogprobSpec(NamedTuple):
    """Settings of scoring; hashable, a static argument.

    Attributes:
      temperature: the sampler's; 0 reads as 1.
      chunk: tokens of a device whose logits exist at once.
      entropy: also return the entropies.
    """

    temperature: float
    chunk: int
    entropy: bool = False


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the tokens of responses under a policy.

    Attributes:
      logprobs: float32[B, G, T]; undefined where there is no token.
      entropy: float32[B, G, T] or None, of the distribution that each token was drawn from.
    """

    logprobs: jax.Array
    entropy: jax.Array | None


def score_responses(
    policy: Policy,
    params: dict,
    batch: Batch,
    samples: Samples,
    spec: LogprobSpec,
    suppressed: jax.Array,
    packing: Packing | None = None,
    features: jax.Array | None = None,
) -> TokenLogprobs:
    """Scores `[prompt | r1 … rG]`: one vision pass and one prompt pass, shared by the G responses.

    Args:
      policy, params: the policy.
      batch: the prompts with their images.
      samples: their responses.
      spec: settings.
      suppressed: bool[V], ids that the sampler could not draw.
      packing: positions of responses that share rows, also those of several prompts; None gives
        each a row.
      features: float[B, N, F], precomputed vision features; None computes them.
    """
    b, g, t = samples.tokens.shape
    if features is None:
        features = policy.encode_images(params, batch.images)
    opening = jnp.broadcast_to(batch.last_token[:, None, None], (b, g, 1))
    tokens = jnp.concatenate([opening, samples.tokens[..., :-1]], axis=-1)
    position = jnp.broadcast_to(jnp.arange(t), (b, g, t))
    mask, targets, segments = position < samples.lengths[..., None], samples.tokens, None
    position = batch.next_position[:, None, None] + position
    if packing is not None:
        mask = jnp.asarray(packing.source) >= 0
        segments = jnp.where(mask, packing.source // t, -1)
        tokens, position, targets = (pack(packing, x) for x in (tokens, position, targets))
    hidden = policy.extend_group(
        params,
        batch.prompt,
        features,
        tokens,
        position,
        mask,
        segments=segments,
        responses=g,
    )
    logprobs, entropies = policy.logprobs(
        params,
        hidden,
        targets,
        suppressed=suppressed,
        temperature=spec.temperature or 1.0,
        chunk=spec.chunk,
        entropy=spec.entropy,
    )
    score = TokenLogprobs(logprobs, entropies)
    return score if packing is None else jax.tree.map(lambda x: unpack(packing, x, t), score)


class Scored(NamedTuple):
    """Some prompts of a step to score; leaves [B, …] are of the whole step.

    Attributes:
      batch, samples: the prompts and their responses.
      features: float[B, N, F], precomputed vision features; None computes them.
      rows: int32[b], the prompts, counted within each device's part, see `MicroBatch`.
      packing: positions of their responses that share rows, or None.
    """

    batch: Batch
    samples: Samples
    features: jax.Array | None
    rows: jax.Array | np.ndarray
    packing: Packing | None


def cut_batch(batch: Batch, shape: Shape) -> Batch:
    """Cuts padding off the end of prompts and images, inside a jitted program.

    Args:
      batch: of at least these sizes.
      shape: the sizes to cut to.
    """
    prompt, images = (
        jax.tree.map(lambda x: x[:, : shape.prompt], batch.prompt),
        jax.tree.map(lambda x: x[:, :, : shape.windows], batch.images),
    )
    return batch._replace(prompt=prompt, images=images)


def planned_logprobs(
    params: dict,
    batch: Batch,
    samples: Samples,
    plan: StepPlan,
    suppressed: jax.Array,
    features: jax.Array | None = None,
    *,
    policy: Policy,
    spec: LogprobSpec,
) -> TokenLogprobs:
    """Returns the responses' log-probabilities under a policy, and the entropies if asked for.

    Args:
      params: of the reference, or of the policy itself, to recompute what the sampler recorded.
      batch, samples: the prompts of a step and their responses.
      plan: their micro-batches.
      suppressed: bool[V], ids that the sampler could not draw.
      features: float[B, N, F], precomputed vision features; None computes them.
      policy: the policy.
      spec: settings.
    """
    found = no_logprobs(samples, entropy=spec.entropy)
    for micro in (each for update in plan.updates for each in update):
        scored = Scored(batch, samples, features, micro.rows, micro.packing)
        how = {"policy": policy, "spec": spec, "shape": micro.shape}
        found = response_logprobs(found, params, scored, suppressed, **how)
    return found


@partial(jax.jit, static_argnames=("policy", "spec", "shape"), donate_argnames="out")
@laid_out(by_prompts)
def response_logprobs(
    out: TokenLogprobs,
    params: dict,
    scored: Scored,
    suppressed: jax.Array,
    *,
    policy: Policy,
    spec: LogprobSpec,
    shape: Shape,
) -> TokenLogprobs:
    """Writes the log-probabilities of one micro-batch's responses under a policy.

    Args:
      out: [B, G, T], donated; returned with the rows of the micro-batch filled.
      params: of the reference, or of the policy itself, to recompute what the sampler recorded.
      scored: the micro-batch.
      suppressed: bool[V], ids that the sampler could not draw.
      policy: the policy.
      spec: settings.
      shape: padded sizes of the micro-batch.
    """
    batch, features = cut_batch(scored.batch, shape), scored.features
    if features is not None:
        # Of one image a prompt: what lies behind its windows is padding.
        size = features.shape[1] * shape.windows // scored.batch.images.mask.shape[2]
        features = features[:, :size]
    samples = scored.samples.cut(shape.length)
    batch, samples, features = take_own_rows((batch, samples, features), scored.rows)
    found = score_responses(
        policy, params, batch, samples, spec, suppressed, scored.packing, features
    )
    return jax.tree.map(lambda x, new: put_own_rows(x, scored.rows, new), out, found)


@partial(jax.jit, static_argnames="entropy")
@laid_out(by_prompts)
def no_logprobs(samples: Samples, *, entropy: bool = False) -> TokenLogprobs:
    """Returns zeros, [B, G, T], for `response_logprobs` to fill."""
    zeros = shard_rows(0, jnp.zeros(samples.tokens.shape, jnp.float32))
    return TokenLogprobs(zeros, zeros if entropy else None)
