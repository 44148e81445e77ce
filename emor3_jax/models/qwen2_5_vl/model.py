"""The policy as pure functions of its parameters.

`params` is a plain nested dict of float32 arrays: `visual` (the tower), `model` (the decoder with
its embedding), and `lm_head` where the head is not tied to the embedding. Layers are stacked along
the first axis. `dtype` is the type of the layers' arithmetic; norms, softmax and rope are computed
in float32 always.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import KV, Cache, Images, Prompt
from emor3_jax.models.qwen2_5_vl.layers import Dtype, Remat, two_rows
from emor3_jax.models.qwen2_5_vl.text import Decoder, Group
from emor3_jax.models.qwen2_5_vl.vision import VisionTower
from emor3_jax.parallel.mesh import by_rows, gather, keep_layout, path_of

Params = dict[str, Any]

_BANNED = -1e30
"""Logit of an id that cannot be drawn: finite, so that 0 * log(0) in the entropy is 0."""


def init_params(config: Config, key: jax.Array) -> Params:
    """Returns fresh parameters: kernels of unit gain, embeddings of standard deviation 0.02.

    Args:
      config: the policy's shapes.
      key: PRNG key.
    """
    visual, decoder, head, embedding = jax.random.split(key, 4)
    v = config.vision
    shape = (1, 1, v.window_patches)
    images = Images(
        patches=jnp.zeros((*shape, v.patch_dim)),
        coords=jnp.zeros((*shape, 2), jnp.int32),
        mask=jnp.ones(shape, bool),
    )
    tokens = jnp.zeros((1, 1, 1), jnp.int32)
    params = {
        "visual": VisionTower(v).init(visual, images)["params"],
        "model": Decoder(config).init(
            decoder, tokens, jnp.zeros((1, 1, 1, 3), jnp.int32), jnp.ones((1, 1, 1), bool)
        )["params"],
    }
    normal = nn.initializers.normal(0.02)
    params["model"]["embed_tokens"]["embedding"] = normal(
        embedding, (config.vocab_size, config.hidden_size)
    )
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": normal(head, (config.hidden_size, config.vocab_size))}
    return params


def cast_for_decoding(params: Params, dtype: Dtype) -> Params:
    """Returns the parameters as decoding reads them, once a step so that no token pays for it.

    Matrices are in the type of the arithmetic, as `cast_matrices` says, and on every device whole,
    but for what is cut over `tensor` (`parallel.mesh.RULES`).

    Args:
      params: float32 master parameters.
      dtype: compute type; on a single device, the parameters' own gives them back as they are.
    """
    kinds = {leaf.dtype for leaf in jax.tree.leaves(params)}
    if kinds == {jnp.dtype(dtype)} and jax.sharding.get_abstract_mesh().size <= 1:
        return params
    return lay_out_for_decoding(params, jnp.dtype(dtype))


@partial(jax.jit, static_argnames="dtype")
def cast_matrices(params: Params, dtype: Dtype) -> Params:
    """Returns the parameters with their matrices in the type of the arithmetic, laid out as before.

    They would be rounded so at each use. Norms and biases, which are added in float32, stay as they
    are. Nothing shares memory with what was given.

    Args:
      params: float32 master parameters.
      dtype: compute type.
    """
    return jax.tree.map(jnp.copy, keep_layout(_cast(params, dtype)))


@partial(jax.jit, static_argnames="dtype")
def lay_out_for_decoding(params: Params, dtype: Dtype) -> Params:
    """`cast_for_decoding`, always."""
    before: jax.Array | None = None

    def lay_out(path: tuple, leaf: jax.Array) -> jax.Array:
        nonlocal before
        # One after the other: gathered all at once, they would take the memory of a second copy.
        if before is not None:
            leaf, _ = jax.lax.optimization_barrier((leaf, before))
        before = gather(leaf, path_of(path))
        return before

    return jax.tree_util.tree_map_with_path(lay_out, keep_layout(_cast(params, dtype)))


def _cast(params: Params, dtype: Dtype) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x, params
    )


def unroll(params: Params) -> Params:
    """Returns the parameters with the decoder's layers apart, for `decode_step`.

    Args:
      params: with the layers stacked, as everything else reads them.
    """
    decoder = dict(params["model"])
    layers = decoder.pop("layers")
    count = jax.tree.leaves(layers)[0].shape[0]
    apart = {f"layers_{i}": jax.tree.map(lambda x: x[i], layers) for i in range(count)}  # noqa: B023
    return params | {"model": decoder | apart}


unroll_jitted = jax.jit(unroll)


def encode_images(
    config: Config,
    params: Params,
    images: Images,
    *,
    dtype: Dtype = jnp.float32,
    remat: Remat = "none",
) -> jax.Array:
    """Runs the vision tower.

    Args:
      config, params: the policy.
      images: in window layout.
      dtype: compute type.
      remat: what the backward pass recomputes, see `layers.rematerialised`.

    Returns:
      float[I, W * L / m**2, D], the features of the merged slots; those of padding are meaningless.
    """
    tower = VisionTower(config.vision, dtype, remat, config.attention)
    return tower.apply({"params": params["visual"]}, images)


def forward_prompt(
    config: Config,
    params: Params,
    prompt: Prompt,
    image_features: jax.Array | None,
    *,
    dtype: Dtype = jnp.float32,
    images_by_prompt: bool = False,
) -> tuple[jax.Array, KV]:
    """Runs the decoder over prompts, each token attending to those before it.

    Args:
      config, params: the policy.
      prompt: right padded.
      image_features: from `encode_images`; None if no prompt has an image.
      dtype: compute type.
      images_by_prompt: whether prompts have equally many images each, in their order.

    Returns:
      float[B, P, D] after the final norm (meaningless at padding), and the keys and values, which
      gradients flow through.
    """
    hidden, (k, v) = Decoder(config, dtype, keep_keys=True).apply(
        {"params": params["model"]},
        prompt.tokens[:, None],
        prompt.positions[:, None],
        jnp.asarray(prompt.mask)[:, None],
        image_features=image_features,
        image_slots=prompt.image_slots[:, None],
        images_by_prompt=images_by_prompt,
    )
    return hidden[:, 0], KV(k[:, :, 0], v[:, :, 0], jnp.asarray(prompt.mask))


def forward_continuation(
    config: Config,
    params: Params,
    prefix: KV | None,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    *,
    dtype: Dtype = jnp.float32,
    cache_size: int | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Runs `G` continuations of each prompt; each sees its prompt and, causally, itself.

    Args:
      config, params: the policy.
      prefix: the prompts' keys and values; never copied for each continuation.
      tokens: int32[B, G, S], text only.
      positions: int32[B, G, S], rope positions.
      mask: bool[B, G, S], True for tokens that may be attended to.
      dtype: compute type.
      cache_size: `C`, at least S; also return a cache whose first S slots are filled.

    Returns:
      float[B, G, S, D] after the final norm, and the cache if asked for.

    Raises:
      ValueError: if the cache is too small.
    """
    s = tokens.shape[-1]
    if cache_size is not None and cache_size < s:
        raise ValueError(f"cache_size={cache_size} is smaller than the {s} tokens to keep")
    hidden, keys = Decoder(config, dtype, keep_keys=cache_size is not None).apply(
        {"params": params["model"]},
        tokens,
        jnp.broadcast_to(positions[..., None], (*positions.shape, 3)),
        jnp.asarray(mask),
        prefix=prefix,
    )
    if cache_size is None:
        return hidden, None

    def grow(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, (cache_size - s) * (i == axis)) for i in range(x.ndim)])

    return hidden, Cache(grow(keys[0], 5), grow(keys[1], 4), grow(jnp.asarray(mask), 2))


