"""Grouped-query attention over several sources of keys, without copying any of them.

A continuation attends to the keys of its prompt (one copy for all responses of the group), to its
own cached keys, and to the keys just computed. One function, `attend`, serves the vision tower, the
prompt, the continuations and the decoded token; which back end computes it is one word.

Deviations, numbered:
 1. Whatever the back end, a few queries (windows of the vision tower, decoded tokens) and cached
    keys are computed by XLA: such scores are small, and there a kernel has nothing to save. Only
    of a ring of which little is in use, a TPU's kernel reads less (`InRing`).
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.models.cache import Routing

if TYPE_CHECKING:
    from emor3_jax.models.decode_attention import Ring

BACKENDS = ("xla", "splash", "cudnn")
"""Everywhere; TPU; NVIDIA GPU. `splash_interpret` runs the TPU's kernel on any platform, slowly."""

DECODE_BACKENDS = ("xla", "ragged")
"""Of decoded tokens: everywhere; TPU. `ragged_interpret` runs the TPU's kernel on any platform."""

_MASKED = -1e30
"""Score of a key that may not be attended to: finite, so that a row without any key has no NaN."""

_QUERIES = 1024
"""XLA: the scores of so many queries exist at once."""

_FEW = 128
"""Fewer queries than this are left to XLA."""


class Shared(NamedTuple):
    """Keys of a prompt, seen by all its continuations.

    Attributes:
      k: float[B, kv_heads, head_dim, P].
      v: float[B, kv_heads, P, head_dim].
      mask: bool[B, P].
      prompts: of equal size side by side in P; a query sees the one of its `Own.owners`.
      routing: where the queries, [N, 1, …], meet the B prompts; None if these are theirs in order.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    prompts: int = 1
    routing: Routing | None = None


class Own(NamedTuple):
    """Keys of each continuation itself.

    Attributes:
      k: float[B, G, kv_heads, head_dim, C].
      v: float[B, G, kv_heads, C, head_dim].
      mask: bool[B, G, C], which keys may be seen at all.
      causal: whether query i sees only the keys up to i; then C = S.
      segments: int32[B, G, S], if given: a query sees only the keys of its own segment; C = S.
        Tokens of a segment lie side by side.
      owners: int32[B, G, S], index of the prompt that each query sees; None if there is one.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    causal: bool = False
    segments: jax.Array | None = None
    owners: jax.Array | None = None


class InRing(NamedTuple):
    """Prompt and cache of a decoded token, those of all layers, of which a kernel reads one's.

    Attributes:
      ring: the keys of all layers, and which of them are read.
      layer: int32[].
      interpret: emulate the kernel, on any platform.
    """

    ring: "Ring"
    layer: jax.Array
    interpret: bool = False


Source = Shared | Own | InRing
"""Where keys come from."""


