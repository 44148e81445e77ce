"""Log-probabilities of given responses, grouped: the pass of the reference and of the update."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.learner.packing import pack, unpack
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.program import by_prompts, laid_out
from emor3_jax.types import Batch, Packing, Samples, stack_parts


class LogprobSpec(NamedTuple):
    """Settings of scoring; hashable, a static argument.

    Attributes:
      temperature: the sampler's; 0 reads as 1.
      chunk: tokens whose logits exist at once.
    """

    temperature: float
    chunk: int


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
    entropy: bool = False,
) -> TokenLogprobs:
    """Scores `[prompt | r1 … rG]`: one vision pass and one prompt pass, shared by the G responses.

    Args:
      policy, params: the policy.
      batch: the prompts with their images.
      samples: their responses.
      spec: settings.
      suppressed: bool[V], ids that the sampler could not draw.
      packing: positions of responses that share rows; None gives each a row.
      features: float[B, N, D], precomputed vision features; None computes them.
      entropy: also return the entropy.
    """
    b, g, t = samples.tokens.shape
    if features is None:
        features = policy.encode_images(params, batch.images)
    opening = jnp.broadcast_to(batch.last_token[:, None, None], (b, g, 1))
    tokens = jnp.concatenate([opening, samples.tokens[..., :-1]], axis=-1)
    position = jnp.broadcast_to(jnp.arange(t), (b, g, t))
    mask, targets, segments = position < samples.lengths[..., None], samples.tokens, None
    if packing is not None:
        mask = jnp.asarray(packing.source) >= 0
        segments = jnp.where(mask, packing.source // t, -1)
        tokens, position, targets = (pack(packing, x) for x in (tokens, position, targets))
    hidden = policy.extend_group(
        params,
        batch.prompt,
        features,
        tokens,
        batch.next_position[:, None, None] + position,
        mask,
        segments=segments,
    )
    logprobs, entropies = policy.logprobs(
        params,
        hidden,
        targets,
        suppressed=suppressed,
        temperature=spec.temperature or 1.0,
        chunk=spec.chunk,
        entropy=entropy,
    )
    score = TokenLogprobs(logprobs, entropies)
    return score if packing is None else jax.tree.map(lambda x: unpack(packing, x, t), score)


@partial(jax.jit, static_argnames=("policy", "spec", "count"))
@laid_out(by_prompts)
def response_logprobs(
    params: dict,
    batch: Batch,
    samples: Samples,
    packing: Packing | None,
    suppressed: jax.Array,
    features: jax.Array | None = None,
    *,
    policy: Policy,
    spec: LogprobSpec,
    count: int,
) -> jax.Array:
    """Returns the responses' log-probabilities under a policy, float32[B, G, T].

    Args:
      params: of the reference, or of the policy itself, to recompute what the sampler recorded.
      batch, samples: the prompts and their responses.
      packing: positions of responses that share rows, or None.
      suppressed: bool[V], ids that the sampler could not draw.
      features: float[B, N, D], precomputed vision features; None computes them.
      policy: the policy.
      spec: settings.
      count: micro-batches, must divide B.
    """

    def score(micro: tuple) -> jax.Array:
        batch, samples, packing, features = micro
        return score_responses(
            policy, params, batch, samples, spec, suppressed, packing, features
        ).logprobs

    logprobs = jax.lax.map(score, stack_parts((batch, samples, packing, features), count))
    return jnp.swapaxes(logprobs, 0, 1).reshape(samples.tokens.shape)