def forward_group(
    config: Config,
    params: Params,
    prompt: Prompt,
    image_features: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    *,
    dtype: Dtype = jnp.float32,
    remat: Remat = "none",
    segments: jax.Array | None = None,
) -> jax.Array:
    """Runs prompts together with their `G` continuations: `forward_prompt`, `forward_continuation`.

    Each layer works on both at once, so its weights are read, and over a mesh gathered, once, and
    their gradient is summed over devices once.

    Args:
      config, params: the policy.
      prompt: right padded.
      image_features: from `encode_images`; prompts have equally many images each, in their order.
      tokens, positions, mask: int32, int32 and bool[B, G, S], see `forward_continuation`.
      dtype: compute type.
      remat: what the backward pass recomputes, see `layers.rematerialised`.
      segments: int32[B, G, S], tokens of one see nothing of the others but the prompt; None for
        one segment.

    Returns:
      float[B, G, S, D] after the final norm, of the continuations.
    """
    group = Group(prompt.tokens.shape[1], tokens.shape[1])
    rope_positions = jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
    hidden, _ = Decoder(config, dtype, remat, group=group).apply(
        {"params": params["model"]},
        group.join(prompt.tokens[:, None], tokens),
        group.join(prompt.positions[:, None], rope_positions),
        group.join(jnp.asarray(prompt.mask)[:, None], jnp.asarray(mask)),
        image_features=image_features,
        image_slots=prompt.image_slots[:, None],
        images_by_prompt=True,
        segments=segments,
    )
    return hidden


