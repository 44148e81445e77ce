"""The rollout at speed: prompts take slots, answer in their groups, and leave when all have ended.

    for finished in roll_out(...):      # a few prompts at a time, in the order in which they end
        ...                             # their keys are still there: ask the reflections now

`slots` prompts are in flight at once, each with its `G` responses and one copy of its keys. They
decode together, in blocks of tokens. Between blocks the host reads which responses have ended and

* takes out `refill` prompts whose groups are done, and lets as many waiting prompts in;
* gives the cache as many places as the oldest response needs, in doubling sizes;
* when nothing waits, drops ended responses from the batch: its prompts by halves, its responses by
  quarters and thirds in turn (8, 6, 4, 3, 2, 1 a prompt).

So a few long responses hold neither the batch nor its memory. Shapes come from short lists: at
most `halvings + 1` choices of prompts, `2 * halvings + 1` of responses, and log2(T / block) + 1 of
the cache.

The cache is a ring. All responses write their keys to the same place at the same time, and a mask
says which places belong to whom; what order the places are in is nothing to attention, since keys
carry their rope positions. So one update in place serves prompts that began at different times.

Deviations, numbered:
 1. The noise of a token comes from (key, prompt, response, place in the response), so that what is
    sampled does not depend on the slots: another `slots` or `refill` gives the same responses, as
    far as the arithmetic of another batch does.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.params import unroll
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_rows
from emor3_jax.parallel.program import (
    Program,
    Programs,
    by_prompts,
    by_prompts_and_heads,
    first_rows,
    mesh_of,
    whole,
)
from emor3_jax.rollout.sampling import Sampling, noise, sample
from emor3_jax.types import Samples


class Plan(NamedTuple):
    """Limits on what is in flight; hashable.

    Attributes:
      slots: prompts in flight, 0 for all of the batch.
      refill: prompts that leave and enter at once, 0 for all; must divide `slots` and the batch.
      block: tokens between two looks of the host, and the smallest cache.
      halvings: how often the batch may be halved when nothing waits, in prompts and in responses;
        of responses there is a step between two halves.
      unroll: decode with the layers apart, not in a loop over them; faster in bfloat16 on CPU, for
        a longer compile and a copy of the weights.
    """

    slots: int = 0
    refill: int = 0
    block: int = 64
    halvings: int = 2
    unroll: bool = False


ALL_AT_ONCE = Plan()
"""All prompts in flight together."""


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


class Finished(NamedTuple):
    """Prompts whose responses have all ended.

    Attributes:
      row: int[R] on the host, which prompts of the batch.
      prefix: keys and values of these prompts.
      samples: their responses, [R, G, T].
    """

    row: np.ndarray
    prefix: KV
    samples: Samples


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


@dataclasses.dataclass(frozen=True)
class Engine:
    """Continuous batching of one rollout.

    Attributes:
      policy: the policy.
      sampling: settings of the sampler.
      plan: number of prompts in flight, and how it changes.
      group_size: G, responses to each prompt.
      num_shards: number of equal parts that the devices cut the prompts into.
      suppressed: bool[V], ids never sampled.
    """

    policy: Policy
    sampling: Sampling
    plan: Plan
    group_size: int
    num_shards: int
    suppressed: jax.Array

    def sizes(self, prompts: int) -> tuple[int, int]:
        """Returns the number of slots, and of prompts that are admitted together.

        Raises:
          ValueError: if `plan.refill` does not divide the slots and the prompts.
        """
        size = min(self.plan.slots or prompts, prompts)
        refill = min(self.plan.refill or size, size)
        if size % refill or prompts % refill:
            raise ValueError(f"{self.plan}: refill must divide the slots and the {prompts} prompts")
        return size, refill

    def run(
        self, params: dict, admissions: Iterator[Admission], prompts: int, key: jax.Array
    ) -> Iterator[Finished]:
        """Samples `group_size` responses to each prompt; yields prompts as their groups end.

        Args:
          params: of the policy.
          admissions: yields the prompts, `plan.refill` at a time; asked for as slots get free.
          prompts: B, number of prompts.
          key: PRNG key.

        Yields:
          Every prompt once, `plan.refill` at a time.

        Raises:
          ValueError: if `plan.refill` does not divide the slots and the prompts.
        """
        plan, sampling = self.plan, self.sampling
        size, refill = self.sizes(prompts)
        block, waiting, slots = min(plan.block, sampling.max_tokens), prompts, None
        sizes = ring_sizes(block, sampling.max_tokens)
        least, widths = size >> plan.halvings, _widths(self.group_size, plan.halvings)
        params = unroll(params) if plan.unroll else params
        start = partial(
            begin, responses=self.group_size, length=sampling.max_tokens, unroll=plan.unroll
        )
        # Where there is a prompt that has not been taken out yet.
        taken = np.zeros(size, bool)
        while waiting or taken.any():
            for at in np.flatnonzero(~taken)[: waiting // refill * refill].reshape(-1, refill):
                new = start(next(admissions))
                fresh = slots is None or refill == size
                slots = open_slots(new, size, block) if fresh else admit(slots, new, at)
                taken[at], waiting = True, waiting - refill
            row, age, ended = hosts.fetch((slots.row, slots.age, slots.ended))
            going = taken & ~ended.all(axis=1)
            done = np.flatnonzero(taken & ~going)
            for at in done[: len(done) // refill * refill].reshape(-1, refill):
                yield Finished(row[at], *_take(slots, at, size == refill))
                taken[at] = False
            if not going.any() or (waiting and not taken.all()):
                continue
            oldest = int(age[going].max())
            picked = None
            if not waiting:
                picked = choose_shrink(taken, ended, least, widths, self.num_shards)
            if picked is not None:
                slots, taken, going = shrink(slots, *picked), taken[picked[0]], going[picked[0]]
            slots = _fit(slots, oldest + block, sizes)
            # With prompts waiting, no longer than until enough groups are done to let them in.
            leave = going.sum() - (refill - len(done) % refill) if waiting else 0
            slots = decode_block(
                slots,
                key,
                np.int32(leave),
                params,
                self.suppressed,
                policy=self.policy,
                sampling=sampling,
                block=block,
            )

    def programs(
        self, params: Any, admit_programs: Callable[[dict], Programs], shapes: Any, key: Any
    ) -> Programs:
        """Yields the programs of `run` at their largest shapes.

        Args:
          params: of the policy, abstract.
          admit_programs: from the arrays that are in memory to the programs that make an
            `Admission`.
          shapes: abstract `Admission` of all prompts together.
          key: abstract PRNG key.

        Returns:
          Keys and values, and responses, of the prompts that leave together.
        """
        prompts = len(shapes.row)
        (size, refill), length = self.sizes(prompts), self.sampling.max_tokens
        block, waves = min(self.plan.block, length), prompts // refill
        sizes = ring_sizes(block, length)
        if self.plan.unroll:
            params = yield Program("unroll", unroll, (params,))
        how = {"responses": self.group_size, "length": length, "unroll": self.plan.unroll}
        # In memory at its largest, beside the prompts that are admitted.
        slots = self.abstract_slots(shapes)
        in_flight = slots if refill < size else None
        admission = yield from admit_programs({"cache": in_flight})
        new = yield Program(
            "begin", begin, (admission,), how, {"cache": [in_flight, admission]}, _lay_out, waves
        )
        opened = (new, size, block)
        calls = 1 if refill < size else waves
        yield Program("open_slots", open_slots, opened, {}, {"cache": new}, _lay_out, calls)
        if len(sizes) > 1:
            small = self.abstract_slots(shapes, sizes[-2])
            yield Program(
                "resize_ring",
                resize_ring,
                (small.cache, small.cursor),
                {"places": sizes[-1]},
                {"cache": [small.cache, small.prefix]},
            )
        rows = np.zeros(refill, np.int32)
        if refill < size:
            args = slots, new, rows
            slots = yield Program(
                "admit", admit, args, {}, {"cache": [slots, new]}, _lay_out, waves
            )
        slots = yield Program(
            "decode",
            decode_block,
            (slots, key, np.int32(0), params, self.suppressed),
            {"policy": self.policy, "sampling": self.sampling, "block": block},
            {"cache": slots},
            _lay_out,
            -(-prompts // size) * -(-length // block),
        )
        for groups, lanes in self._shrunk(size):
            picked = np.zeros(groups, np.int32), np.zeros((groups, lanes), np.int32)
            yield Program("shrink", shrink, (slots, *picked), {}, {"cache": slots}, _lay_out)
        if refill == size:
            return slots.prefix, slots.samples
        return (
            yield Program(
                "take_out", take_out, (slots, rows), {}, {"cache": slots}, _taken_layout, waves
            )
        )

    def abstract_slots(self, shapes: Admission, places: int = 0) -> Slots:
        """Returns abstract slots that are all taken, with a ring of `places`; 0 is the largest."""
        size, _ = self.sizes(len(shapes.row))
        length = self.sampling.max_tokens
        how = {"responses": self.group_size, "length": length, "unroll": self.plan.unroll}
        prefix = _first_prompts(shapes.prefix, size)
        first = first_rows(shapes._replace(prefix=None), size)._replace(prefix=prefix)
        opened = begin.eval_shape(first, **how)
        slots = open_slots.eval_shape(opened, size, places or length)
        return _lay_out(mesh_of(shapes.token), slots)

    def _shrunk(self, size: int) -> list[tuple[int, int]]:
        """Returns slots and lanes after the largest shrink of the batch; none if it never does."""
        lanes = _widths(self.group_size, self.plan.halvings)[-2:]
        least, groups = size >> self.plan.halvings, size
        if size % (2 * self.num_shards) == 0 and size // 2 >= least:
            groups = size // 2
        largest = {(groups, self.group_size), (size, lanes[0])} - {(size, self.group_size)}
        return sorted(largest, key=lambda sizes: -sizes[0] * sizes[1])[:1]


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
    cache, cursor = _resize(slots.cache, slots.cursor, places)
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


def _take(slots: Slots, at: np.ndarray, everything: bool) -> tuple[KV, Samples]:
    """Returns keys and responses of the prompts in the slots `at`."""
    return (slots.prefix, slots.samples) if everything else take_out(slots, at)


@jax.jit
def take_out(slots: Slots, at: jax.Array) -> tuple[KV, Samples]:
    """Returns keys and responses of the prompts in the slots `at`, int32[R]."""
    wanted = slots._replace(cache=None)
    taken = map_rows(lambda axis, x: shard_rows(axis, jnp.take(x, at, axis)), wanted)
    return taken.prefix, taken.samples


def _widths(responses: int, halvings: int) -> tuple[int, ...]:
    """Returns how many lanes a prompt may have, rising: G, 3/4 G, G/2, 3/8 G, G/4, …"""
    halves = [responses]
    while len(halves) <= halvings and halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    between = [3 * half // 2 for half in halves[1:] if half % 2 == 0]
    return tuple(sorted(halves + between))


def choose_shrink(
    taken: np.ndarray, ended: np.ndarray, least: int, widths: tuple[int, ...], parts: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns which slots, and which lanes of each, are left when the batch shrinks as it can.

    Args:
      taken: bool[S], slots that hold a prompt; they stay, also with all responses ended.
      ended: bool[S, L]; an empty slot has only such lanes.
      least: how many slots there must be.
      widths: how many lanes there may be, rising.
      parts: must divide the slots that are left.

    Returns:
      int[S'] and int[S', L'], or None if all are needed.
    """
    size, lanes = ended.shape
    small, most = size, (~ended).sum(axis=1).max()
    while small % (2 * parts) == 0 and small // 2 >= max(least, taken.sum()):
        small //= 2
    narrow = next(width for width in widths if width >= most)
    if (small, narrow) == (size, lanes):
        return None
    groups = np.argsort(~taken, kind="stable")[:small]
    return groups, np.argsort(ended[groups], axis=1, kind="stable")[:, :narrow]


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