def slots_last(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, both float[..., C, kv_heads, head_dim], as the sources hold them."""
    return jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -3, -2)


def attend(q: jax.Array, sources: list[Source], backend: str = "xla") -> jax.Array:
    """Returns the values that the queries select from all sources together.

    Args:
      q: float[B, G, S, heads, head_dim], scaled already: in float32, before they were rounded.
      sources: at least one; kernels take a `Shared` (or none) and one `Own` with C = S; after an
        `InRing` comes the `Own` of the token itself alone, S = C = 1.
      backend: one of `BACKENDS`, or "splash_interpret".

    Returns:
      float[B, G, S, heads, head_dim].
    """
    *earlier, own = sources
    if earlier and isinstance(earlier[0], InRing):
        from emor3_jax.models.decode_attention import attend_ring

        ring, layer, interpret = earlier[0]
        k, v = own.k[..., 0], own.v[..., 0, :]
        return attend_ring(q[:, :, 0], k, v, ring, layer, interpret=interpret)[:, :, None]
    cached = any(isinstance(source, Own) for source in earlier)
    if backend == "xla" or q.shape[2] < _FEW or cached:
        return _attend_xla(q, sources)
    from emor3_jax.models import attention_kernels as kernels

    prefix = earlier[0] if earlier else None
    if backend == "cudnn":
        return kernels.cudnn(q, prefix, own)
    return kernels.splash(q, prefix, own, interpret=backend == "splash_interpret")


def _attend_xla(q: jax.Array, sources: list[Shared | Own]) -> jax.Array:
    """`attend`, a part of the queries at a time where they are many."""
    b, g, s, heads, head_dim = q.shape
    if s <= _QUERIES:
        return _attend_block(q, sources, jnp.int32(0))
    # Parts as equal as can be, so that little is padded.
    parts = -(-s // _QUERIES)
    size = -(-s // parts)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, parts * size - s), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(b, g, parts, size, heads, head_dim), 2, 0)

    # Recomputed in the backward pass: kept, the scores of all parts would exist at once after all.
    @jax.checkpoint
    def part(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend_block(piece[0], sources, piece[1])

    out = jax.lax.map(part, (q, jnp.arange(parts, dtype=jnp.int32) * size))
    return jnp.moveaxis(out, 0, 2).reshape(b, g, parts * size, heads, head_dim)[:, :, :s]


def _attend_block(q: jax.Array, sources: list[Shared | Own], start: jax.Array) -> jax.Array:
    """`attend` for queries from `start` on.

    The scores of each source are computed apart and joined for one softmax; products are plain
    batched matrix products, which every platform has fast kernels for.
    """
    b, g, s, heads, head_dim = q.shape
    kv_heads = sources[0].v.shape[-3]
    q = q.reshape(b, g, s, kv_heads, heads // kv_heads, head_dim)
    q = jnp.swapaxes(q, 2, 3)  # [B, G, kv_heads, S, heads of the group, head_dim]

    def align(x: jax.Array, source: Shared | Own) -> jax.Array:
        """Brings B, G, kv_heads to B, kv_heads, G: a prompt's keys meet all its continuations."""
        if isinstance(source, Own):
            return x
        routed = x if source.routing is None else source.routing.to_prompts(x, len(source.v))
        return jnp.swapaxes(routed, 1, 2)

    def align_back(x: jax.Array, source: Shared | Own) -> jax.Array:
        if isinstance(source, Own):
            return x
        x = jnp.swapaxes(x, 1, 2)
        return x if source.routing is None else source.routing.to_rows(x)

    def matmul(x: jax.Array, source: Shared | Own, y: jax.Array) -> jax.Array:
        """Multiplies [..., rows, i] by a source's [..., i, j]; the rows of y's batch joined."""
        rows = x.reshape(*y.shape[:-2], -1, x.shape[-1])
        out = jnp.matmul(rows, y, preferred_element_type=jnp.float32)
        return out.reshape(*x.shape[:-1], y.shape[-1])

    def visible(source: Shared | Own) -> jax.Array:
        """Mask of the keys that each query sees, to broadcast over the scores of the source."""
        if isinstance(source, Shared):
            mask = source.mask[:, None, None, None, None]
            if source.prompts == 1:
                return mask
            p = source.mask.shape[-1]
            prompt = jnp.arange(p) // (p // source.prompts)
            seen = jnp.take(sources[-1].owners, start + jnp.arange(s), axis=-1, mode="clip")
            return mask & (seen[..., None] == prompt)[:, None, :, :, None]
        mask = source.mask[:, :, None, None, None]
        if not source.causal:
            return mask
        row = start + jnp.arange(s)
        seen = jnp.arange(source.mask.shape[-1]) <= row[:, None]
        if source.segments is not None:
            mine = jnp.take(source.segments, row, axis=-1, mode="clip")
            same = source.segments[..., None, :] == mine[..., None]
            return mask & (seen & same)[:, :, None, :, None]
        return mask & seen[:, None]

    scores = [
        jnp.where(visible(source), matmul(align(q, source), source, source.k), _MASKED)
        for source in sources
    ]
    # One softmax over all sources, of which only the maxima and the sums are brought together.
    top = jnp.stack(
        [align_back(jnp.max(x, axis=-1), source) for x, source in zip(scores, sources, strict=True)]
    )
    top = jax.lax.stop_gradient(jnp.max(top, axis=0))
    total, out = 0.0, 0.0
    for score, source in zip(scores, sources, strict=True):
        weights = jnp.exp(score - align(top, source)[..., None])
        total += align_back(jnp.sum(weights, axis=-1), source)
        out += align_back(matmul(weights.astype(q.dtype), source, source.v), source)
    out = (out / total[..., None]).astype(q.dtype)
    return jnp.swapaxes(out, 2, 3).reshape(b, g, s, heads, head_dim)