def decode_step(
    config: Config,
    params: Params,
    prefix: KV | None,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    slot: jax.Array,
    *,
    dtype: Dtype = jnp.float32,
) -> tuple[jax.Array, Cache]:
    """Runs one token of each continuation and adds it to the cache.

    Args:
      config, params: the policy; its layers stacked, or apart (`unroll`) with a cache to match.
      prefix: the prompts' keys and values.
      cache: the continuations so far; `slot` must be masked.
      tokens: int32[B, G].
      positions: int32[B, G], rope positions.
      slot: int32[], where the keys and values of these tokens go.
      dtype: compute type.

    Returns:
      float[B, G, D] after the final norm, and the cache with `slot` filled.
    """
    b, g = tokens.shape
    unrolled = "layers" not in params["model"]
    hidden, keys = Decoder(config, dtype, keep_keys=True, unrolled=unrolled).apply(
        {"params": params["model"]},
        tokens[..., None],
        jnp.broadcast_to(positions[..., None, None], (b, g, 1, 3)),
        jnp.ones((b, g, 1), bool),
        prefix=prefix,
        cache=cache,
    )
    if unrolled:
        # Always 0, but known only when all layers have read the cache: XLA then writes in place.
        slot += jnp.minimum(jnp.abs(hidden[0, 0, 0, 0]).astype(jnp.int32), 0)

    def write(old: Any, new: Any, axis: int) -> Any:
        def update(x: jax.Array, y: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), slot, axis % x.ndim)

        return jax.tree.map(update, old, new)

    cache = Cache(
        write(cache.k, keys[0], -1),
        write(cache.v, keys[1], -2),
        write(cache.mask, jnp.ones((b, g, 1), bool), -1),
    )
    return hidden[:, :, 0], cache


def forward_candidates(
    config: Config,
    params: Params,
    prefix: KV | None,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    dtype: Dtype = jnp.float32,
) -> jax.Array:
    """Runs the same N short texts behind every continuation; each sees that and itself.

    Args:
      config, params: the policy.
      prefix: the prompts' keys and values.
      cache: the continuations.
      tokens: int32[N, L].
      positions: int32[B, G], rope position of the first of them.
      dtype: compute type.

    Returns:
      float[B, G, N, L, D] after the final norm.
    """
    n, size = tokens.shape
    b, g = positions.shape
    place = jnp.tile(jnp.arange(size), n)
    where = positions[..., None, None] + jnp.broadcast_to(place[:, None], (n * size, 3))
    hidden, _ = Decoder(config, dtype).apply(
        {"params": params["model"]},
        jnp.broadcast_to(tokens.reshape(-1), (b, g, n * size)),
        where,
        jnp.ones((b, g, n * size), bool),
        prefix=prefix,
        cache=cache,
        segments=jnp.broadcast_to(jnp.repeat(jnp.arange(n), size), (b, g, n * size)),
    )
    return hidden.reshape(b, g, n, size, -1)