def ring_sizes(block: int, most: int) -> tuple[int, ...]:
    """Returns the sizes that a ring may have: doubling from `block` on, then `most`."""
    sizes = [block]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


def _fit(slots: Slots, needed: int, sizes: tuple[int, ...]) -> Slots:
    """Returns the slots with a ring that holds `needed` places, or all that there can be.

    A ring shrinks when a quarter would do: what grows and shrinks in turns would be copied often.
    """
    now = sizes.index(slots.cache.mask.shape[-1])
    wanted = next((i for i, size in enumerate(sizes) if size >= needed), len(sizes) - 1)
    if now - 1 <= wanted <= now:
        return slots
    cache, cursor = resize_ring(slots.cache, slots.cursor, places=sizes[wanted])
    return slots._replace(cache=cache, cursor=cursor)


def _resize(cache: Cache, cursor: jax.Array, places: int) -> tuple[Cache, jax.Array]:
    """Returns a ring of `places` with the newest places of another, the oldest first."""
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


resize_ring = partial(jax.jit, static_argnames="places")(_resize)


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


def _lay_out(mesh: Mesh, slots: Slots) -> Slots:
    """Returns abstract slots, sharded as `open_slots` does."""
    heads = slots.prefix.v.shape[2]
    laid = map_rows(lambda axis, x: by_prompts_and_heads(mesh, x, axis, heads), slots)
    return laid._replace(cursor=whole(mesh, slots.cursor))


def _first_prompts(prefix: KV, count: int) -> KV:
    """Returns the shapes of the first prompts."""

    def first(x: Any, axis: int) -> jax.ShapeDtypeStruct:
        shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return KV(*(first(x, axis) for x, axis in zip(prefix, (1, 1, 0), strict=True)))


def _taken_layout(mesh: Mesh, taken: tuple[KV, Samples]) -> tuple[KV, Samples]:
    """Returns abstract results of `take_out`."""
    return prefix_layout(mesh, taken[0]), by_prompts(mesh, taken[1])


def prefix_layout(mesh: Mesh, prefix: KV) -> KV:
    """Returns abstract keys and values of prompts."""
    heads = prefix.v.shape[2]
    axes = zip(prefix, (1, 1, 0), strict=True)
    return KV(*(by_prompts_and_heads(mesh, x, axis, heads) for x, axis in axes))
