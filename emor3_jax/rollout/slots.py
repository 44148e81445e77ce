"""The prompts and responses in flight as arrays, and the jitted programs that change them.

A *slot* holds a prompt: one copy of its keys and values, and the samples of its G responses. A
*lane* decodes one response at a time; when that ends, it goes on with the next response that waits
in a slot of its part, in the very next token. The devices cut slots and lanes into equal parts, and
nothing ever moves from one part to another: each program but the decoder's own works on every part
by itself, without collectives. Indices of slots and lanes are those within a part.

The KV cache of the lanes is a ring buffer: all of them write the keys of a token to the same place
at the same time, so that one update in place serves responses that began at different times. The
keys of a lane are the newest places, as many as its response has tokens. Attention ignores the
order of keys, since they carry their rope positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from emor3_jax.models.cache import KV, Cache, Routing
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.mesh import ALIKE, on_each_part
from emor3_jax.parallel.program import by_prompts, by_prompts_and_heads, laid_out, whole
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
    """S prompts.

    Attributes:
      row: int32[S], which prompt of the batch.
      token, position: int32[S], as of `Admission`.
      wave: int32[S], number of the admission; earlier ones go first.
      begun: int32[S], how many of its responses have begun; G for an empty slot.
      samples: of its responses, [S, G, T].
      prefix: keys and values of the prompts.
    """

    row: jax.Array
    token: jax.Array
    position: jax.Array
    wave: jax.Array
    begun: jax.Array
    samples: Samples
    prefix: KV


class Lanes(NamedTuple):
    """N responses that go on; each lane belongs to one, or idles.

    Attributes:
      cell: int32[N], slot * M + column: where the lane's queries meet the keys of its prompt. M is
        the number of columns; no two lanes share a cell. An idle lane has S' * M, for the S' slots
        of its part.
      row, response, position: int32[N], the prompt in the batch, which of its responses, and the
        rope position of the response's first token but one.
      token: int32[N], the newest token, whose keys are not in the cache.
      age: int32[N], tokens generated so far; 0 for an idle lane.
      k, v: the ring of C places, as of `models.cache.Cache` with G = 1.
    """

    cell: jax.Array
    row: jax.Array
    response: jax.Array
    position: jax.Array
    token: jax.Array
    age: jax.Array
    k: Any
    v: Any


class InFlight(NamedTuple):
    """All that is in flight.

    Attributes:
      slots: the prompts.
      lanes: the responses that go on.
      cursor: int32[], the place of the ring that is written next.
    """

    slots: Slots
    lanes: Lanes
    cursor: jax.Array


_SLOT_AXES = Slots(0, 0, 0, 0, 0, Samples(0, 0, 0, 0), KV(1, 1, 0))
_ADMISSION_AXES = Admission(0, 0, 0, KV(1, 1, 0))


def _lane_axes(unrolled: bool) -> Lanes:
    ring = 0 if unrolled else 1
    return Lanes(0, 0, 0, 0, 0, 0, ring, ring)


class Room(NamedTuple):
    """Sizes of what is in flight; hashable, a static argument.

    Attributes:
      parts: number of equal parts that the devices cut it into.
      slots: S, of all parts.
      lanes: N, of all parts.
      places: C, of the ring.
    """

    parts: int
    slots: int
    lanes: int
    places: int


def flight_layout(mesh: Mesh, flight: InFlight) -> InFlight:
    """Returns abstract slots and lanes, sharded over their parts and heads."""
    slots, lanes, cursor = flight
    return InFlight(slots_layout(mesh, slots), lanes_layout(mesh, lanes), whole(mesh, cursor))


def slots_layout(mesh: Mesh, slots: Slots) -> Slots:
    """Returns abstract slots."""
    rest = by_prompts(mesh, slots._replace(prefix=None))
    return rest._replace(prefix=prefix_layout(mesh, slots.prefix))


def lanes_layout(mesh: Mesh, lanes: Lanes) -> Lanes:
    """Returns abstract lanes."""
    unrolled = isinstance(lanes.k, tuple)
    heads = jax.tree.leaves(lanes.v)[0].shape[-3]

    def lay(axis: int, x: Any) -> Any:
        return by_prompts_and_heads(mesh, x, axis, heads)

    return _map_arrays(lay, _lane_axes(unrolled), lanes)


def ring_layout(mesh: Mesh, resized: tuple[Lanes, jax.Array]) -> tuple[Lanes, jax.Array]:
    """Returns abstract results of `resize_ring`."""
    return lanes_layout(mesh, resized[0]), whole(mesh, resized[1])


def taken_layout(mesh: Mesh, taken: tuple[KV, Samples]) -> tuple[KV, Samples]:
    """Returns abstract results of `take_out`."""
    return prefix_layout(mesh, taken[0]), by_prompts(mesh, taken[1])


def prefix_layout(mesh: Mesh, prefix: KV) -> KV:
    """Returns abstract keys and values of prompts."""
    heads = prefix.v.shape[2]
    axes = zip(prefix, (1, 1, 0), strict=True)
    return KV(*(by_prompts_and_heads(mesh, x, axis, heads) for x, axis in axes))


@partial(jax.jit, static_argnames=("responses", "length", "room", "unroll"))
@laid_out(flight_layout)
def open_flight(
    admission: Admission, *, responses: int, length: int, room: Room, unroll: bool = False
) -> InFlight:
    """Returns prompts in the first slots of each part, and lanes that all idle.

    Args:
      admission: the prompts.
      responses: G.
      length: T.
      room: sizes.
      unroll: keep the layers of the ring apart.
    """
    layers, _, heads, head_dim, _ = admission.prefix.k.shape
    kind = admission.prefix.k.dtype
    slots, lanes = room.slots // room.parts, room.lanes // room.parts

    def own(admission: Admission) -> tuple[Slots, Lanes]:
        new = _begin(admission, jnp.int32(0), responses, length)
        first = len(new.row)

        def grow(axis: int, x: jax.Array) -> jax.Array:
            pad = [(0, (slots - first) * (i == axis)) for i in range(x.ndim)]
            return jnp.pad(x, pad) if slots > first else x

        held = _map_arrays(grow, _SLOT_AXES, new)
        begun = jnp.where(jnp.arange(slots) < first, held.begun, responses)

        def ring(*sizes: int) -> Any:
            shape = lanes, 1, heads, *sizes
            if unroll:
                return tuple(jnp.zeros(shape, kind) for _ in range(layers))
            return jnp.zeros((layers, *shape), kind)

        zeros = jnp.zeros(lanes, jnp.int32)
        idle = jnp.full(lanes, slots * responses, jnp.int32)
        keys, values = ring(head_dim, room.places), ring(room.places, head_dim)
        idle_lanes = Lanes(idle, zeros, zeros, zeros, zeros, zeros, keys, values)
        return held._replace(begun=begun), idle_lanes

    axes = _SLOT_AXES, _lane_axes(unroll)
    found = on_each_part(own, (admission,), (_ADMISSION_AXES,), axes, room.parts)
    return InFlight(*found, jnp.int32(0))


@partial(jax.jit, static_argnames="parts", donate_argnames="flight")
@laid_out(flight_layout)
def admit(
    flight: InFlight, admission: Admission, at: jax.Array, wave: jax.Array, *, parts: int
) -> InFlight:
    """Puts prompts into empty slots.

    Args:
      flight: donated.
      admission: R prompts.
      at: int32[R], slots within the part of each prompt.
      wave: int32[], number of the admission.
      parts: number of parts.
    """
    *_, g, length = flight.slots.samples.tokens.shape

    def own(slots: Slots, admission: Admission, at: jax.Array, wave: jax.Array) -> Slots:
        def put(axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
            return x.at[(slice(None),) * axis + (at,)].set(y)

        return _map_arrays(put, _SLOT_AXES, slots, _begin(admission, wave, g, length))

    args = flight.slots, admission, at, wave
    axes = _SLOT_AXES, _ADMISSION_AXES, 0, ALIKE
    slots = on_each_part(own, args, axes, _SLOT_AXES, parts)
    return flight._replace(slots=slots)


@partial(jax.jit, static_argnames="parts")
@laid_out(taken_layout)
def take_out(flight: InFlight, at: jax.Array, *, parts: int) -> tuple[KV, Samples]:
    """Returns keys and responses of the prompts in the slots `at`, int32[R], of their parts."""

    wanted = flight.slots.prefix, flight.slots.samples
    return _pick(wanted, (_SLOT_AXES.prefix, _SLOT_AXES.samples), at, parts)


@partial(jax.jit, static_argnames="parts")
@laid_out(lanes_layout)
def shrink(lanes: Lanes, at: jax.Array, cell: jax.Array, *, parts: int) -> Lanes:
    """Returns some lanes of each part.

    Args:
      lanes: all lanes.
      at: int32[N], the lanes that stay, within their parts.
      cell: int32[N], their new cells.
      parts: number of parts.
    """
    kept = _pick(lanes, _lane_axes(isinstance(lanes.k, tuple)), at, parts)
    return kept._replace(cell=cell)


@partial(jax.jit, static_argnames="parts")
@laid_out(slots_layout)
def shrink_slots(slots: Slots, at: jax.Array, *, parts: int) -> Slots:
    """Returns the slots `at`, int32[S], of their parts."""
    return _pick(slots, _SLOT_AXES, at, parts)


@partial(jax.jit, static_argnames="places")
@laid_out(ring_layout)
def resize_ring(lanes: Lanes, cursor: jax.Array, *, places: int) -> tuple[Lanes, jax.Array]:
    """Returns a ring of `places` with the newest keys of another, the oldest of them first."""
    now = ring_places(lanes)
    keep = min(now, places)
    place = jnp.arange(places)
    # Read in one pass: an order that is padded apart takes the memory of a second ring.
    order = jnp.where(place < keep, (cursor - keep + place) % now, now)

    def move(axis: int, x: jax.Array) -> jax.Array:
        def one(layer: jax.Array) -> jax.Array:
            return jnp.take(layer, order, axis, mode="fill", fill_value=0)

        # All layers at once, the compiler would lay the whole ring out anew, twice.
        return one(x) if isinstance(lanes.k, tuple) else jax.lax.map(one, x)

    k, v = _map_arrays(move, (-1, -2), (lanes.k, lanes.v))
    return lanes._replace(k=k, v=v), jnp.int32(keep % places)


@partial(
    jax.jit,
    static_argnames=("policy", "sampling", "block", "columns", "parts"),
    donate_argnames="flight",
)
@laid_out(flight_layout)
def decode_block(
    flight: InFlight,
    key: jax.Array,
    params: dict,
    suppressed: jax.Array,
    *,
    policy: Policy,
    sampling: Sampling,
    block: int,
    columns: int,
    parts: int,
) -> InFlight:
    """Decodes up to `block` tokens of every lane, as long as any response goes on.

    Args:
      flight: donated.
      key: PRNG key of the step.
      params: of the policy.
      suppressed: bool[V], ids never sampled.
      policy, sampling: the policy and how to sample from it.
      block: most tokens of a lane.
      columns: M, lanes that a slot may have; G as long as any response waits.
      parts: number of parts.
    """
    slots, ring = flight.slots, flight.lanes
    stop = jnp.asarray(sampling.stop, jnp.int32)
    count, g, _ = slots.samples.tokens.shape
    cells, places = count // parts * columns, ring_places(ring)
    prefix, number = slots.prefix, len(ring.cell)
    if isinstance(ring.k, tuple):
        # Taken apart here, not once a token.
        prefix = prefix._replace(k=tuple(prefix.k), v=tuple(prefix.v))
    back = jnp.arange(places)

    def going(carry: tuple) -> jax.Array:
        i, lanes, begun, _ = carry
        return (i < block) & (jnp.any(lanes.cell < cells) | jnp.any(begun < g))

    def step(carry: tuple) -> tuple:
        i, lanes, begun, record = carry
        lanes, begun = _refill(slots._replace(begun=begun), lanes, parts, cells)
        live, at = lanes.cell < cells, flight.cursor + i
        own = (at - 1 - back) % places < lanes.age[:, None]
        hidden, cache = policy.decode(
            params,
            prefix,
            Cache(lanes.k, lanes.v, own[:, None], Routing.of(lanes.cell, cells, parts)),
            lanes.token[:, None],
            (lanes.position + lanes.age)[:, None],
            at % places,
            lengths=lanes.age[:, None],
        )
        drawn, logprob = sample(
            policy.logits(params, hidden)[:, 0],
            noise(key, lanes.row, lanes.response, lanes.age),
            sampling,
            suppressed,
        )
        age = jnp.where(live, lanes.age + 1, 0)
        stopped = live & jnp.isin(drawn, stop)
        ended = stopped | (age >= sampling.max_tokens)
        mine = jnp.where(live, lanes.cell // columns * g + lanes.response, count // parts * g)
        record = jax.tree.map(
            lambda all_, new: all_.at[:, i].set(new),
            record,
            _Record(mine, lanes.age, drawn, logprob, stopped),
        )
        lanes = lanes._replace(
            cell=jnp.where(ended, cells, lanes.cell),
            token=drawn,
            age=jnp.where(ended, 0, age),
            k=cache.k,
            v=cache.v,
        )
        return i + 1, lanes, begun, record

    def empty(kind: Any, fill: Any = 0) -> jax.Array:
        return jnp.full((number, block), fill, kind)

    record = _Record(
        empty(jnp.int32, count // parts * g),
        empty(jnp.int32),
        empty(jnp.int32),
        empty(jnp.float32),
        empty(bool, False),
    )
    carry = jnp.int32(0), ring, slots.begun, record
    steps, lanes, begun, record = jax.lax.while_loop(going, step, carry)
    samples = _write(slots.samples, record, parts)
    slots = slots._replace(begun=begun, samples=samples)
    return InFlight(slots, lanes, (flight.cursor + steps) % places)


class _Record(NamedTuple):
    """What a block of decoding found, [N, block]; `mine` tells whose, slot * G + response."""

    mine: jax.Array
    place: jax.Array
    token: jax.Array
    logprob: jax.Array
    stopped: jax.Array


def _begin(admission: Admission, wave: jax.Array, responses: int, length: int) -> Slots:
    """Returns prompts none of whose responses have begun."""
    r = len(admission.row)
    shape = r, responses, length
    zeros = partial(jnp.zeros, dtype=jnp.int32)
    logprobs, ended = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:2], bool)
    samples = Samples(zeros(shape), logprobs, zeros(shape[:2]), ended)
    waves = jnp.broadcast_to(wave, (r,))
    row, token, position, prefix = admission
    return Slots(row, token, position, waves, zeros(r), samples, prefix)


def _refill(slots: Slots, lanes: Lanes, parts: int, cells: int) -> tuple[Lanes, jax.Array]:
    """Gives idle lanes the responses that wait; returns these and `Slots.begun`.

    Responses of earlier admissions go first. Sums over comparisons, no gathers: they are few.
    """
    g = slots.samples.tokens.shape[1]
    row, token, position, wave, begun = (x.reshape(parts, -1) for x in slots[:5])
    order = wave * row.shape[1] + jnp.arange(row.shape[1])
    waiting = g - begun
    earlier = order[:, None] < order[..., None]
    first = jnp.sum(jnp.where(earlier, waiting[:, None], 0), axis=-1)
    idle = lanes.cell.reshape(parts, -1) >= cells
    rank = (jnp.cumsum(idle, axis=-1) - 1)[..., None]
    # [parts, lanes, slots]: which slot's response a lane takes, none or one.
    takes = idle[..., None] & (rank >= first[:, None]) & (rank < (first + waiting)[:, None])
    taken = jnp.any(takes, axis=-1).reshape(-1)

    def pick(values: jax.Array, old: jax.Array) -> jax.Array:
        found = jnp.sum(jnp.where(takes, values, 0), axis=-1).reshape(-1)
        return jnp.where(taken, found, old)

    response = (begun - first)[:, None] + rank
    cell = g * jnp.arange(row.shape[1]) + response
    lanes = lanes._replace(
        cell=pick(cell, lanes.cell),
        row=pick(row[:, None], lanes.row),
        response=pick(response, lanes.response),
        position=pick(position[:, None], lanes.position),
        token=pick(token[:, None], lanes.token),
    )
    return lanes, (begun + jnp.sum(takes, axis=1)).reshape(-1)


def _write(samples: Samples, record: _Record, parts: int) -> Samples:
    """Puts the tokens of a block where they belong."""
    length = samples.tokens.shape[-1]

    @jax.vmap
    def own(samples: Samples, record: _Record) -> Samples:
        # A place that no response has is dropped.
        mine, end = record.mine.reshape(-1), samples.ended.size
        place = record.place.reshape(-1)
        stopped = jnp.where(record.stopped.reshape(-1), mine, end)
        return Samples(
            samples.tokens.at[mine, place].set(record.token.reshape(-1), mode="drop"),
            samples.logprobs.at[mine, place].set(record.logprob.reshape(-1), mode="drop"),
            samples.lengths.at[mine].max(place + 1, mode="drop"),
            samples.ended.at[stopped].set(True, mode="drop"),
        )

    flat = Samples(
        samples.tokens.reshape(parts, -1, length),
        samples.logprobs.reshape(parts, -1, length),
        samples.lengths.reshape(parts, -1),
        samples.ended.reshape(parts, -1),
    )
    pieces = jax.tree.map(lambda x: x.reshape(parts, -1, x.shape[-1]), record)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), own(flat, pieces), samples)


def ring_places(lanes: Lanes) -> int:
    """Returns C, the places of the ring."""
    return jax.tree.leaves(lanes.k)[0].shape[-1]


def _pick(tree: Any, axes: Any, at: jax.Array, parts: int) -> Any:
    """Returns the rows `at`, int32[n], of each part of a tree of arrays."""

    def own(tree: Any, at: jax.Array) -> Any:
        def pick(axis: int, x: jax.Array) -> jax.Array:
            # Layer by layer: all at once, the compiler lays keys out anew, which takes a copy.
            return jax.lax.map(lambda y: jnp.take(y, at, 0), x) if axis else jnp.take(x, at, 0)

        return _map_arrays(pick, axes, tree)

    return on_each_part(own, (tree, at), (axes, 0), axes, parts)


def _map_arrays(function: Callable[..., Any], axes: Any, *trees: Any) -> Any:
    """Applies `function(axis, array, …)` to every array; an axis may be that of a tuple's."""
    return jax.tree.map(lambda axis, *x: jax.tree.map(partial(function, axis), *x), axes, *trees)