def logits(config: Config, params: Params, hidden: jax.Array) -> jax.Array:
    """Returns float32[..., V] of final hidden states float[..., D]."""
    return _logits(config, _head(config, params)[0], hidden)


def _head(config: Config, params: Params) -> tuple[jax.Array, str]:
    """Returns the matrix that logits are computed with, and its path."""
    if config.tie_word_embeddings:
        return params["model"]["embed_tokens"]["embedding"], "model/embed_tokens/embedding"
    return params["lm_head"]["kernel"], "lm_head/kernel"


def _logits(config: Config, head: jax.Array, hidden: jax.Array) -> jax.Array:
    rows = hidden.reshape(-1, hidden.shape[-1])
    equation = "nd,vd->nv" if config.tie_word_embeddings else "nd,dv->nv"
    head = head.astype(hidden.dtype)
    scores = jnp.einsum(equation, two_rows(rows), head, preferred_element_type=jnp.float32)
    return scores[: len(rows)].reshape(*hidden.shape[:-1], -1)


def token_logprobs(
    config: Config,
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    banned: jax.Array | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the log-probability of each target without ever holding the logits of all tokens.

    The last axis is cut, so that the batch may stay cut over devices: about `chunk` tokens (at
    least one column of all rows) have logits at once, recomputed in the backward pass.

    Args:
      config, params: the policy.
      hidden: float[..., S, D] final hidden states.
      targets: int32[..., S].
      banned: bool[V], ids of probability zero; the log-probability of one is about -1e30.
      temperature: divides the logits.
      chunk: tokens whose logits exist at once.
      entropy: also return the entropy of each distribution.

    Returns:
      float32[..., S], and the entropy in the same shape, or None.
    """
    size = max(1, chunk // math.prod(hidden.shape[:-2]))

    def own(head: jax.Array, hidden: jax.Array, targets: jax.Array, axis: str | None) -> Any:
        return _chunked_logprobs(
            config, head, hidden, targets, banned, temperature, size, entropy, axis
        )

    return by_rows(own, *_head(config, params), hidden, targets)


def _chunked_logprobs(
    config: Config,
    head: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    banned: jax.Array | None,
    temperature: float,
    size: int,
    entropy: bool,
    axis: str | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`token_logprobs` of some rows, `size` columns at a time; `axis` cuts the vocabulary."""
    *lead, s, _ = hidden.shape
    rows = math.prod(lead)
    size = min(s, size)
    chunks = -(-s // size)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(rows, s, *x.shape[len(lead) + 1 :])
        x = jnp.pad(x, ((0, 0), (0, chunks * size - s), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    def over_vocabulary(x: jax.Array) -> jax.Array:
        return x.sum(axis=-1) if axis is None else jax.lax.psum(x.sum(axis=-1), axis)

    def score(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        states, wanted = piece
        scores = _logits(config, head, states) / temperature
        count = scores.shape[-1]
        first = 0 if axis is None else count * jax.lax.axis_index(axis)
        if banned is not None:
            own = jax.lax.dynamic_slice(banned, (first,), (count,))
            scores = jnp.where(own, _BANNED, scores)
        most = jax.lax.stop_gradient(scores.max(axis=-1))
        most = most if axis is None else jax.lax.pmax(most, axis)
        total = most + jnp.log(over_vocabulary(jnp.exp(scores - most[..., None])))
        # A comparison instead of a gather: fuses.
        chosen = first + jnp.arange(count) == wanted[..., None]
        logprob = over_vocabulary(jnp.where(chosen, scores, 0.0)) - total
        if not entropy:
            return logprob, None
        scores = scores - total[..., None]
        return logprob, -over_vocabulary(jnp.exp(scores) * scores)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size)[:, :s].reshape(*lead, s)

    pieces = (cut(hidden), cut(targets))
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(score), pieces))
