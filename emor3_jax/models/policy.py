"""The policy as pure functions of its parameters.

`params` is a plain nested dict of float32 arrays: `visual` (the tower), `model` (the decoder with
its embedding), and `lm_head` where the head is not tied to the embedding. Norms, softmax and rope
are computed in float32, whatever the compute type.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from emor3_jax.models import decode_attention
from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.family import Family, Shapes
from emor3_jax.models.layers import DEFAULT, Compute, Dtype, GroupRow, matmul, matmul_transposed
from emor3_jax.models.layout import ImageLayout
from emor3_jax.models.params import Params
from emor3_jax.parallel.mesh import by_rows
from emor3_jax.types import Images, Prompt

_SUPPRESSED = -1e30
"""Logit of a suppressed token: finite, so that 0 * log(0) in the entropy is 0."""


HEAD_COPIES = "head_copies"
"""Key among parameters of `mesh.data_copies` of the output matrix, by which to differentiate."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy of one family and size, without its parameters; hashable, a static argument.

    Attributes:
      family: architecture.
      shapes: sizes and special ids.
      compute: settings of the arithmetic.
    """

    family: Family
    shapes: Shapes
    compute: Compute = DEFAULT

    @property
    def dtype(self) -> Dtype:
        """Compute type."""
        return self.compute.dtype

    @property
    def layout(self) -> ImageLayout:
        """Layout of images and positions."""
        return self.family.layout(self.shapes)

    def with_compute(self, **changes: Any) -> "Policy":
        """Returns the policy with other settings of the arithmetic, see `layers.Compute`."""
        return dataclasses.replace(self, compute=self.compute._replace(**changes))

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters: kernels of unit gain, embeddings of standard deviation 0.02.

        Args:
          key: PRNG key.
        """
        return _init(key, family=self.family, shapes=self.shapes)

    def param_shapes(self) -> Params:
        """Returns the tree of parameters as `jax.ShapeDtypeStruct`s, without computing anything."""
        # A tree of the caller's own: it is kept for the next one.
        return jax.tree.map(lambda leaf: leaf, _param_shapes(self.family, self.shapes))

    def encode_images(self, params: Params, images: Images) -> jax.Array:
        """Runs the vision tower.

        Args:
          params: of the policy.
          images: in window layout.

        Returns:
          float[B, N, F], features of the merged slots of each prompt's images, as the decoder of
          the family reads them; those of padding are undefined.
        """
        return self.family.encode_images(self.shapes, self.compute, params, images)

    def prefill(self, params: Params, prompt: Prompt, images: Images | None) -> KV:
        """Returns keys and values of prompts with their images."""
        features = None if images is None else self.encode_images(params, images)
        return self.read_prompt(params, prompt, features)[1]

    def read_prompt(
        self,
        params: Params,
        prompt: Prompt,
        image_features: jax.Array | None,
    ) -> tuple[jax.Array, KV]:
        """Runs the decoder over prompts, each token attending to those before it.

        Args:
          params: of the policy.
          prompt: right padded.
          image_features: from `encode_images`; None if no prompt has an image.

        Returns:
          float[B, P, D] after the final norm (undefined at padding), and the keys and values,
          through which gradients flow.
        """
        hidden, (k, v) = self._decoder(keep_keys=True).apply(
            {"params": params["model"]},
            prompt.tokens[:, None],
            prompt.positions[:, None],
            jnp.asarray(prompt.mask)[:, None],
            image_features=image_features,
            image_slots=prompt.image_slots[:, None],
        )
        return hidden[:, 0], KV(k[:, :, 0], v[:, :, 0], jnp.asarray(prompt.mask))

    def extend(
        self,
        params: Params,
        prefix: KV | None,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        *,
        cache_size: int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs `G` continuations of each prompt; each sees its prompt and, causally, itself.

        Args:
          params: of the policy.
          prefix: the prompts' keys and values; never copied for each continuation.
          tokens: int32[B, G, S], text only.
          positions: int32[B, G, S], rope positions.
          mask: bool[B, G, S], True for tokens that may be attended to.
          cache_size: `C`, at least S; also return a cache whose first S slots are filled.

        Returns:
          float[B, G, S, D] after the final norm, and the cache if asked for.

        Raises:
          ValueError: if the cache is too small.
        """
        s = tokens.shape[-1]
        if cache_size is not None and cache_size < s:
            raise ValueError(f"cache_size={cache_size} is smaller than the {s} tokens to keep")
        hidden, keys = self._decoder(keep_keys=cache_size is not None).apply(
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

    def extend_group(
        self,
        params: Params,
        prompt: Prompt,
        image_features: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        *,
        segments: jax.Array | None = None,
        responses: int = 0,
    ) -> jax.Array:
        """Runs prompts together with their `G` continuations: `read_prompt` and `extend` in one.

        Each layer works on both at once, so its weights are read, and over a mesh gathered, once,
        and their gradient is summed over devices once.

        Args:
          params: of the policy.
          prompt: right padded.
          image_features: from `encode_images`.
          tokens, positions, mask: int32, int32 and bool[B, G, S], see `extend`.
          segments: int32[B, G, S], tokens of one see nothing of the others but the prompt; None for
            one segment. Those of a segment lie side by side; negative ones are padding.
          responses: with it, tokens of several prompts share a row: the continuations have fewer
            rows than there are prompts, as many prompts to each, and segment i belongs to prompt
            i // responses among those of its row.

        Returns:
          float[B, G, S, D] after the final norm, of the continuations.
        """
        joined = len(prompt.tokens) // len(tokens)
        prompt, image_features = _side_by_side(prompt, image_features, joined)
        group = GroupRow(prompt.tokens.shape[1], tokens.shape[1], joined, responses)
        rope_positions = jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
        hidden, _ = self._decoder(group=group).apply(
            {"params": params["model"]},
            group.join(prompt.tokens[:, None], tokens),
            group.join(prompt.positions[:, None], rope_positions),
            group.join(jnp.asarray(prompt.mask)[:, None], jnp.asarray(mask)),
            image_features=image_features,
            image_slots=prompt.image_slots[:, None],
            segments=segments,
        )
        return hidden

    def decode(
        self,
        params: Params,
        prefix: KV | None,
        cache: Cache,
        tokens: jax.Array,
        positions: jax.Array,
        slot: jax.Array,
        *,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs one token of each continuation and adds it to the cache.

        Args:
          params: of the policy; layers stacked, or apart (`params.unroll`) with a cache to match.
          prefix: the prompts' keys and values.
          cache: the continuations so far; `slot` must be masked.
          tokens: int32[B, G].
          positions: int32[B, G], rope positions.
          slot: int32[], where the keys and values of these tokens go.
          lengths: int32[B, G], if the cache is a ring: the mask of a continuation is True in the
            last `lengths` places before `slot` (from the beginning on at the end), and nowhere
            else. Then a kernel may read those alone (`compute.decode_attention`). 0 where the
            result does not matter, whatever the mask.

        Returns:
          float[B, G, D] after the final norm, and the cache with `slot` filled.
        """
        b, g = tokens.shape
        unrolled = "layers" not in params["model"]
        kind = self.compute.decode_attention
        sources: dict[str, Any] = {"prefix": prefix, "cache": cache}
        fits = functools.partial(decode_attention.fits, interpret=kind.endswith("interpret"))
        if lengths is not None and kind != "xla" and fits(prefix, cache):
            sources = {"ring": decode_attention.make_ring(prefix, cache, lengths, slot)}
        hidden, keys = self._decoder(keep_keys=True, unrolled=unrolled).apply(
            {"params": params["model"]},
            tokens[..., None],
            jnp.broadcast_to(positions[..., None, None], (b, g, 1, 3)),
            jnp.ones((b, g, 1), bool),
            **sources,
        )
        if unrolled:
            # Always 0, but known only once all layers have read the cache: XLA writes in place.
            slot += jnp.minimum(jnp.abs(hidden[0, 0, 0, 0]).astype(jnp.int32), 0)

        def write(old: Any, new: Any, axis: int) -> Any:
            def update(x: jax.Array, y: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(
                    x, y.astype(x.dtype), slot, axis % x.ndim
                )

            return jax.tree.map(update, old, new)

        cache = Cache(
            write(cache.k, keys[0], -1),
            write(cache.v, keys[1], -2),
            write(cache.mask, jnp.ones((b, g, 1), bool), -1),
            cache.routing,
        )
        return hidden[:, :, 0], cache

    def extend_each(
        self,
        params: Params,
        prefix: KV | None,
        cache: Cache,
        tokens: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        """Runs the same N short texts behind every continuation; each sees that and itself.

        Args:
          params: of the policy.
          prefix: the prompts' keys and values.
          cache: the continuations.
          tokens: int32[N, L].
          positions: int32[B, G], rope position of the first of them.

        Returns:
          float[B, G, N, L, D] after the final norm.
        """
        n, size = tokens.shape
        b, g = positions.shape
        offset = jnp.tile(jnp.arange(size), n)
        where = positions[..., None, None] + jnp.broadcast_to(offset[:, None], (n * size, 3))
        hidden, _ = self._decoder().apply(
            {"params": params["model"]},
            jnp.broadcast_to(tokens.reshape(-1), (b, g, n * size)),
            where,
            jnp.ones((b, g, n * size), bool),
            prefix=prefix,
            cache=cache,
            segments=jnp.broadcast_to(jnp.repeat(jnp.arange(n), size), (b, g, n * size)),
        )
        return hidden.reshape(b, g, n, size, -1)

    def _decoder(self, **options: Any) -> nn.Module:
        return self.family.decoder(self.shapes, self.compute, **options)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns float32[..., V] of final hidden states float[..., D]."""
        return _logits(self.shapes.tie_word_embeddings, self.head(params)[0], hidden)

    def head(self, params: Params) -> tuple[jax.Array, str]:
        """Returns the output matrix, and its path."""
        if self.shapes.tie_word_embeddings:
            return params["model"]["embed_tokens"]["embedding"], "model/embed_tokens/embedding"
        return params["lm_head"]["kernel"], "lm_head/kernel"

    def logprobs(
        self,
        params: Params,
        hidden: jax.Array,
        targets: jax.Array,
        *,
        suppressed: jax.Array | None = None,
        temperature: float = 1.0,
        chunk: int = 1024,
        entropy: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the log-probability of each target without ever holding the logits of all tokens.

        Each device cuts its own tokens: `chunk` of them have logits at once, recomputed in the
        backward pass, however many devices there are.

        Args:
          params: of the policy; with `HEAD_COPIES`, these are the output matrix.
          hidden: float[..., S, D] final hidden states.
          targets: int32[..., S].
          suppressed: bool[V], ids of probability zero; the log-probability of one is about -1e30.
          temperature: divides the logits.
          chunk: tokens of a device whose logits exist at once.
          entropy: also return the entropy of each distribution.

        Returns:
          float32[..., S], and the entropy in the same shape, or None.
        """
        tied = self.shapes.tie_word_embeddings

        def own(head: jax.Array, hidden: jax.Array, targets: jax.Array, axis: str | None) -> Any:
            return _chunked_logprobs(
                tied, head, hidden, targets, suppressed, temperature, chunk, entropy, axis
            )

        head, path = self.head(params)
        copies = params.get(HEAD_COPIES)
        if copies is not None:
            return by_rows(own, copies, path, hidden, targets, copies=True)
        return by_rows(own, head, path, hidden, targets)


@functools.lru_cache(maxsize=16)
def _param_shapes(family: Family, shapes: Shapes) -> Params:
    return jax.eval_shape(lambda: Policy(family, shapes).init(jax.random.key(0)))


# One program: operation by operation it would take seconds, of a tiny policy too.
@functools.partial(jax.jit, static_argnames=("family", "shapes"))
def _init(key: jax.Array, *, family: Family, shapes: Shapes) -> Params:
    visual, decoder, head, embedding = jax.random.split(key, 4)
    tokens = jnp.zeros((1, 1, 1), jnp.int32)
    params = {
        "visual": family.init_tower(shapes, visual),
        "model": family.decoder(shapes, Compute()).init(
            decoder, tokens, jnp.zeros((1, 1, 1, 3), jnp.int32), jnp.ones((1, 1, 1), bool)
        )["params"],
    }
    normal = nn.initializers.normal(0.02)
    size = shapes.vocab_size, shapes.hidden_size
    params["model"]["embed_tokens"]["embedding"] = normal(embedding, size)
    if not shapes.tie_word_embeddings:
        params["lm_head"] = {"kernel": normal(head, size[::-1])}
    return params


def _side_by_side(prompt: Prompt, features: jax.Array, count: int) -> tuple[Prompt, jax.Array]:
    """Joins `count` prompts to a row, and their images' features."""
    if count == 1:
        return prompt, features

    def join(x: jax.Array) -> jax.Array:
        return jnp.asarray(x).reshape(len(x) // count, -1, *x.shape[2:])

    first = features.shape[1] * (jnp.arange(len(prompt.tokens)) % count)
    slots = jnp.asarray(prompt.image_slots)
    slots = jnp.where(slots >= 0, slots + first[:, None], -1)
    return jax.tree.map(join, prompt._replace(image_slots=slots)), join(features)


def _logits(tied: bool, head: jax.Array, hidden: jax.Array) -> jax.Array:
    rows = hidden.reshape(-1, hidden.shape[-1])
    # Gradients by the head are float32, so that those of many chunks are added up unrounded.
    scores = matmul_transposed(rows, head) if tied else matmul(rows, head)
    return scores.reshape(*hidden.shape[:-1], -1)


def _chunked_logprobs(
    tied: bool,
    head: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    suppressed: jax.Array | None,
    temperature: float,
    size: int,
    entropy: bool,
    axis: str | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`Policy.logprobs` of some tokens, `size` at a time; `axis` cuts the vocabulary."""
    lead = targets.shape
    count = math.prod(lead)
    chunks = max(1, -(-count // size))
    # As equal as can be, so that little is padded.
    size = -(-count // chunks)

    if axis is not None:
        # Each part of the vocabulary gives a part of its gradient: added up once, behind the loop.
        hidden = jax.lax.pcast(hidden, axis, to="varying")

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[len(lead) :])
        x = jnp.pad(x, ((0, chunks * size - count), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(chunks, size, *x.shape[1:])

    def over_vocabulary(x: jax.Array) -> jax.Array:
        return x.sum(axis=-1) if axis is None else jax.lax.psum(x.sum(axis=-1), axis)

    def score(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        states, wanted = piece
        scores = _logits(tied, head, states) / temperature
        columns = scores.shape[-1]
        first = 0 if axis is None else columns * jax.lax.axis_index(axis)
        if suppressed is not None:
            own = jax.lax.dynamic_slice(suppressed, (first,), (columns,))
            scores = jnp.where(own, _SUPPRESSED, scores)
        most = jax.lax.stop_gradient(scores.max(axis=-1))
        most = most if axis is None else jax.lax.pmax(most, axis)
        total = most + jnp.log(over_vocabulary(jnp.exp(scores - most[..., None])))
        # A comparison instead of a gather: fuses.
        chosen = first + jnp.arange(columns) == wanted[..., None]
        logprob = over_vocabulary(jnp.where(chosen, scores, 0.0)) - total
        if not entropy:
            return logprob, None
        scores = scores - total[..., None]
        return logprob, -over_vocabulary(jnp.exp(scores) * scores)

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(chunks * size)[:count].reshape(lead)

    pieces = (cut(hidden), cut(targets))
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(score), pieces))
