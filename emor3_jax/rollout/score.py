"""Log-probabilities of given responses, grouped: the pass of the reference and of the update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import Images, Prompt
from emor3_jax.models.qwen2_5_vl.layers import Remat
from emor3_jax.rollout.packing import Packing, pack, unpack


class Score(NamedTuple):
    """What a policy thinks of given responses.

    Attributes:
      logprobs: float32[B, G, T]; meaningless where there is no token.
      entropy: float32[B, G, T] or None, of the distribution that each token was drawn from.
    """

    logprobs: jax.Array
    entropy: jax.Array | None


def score_responses(
    config: Config,
    params: dict,
    prompt: Prompt,
    images: Images,
    last_token: jax.Array,
    next_position: jax.Array,
    responses: jax.Array,
    lengths: jax.Array,
    *,
    banned: jax.Array,
    temperature: float,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    chunk: int = 1024,
    entropy: bool = False,
    packing: Packing | None = None,
    features: jax.Array | None = None,
) -> Score:
    """Scores `[prompt | r1 … rG]`: one vision pass and one prompt pass, shared by the G responses.

    Args:
      config, params: the policy.
      prompt: the prompts without their last token.
      images: their images, equally many for each, in the prompts' order.
      last_token: int32[B], the prompts' last token.
      next_position: int32[B], its rope position.
      responses: int32[B, G, T].
      lengths: int32[B, G].
      banned: bool[V], ids that the sampler could not draw.
      temperature: the sampler's; 0 reads as 1.
      dtype: compute type of the layers.
      remat: what the backward pass recomputes, see `layers.rematerialised`.
      chunk: tokens whose logits exist at once.
      entropy: also return the entropy.
      packing: how responses share rows; None gives each a row.
      features: float[B, S, D], what the tower made of the images; None asks it.
    """
    b, g, t = responses.shape
    if features is None:
        features = model.encode_images(config, params, images, dtype=dtype, remat=remat)
    opening = jnp.broadcast_to(last_token[:, None, None], (b, g, 1))
    tokens = jnp.concatenate([opening, responses[..., :-1]], axis=-1)
    place = jnp.broadcast_to(jnp.arange(t), (b, g, t))
    mask, targets, segments = place < lengths[..., None], responses, None
    if packing is not None:
        mask = jnp.asarray(packing.source) >= 0
        segments = jnp.where(mask, packing.source // t, -1)
        tokens, place, targets = (pack(packing, x) for x in (tokens, place, targets))
    hidden = model.forward_group(
        config,
        params,
        prompt,
        features,
        tokens,
        next_position[:, None, None] + place,
        mask,
        dtype=dtype,
        remat=remat,
        segments=segments,
    )
    logprobs, entropies = model.token_logprobs(
        config,
        params,
        hidden,
        targets,
        banned=banned,
        temperature=temperature or 1.0,
        chunk=chunk,
        entropy=entropy,
    )
    score = Score(logprobs, entropies)
    return score if packing is None else jax.tree.map(lambda x: unpack(packing, x, t), score)
