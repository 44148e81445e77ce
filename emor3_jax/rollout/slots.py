"""The prompts in flight as arrays, and the jitted programs that admit, decode and take them out.

The KV cache of the responses is a ring buffer: all of them write the keys of a token to the same
slot at the same time, and a mask tells which slots belong to which response. Attention ignores the
order of keys, since they carry their rope positions, so one update in place serves prompts that
began at different times.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.mesh import shard_rows
from emor3_jax.parallel.program import by_prompts, by_prompts_and_heads, whole
from emor3_jax.rollout.sampling import Sampling, noise, sample
from emor3_jax.types import Samples


class Admission(NamedTuple):
    """`refill` prompts that are admitted together.

    Attributes:
      row: int32[R], index in the batch of each prompt.
      token: int32[R], its last token, which is not among the keys.
      position: int32[R], its rope position.
      prefix: keys and values of the rest.
    """

    row: jax.Array
    token: jax.Array
    position: jax.Array
    prefix: KV


class Slots(NamedTuple):
    """State in flight: S prompts with L lanes each, a lane holding a response that goes on.

    Attributes:
      row: int32[S], which prompt of the batch.
      position: int32[S], rope position of its last token.
      age: int32[S], tokens generated so far, the same for all its lanes.
      token: int32[S, L], the newest token, whose keys are not in the cache.
      lane: int32[S, L], which response.
      ended: bool[S, L], whether it has ended or reached T; an empty slot has only such lanes.
      samples: all G responses, [S, G, T].
      prefix: keys and values of the prompts.
      cache: of the lanes; a ring of C places.
      cursor: int32[], the place of the ring that is written next.
    """

    row: jax.Array
    position: jax.Array
    age: jax.Array
    token: jax.Array
    lane: jax.Array
    ended: jax.Array
    samples: Samples
    prefix: KV
    cache: Cache
    cursor: jax.Array


_AXES = Slots(0, 0, 0, 0, 0, 0, Samples(0, 0, 0, 0), KV(1, 1, 0), Cache(-5, -5, 0), None)
"""Which axis of each field is the prompts'; the cache may have its layers apart."""


@partial(jax.jit, static_argnames=("responses", "length", "unroll"))
def begin(admission: Admission, *, responses: int, length: int, unroll: bool = False) -> Slots:
    """Returns the slots of prompts that begin; their cache has no places yet."""
    r, g = len(admission.row), responses
    k = admission.prefix.k
    layers, _, heads, head_dim, _ = k.shape
    shape = (r, g, length)
    zeros = partial(jnp.zeros, dtype=jnp.int32)

    def empty(*sizes: int) -> Any:
        one = jnp.zeros((r, g, heads, *sizes), k.dtype)
        return (one,) * layers if unroll else jnp.zeros((layers, *one.shape), k.dtype)

    return Slots(
        row=admission.row,
        position=admission.position,
        age=zeros(r),
        token=jnp.broadcast_to(admission.token[:, None], (r, g)),
        lane=jnp.broadcast_to(jnp.arange(g), (r, g)),
        ended=jnp.zeros((r, g), bool),
        samples=Samples(
            zeros(shape), jnp.zeros(shape, jnp.float32), zeros((r, g)), jnp.zeros((r, g), bool)
        ),
        prefix=admission.prefix,
        cache=Cache(empty(head_dim, 0), empty(0, head_dim), jnp.zeros((r, g, 0), bool)),
        cursor=zeros(()),
    )


@partial(jax.jit, static_argnames=("size", "places"))
def open_slots(first: Slots, size: int, places: int) -> Slots:
    """Returns the first prompts with as many empty slots as make `size`, and a cache."""
    more = size - len(first.row)

    def grow(axis: int, x: jax.Array) -> jax.Array:
        pad = [(0, more * (i == axis % x.ndim)) for i in range(x.ndim)]
        # The lanes of an empty slot have ended.
        wide = jnp.pad(x, pad, constant_values=x.dtype == bool) if more else x
        return shard_rows(axis, wide)

    slots = map_rows(grow, first)
    cache, cursor = resize_ring(slots.cache, slots.cursor, places=places)
    return slots._replace(
        cache=map_rows(shard_rows, slots._replace(cache=cache)).cache, cursor=cursor
    )


@partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, new: Slots, at: jax.Array) -> Slots:
    """Puts prompts that begin into the slots `at`, int32[R]."""

    def put(axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[(slice(None),) * axis + (at,)].set(y)

    # Keys of who was there before are masked; there is no need to overwrite them.
    cache = slots.cache._replace(mask=slots.cache.mask.at[at].set(False))
    new = new._replace(cache=cache)
    filled = map_rows(put, slots._replace(cache=None), new._replace(cache=None))
    return filled._replace(cache=cache)


@jax.jit
def take_out(slots: Slots, at: jax.Array) -> tuple[KV, Samples]:
    """Returns keys and responses of the prompts in the slots `at`, int32[R]."""
    wanted = slots._replace(cache=None)
    taken = map_rows(lambda axis, x: shard_rows(axis, jnp.take(x, at, axis)), wanted)
    return taken.prefix, taken.samples


@jax.jit
def shrink(slots: Slots, groups: jax.Array, lanes: jax.Array) -> Slots:
    """Returns some slots, and some lanes of each."""
    picked = map_rows(lambda axis, x: shard_rows(axis, jnp.take(x, groups, axis)), slots)

    def narrow(x: Any, inner: int = 0) -> Any:
        """Keeps the lanes, which `inner` axes follow, of each array."""

        def pick(y: jax.Array) -> jax.Array:
            axis = y.ndim - inner - 1
            index = jnp.expand_dims(lanes, (*range(axis - 1), *range(axis + 1, y.ndim)))
            return jnp.take_along_axis(y, index, axis)

        return jax.tree.map(pick, x)

    return picked._replace(
        token=narrow(picked.token),
        lane=narrow(picked.lane),
        ended=narrow(picked.ended),
        cache=Cache(
            narrow(picked.cache.k, 3), narrow(picked.cache.v, 3), narrow(picked.cache.mask, 1)
        ),
    )


@partial(jax.jit, static_argnames="places")
def resize_ring(cache: Cache, cursor: jax.Array, *, places: int) -> tuple[Cache, jax.Array]:
    """Returns a ring of `places` with the newest keys of another, the oldest of them first."""
    now = cache.mask.shape[-1]
    keep = min(now, places)
    place = jnp.arange(places)
    # Read in one pass: an order that is padded apart takes the memory of a second ring.
    order = jnp.where(place < keep, (cursor - keep + place) % max(now, 1), now)

    def move(axis: int, x: jax.Array) -> jax.Array:
        if not keep:
            axis %= x.ndim
            return jnp.zeros((*x.shape[:axis], places, *x.shape[axis + 1 :]), x.dtype)
        return jnp.take(x, order, axis, mode="fill", fill_value=0)

    return _map_arrays(move, Cache(-1, -2, -1), cache), jnp.int32(keep % places)


@partial(
    jax.jit,
    static_argnames=("policy", "sampling", "block"),
    donate_argnames="slots",
)
def decode_block(
    slots: Slots,
    key: jax.Array,
    leave: jax.Array,
    params: dict,
    suppressed: jax.Array,
    *,
    policy: Policy,
    sampling: Sampling,
    block: int,
) -> Slots:
    """Decodes up to `block` tokens of every lane, until no more than `leave` groups go on."""
    stop = jnp.asarray(sampling.stop, jnp.int32)
    shape = slots.token.shape
    places = slots.cache.mask.shape[-1]
    prefix = slots.prefix
    if isinstance(slots.cache.k, tuple):
        # Taken apart here, not once a token.
        prefix = prefix._replace(k=tuple(prefix.k), v=tuple(prefix.v))

    def going(carry: tuple) -> jax.Array:
        i, _, ended, *_ = carry
        groups = jnp.sum(~jnp.all(ended, axis=1))
        return (i < block) & (groups > 0) & (groups > leave)

    def step(carry: tuple) -> tuple:
        i, token, ended, stopped, lengths, tokens, logprobs, cache = carry
        age = slots.age + i
        hidden, cache = policy.decode(
            params,
            prefix,
            cache,
            token,
            jnp.broadcast_to((slots.position + age)[:, None], shape),
            (slots.cursor + i) % places,
            # Of what has ended nothing need be read.
            lengths=jnp.where(ended, 0, age[:, None]),
        )
        drawn, logprob = sample(
            policy.logits(params, hidden),
            noise(key, slots.row[:, None], slots.lane, age[:, None]),
            sampling,
            suppressed,
        )
        token = jnp.where(ended, 0, drawn)
        tokens = tokens.at[..., i].set(token)
        logprobs = logprobs.at[..., i].set(jnp.where(ended, 0.0, logprob))
        lengths += ~ended
        stopped |= ~ended & jnp.isin(token, stop)
        ended |= stopped | (age + 1 >= sampling.max_tokens)[:, None]
        return i + 1, token, ended, stopped, lengths, tokens, logprobs, cache

    old = slots.samples
    mine = jnp.arange(len(slots.row))[:, None], slots.lane
    carry = (
        jnp.int32(0),
        slots.token,
        slots.ended,
        old.ended[mine],
        old.lengths[mine],
        jnp.zeros((*shape, block), jnp.int32),
        jnp.zeros((*shape, block), jnp.float32),
        slots.cache,
    )
    count, token, ended, stopped, lengths, tokens, logprobs, cache = jax.lax.while_loop(
        going, step, carry
    )
    place = slots.age[:, None] + jnp.arange(block)
    # What was not reached is dropped, each at a place of its own.
    place = jnp.where(jnp.arange(block) < count, place, sampling.max_tokens + jnp.arange(block))

    @jax.vmap
    def write(x: jax.Array, lanes: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[lanes[:, None], at[None]].set(new, mode="drop", unique_indices=True)

    @jax.vmap
    def write_lanes(x: jax.Array, lanes: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[lanes].set(new, unique_indices=True)

    return slots._replace(
        age=slots.age + count,
        token=token,
        ended=ended,
        cache=cache,
        cursor=(slots.cursor + count) % places,
        samples=Samples(
            write(old.tokens, slots.lane, place, tokens),
            write(old.logprobs, slots.lane, place, logprobs),
            write_lanes(old.lengths, slots.lane, lengths),
            write_lanes(old.ended, slots.lane, stopped),
        ),
    )


def map_rows(function: Any, slots: Slots, *others: Slots) -> Slots:
    """Applies `function(axis of the prompts, array, …)` to every array of prompts, if there."""
    axes = _AXES if slots.cache is not None else _AXES._replace(cache=None)
    bare = [x._replace(cursor=None) for x in (slots, *others)]
    return _map_arrays(function, axes, *bare)._replace(cursor=slots.cursor)


def _map_arrays(function: Any, axes: Any, *trees: Any) -> Any:
    """Applies `function(axis, array, …)` to every array; an axis may be that of a tuple's."""
    return jax.tree.map(lambda axis, *x: jax.tree.map(partial(function, axis), *x), axes, *trees)


def slots_layout(mesh: Mesh, slots: Slots) -> Slots:
    """Returns abstract slots, sharded as `open_slots` does."""
    heads = slots.prefix.v.shape[2]
    laid = map_rows(lambda axis, x: by_prompts_and_heads(mesh, x, axis, heads), slots)
    return laid._replace(cursor=whole(mesh, slots.cursor))


def first_prompts(prefix: KV, count: int) -> KV:
    """Returns the shapes of the first prompts."""

    def first(x: Any, axis: int) -> jax.ShapeDtypeStruct:
        shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return KV(*(first(x, axis) for x, axis in zip(prefix, (1, 1, 0), strict=True)))


def taken_layout(mesh: Mesh, taken: tuple[KV, Samples]) -> tuple[KV, Samples]:
    """Returns abstract results of `take_out`."""
    return prefix_layout(mesh, taken[0]), by_prompts(mesh, taken[1])


def prefix_layout(mesh: Mesh, prefix: KV) -> KV:
    """Returns abstract keys and values of prompts."""
    heads = prefix.v.shape[2]
    axes = zip(prefix, (1, 1, 0), strict=True)
    return KV(*(by_prompts_and_heads(mesh, x, axis, heads) for x, axis in axes))
