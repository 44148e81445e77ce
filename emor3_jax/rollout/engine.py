"""The rollout at speed: continuous batching of responses, whose prompts share their keys.

    for finished in engine.run(params, admissions, prompts, key):
        ...       # a few prompts, as their groups end: ask the reflections, the keys are there

At most `slots` prompts are in flight, each with one copy of its keys, and at most `lanes` of their
responses; a lane whose response has ended goes on with another in the next token. They decode
together, in blocks of tokens. Between blocks the host reads which responses have ended and

* takes out `refill` prompts whose groups have ended, and admits as many waiting ones;
* resizes the ring-buffer KV cache to what the oldest response needs, in doubling sizes;
* when no prompt waits, drops idle lanes, by quarters and thirds in turn, and half of the slots.

So a few long responses hold neither the batch nor its memory. The devices cut slots and lanes into
parts; each part takes its own prompts, and chooses by itself which slots are admitted to, taken out
and dropped, as many as every other part. Shapes come from short lists: at most `2 * halvings + 1`
numbers of lanes with one of slots each, and log2(T / block) + 1 sizes of the cache. The arrays in
flight, and the programs on them, are in `rollout.slots`.

Deviations, numbered:
 1. The noise of a token comes from (key, prompt, response, index in the response), so that the
    samples do not depend on the slots: another `slots`, `lanes` or `refill` gives the same
    responses, as far as the arithmetic of another batch does.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from emor3_jax.models.cache import KV
from emor3_jax.models.params import unroll
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.program import Program, Programs, mesh_of
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import (
    Admission,
    InFlight,
    Room,
    admit,
    decode_block,
    flight_layout,
    open_flight,
    resize_ring,
    ring_places,
    shrink,
    shrink_slots,
    take_out,
)
from emor3_jax.types import Samples


class Plan(NamedTuple):
    """Limits on what is in flight; hashable.

    Attributes:
      slots: prompts in flight, 0 for all of the batch.
      refill: prompts that leave and enter at once, 0 for all; must divide `slots` and the batch.
      lanes: responses in flight, 0 for all of the slots.
      block: tokens between two reads of the host, and the smallest cache.
      halvings: how often the lanes may be halved when nothing waits; there is a step between two
        halves.
      unroll: decode with the layers apart, not in a loop over them; faster in bfloat16 on CPU, for
        a longer compile and a copy of the weights.
    """

    slots: int = 0
    refill: int = 0
    lanes: int = 0
    block: int = 64
    halvings: int = 4
    unroll: bool = False


ALL_AT_ONCE = Plan()
"""All prompts in flight together."""


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


class Shrunk(NamedTuple):
    """What is left when idle lanes and empty slots are dropped; numbers are those of a part.

    Attributes:
      slots: int[parts, S'], which slots stay.
      lanes: int[parts, N'], which lanes.
      cell: int[parts, N'], their new cells.
      columns: M, most lanes of a slot from now on.
    """

    slots: np.ndarray
    lanes: np.ndarray
    cell: np.ndarray
    columns: int


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

    def sizes(self, prompts: int) -> tuple[int, int, int]:
        """Returns the number of slots, of prompts that are admitted together, and of lanes.

        Raises:
          ValueError: if `plan.refill` does not divide the slots and the prompts, or the devices'
            parts do not divide the lanes or the prompts that are admitted together.
        """
        plan, parts = self.plan, self.num_shards
        size = min(plan.slots or prompts, prompts)
        refill = min(plan.refill or size, size)
        if size % refill or prompts % refill:
            raise ValueError(f"{plan}: refill must divide the slots and the {prompts} prompts")
        lanes = min(plan.lanes or size * self.group_size, size * self.group_size)
        if refill % parts or lanes % parts:
            raise ValueError(f"{plan}: {parts} devices' parts must divide refill and lanes")
        return size, refill, lanes

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
          ValueError: see `sizes`.
        """
        plan, sampling, parts, g = self.plan, self.sampling, self.num_shards, self.group_size
        size, refill, lanes = self.sizes(prompts)
        block, each = min(plan.block, sampling.max_tokens), refill // parts
        rings = ring_sizes(block, sampling.max_tokens)
        widths = lane_counts(lanes // parts, plan.halvings)
        room, columns, flight = Room(parts, size, lanes, block), g, None
        how = {"responses": g, "length": sampling.max_tokens, "unroll": plan.unroll}
        params = unroll(params) if plan.unroll else params
        wave, waves = 0, prompts // refill
        # Where there is a prompt that has not been taken out yet.
        taken = np.zeros((parts, size // parts), bool)
        while wave < waves or taken.any():
            while wave < waves and (at := first_of_each(~taken, each)) is not None:
                if flight is None or refill == size:
                    flight, columns = open_flight(next(admissions), room=room, **how), g
                else:
                    flight = admit(flight, next(admissions), flat(at), np.int32(wave), parts=parts)
                np.put_along_axis(taken, at, True, axis=1)
                wave += 1
            held, going = flight.slots, flight.lanes
            row, begun, cell, age = (
                x.reshape(parts, -1)
                for x in hosts.fetch((held.row, held.begun, going.cell, going.age))
            )
            waiting = np.where(taken, g - begun, 0)
            done = taken & (waiting == 0) & (lanes_of_slots(cell, taken.shape[1], columns) == 0)
            while (at := first_of_each(done, each)) is not None:
                rows = np.take_along_axis(row, at, axis=1).reshape(-1)
                leaving = held.prefix, held.samples
                if refill < size:
                    leaving = take_out(flight, flat(at), parts=parts)
                yield Finished(rows, *leaving)
                for mask in (taken, done):
                    np.put_along_axis(mask, at, False, axis=1)
            if not taken.any() or (wave < waves and first_of_each(~taken, each) is not None):
                continue
            if wave == waves:
                smaller = choose_shrink(taken, waiting, cell, columns, widths)
                if smaller is not None:
                    stay, cells = flat(smaller.lanes), flat(smaller.cell)
                    flight = flight._replace(lanes=shrink(going, stay, cells, parts=parts))
                    if smaller.slots.shape != taken.shape:
                        stay = flat(smaller.slots)
                        flight = flight._replace(slots=shrink_slots(held, stay, parts=parts))
                    taken = np.take_along_axis(taken, smaller.slots, axis=1)
                    columns = smaller.columns
            flight = fit_ring(flight, int(age.max()) + block, rings)
            flight = decode_block(
                flight,
                key,
                params,
                self.suppressed,
                policy=self.policy,
                sampling=sampling,
                block=block,
                columns=columns,
                parts=parts,
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
        parts = self.num_shards
        prompts, g, length = len(shapes.row), self.group_size, self.sampling.max_tokens
        size, refill, lanes = self.sizes(prompts)
        block, waves = min(self.plan.block, length), prompts // refill
        sizes = ring_sizes(block, length)
        if self.plan.unroll:
            params = yield Program("unroll", unroll, (params,))
        # In memory at its largest, beside the prompts that are admitted.
        flight = self.abstract_flight(shapes)
        in_flight = flight if refill < size else None
        admission = yield from admit_programs({"cache": in_flight})
        how = self._opening(Room(parts, size, lanes, block))
        yield Program(
            "open_flight",
            open_flight,
            (admission,),
            how,
            {"cache": admission},
            calls=1 if refill < size else waves,
        )

        if refill < size:
            args = flight, admission, np.zeros(refill, np.int32), np.int32(0)
            alive = {"cache": [flight, admission]}
            flight = yield Program("admit", admit, args, {"parts": parts}, alive, calls=waves)
        if len(sizes) > 1:
            small = self.abstract_flight(shapes, sizes[-2])
            yield Program(
                "resize_ring",
                resize_ring,
                (small.lanes, small.cursor),
                {"places": sizes[-1]},
                {"cache": small},
            )
        flight = yield Program(
            "decode",
            decode_block,
            (flight, key, params, self.suppressed),
            {
                "policy": self.policy,
                "sampling": self.sampling,
                "block": block,
                "columns": g,
                "parts": parts,
            },
            {"cache": flight},
            calls=-(-prompts * g // lanes) * -(-length // block),
        )
        for fewer in lane_counts(lanes // parts, self.plan.halvings)[-2:-1]:
            rows = np.zeros(fewer * parts, np.int32)
            args, alive = (flight.lanes, rows, rows), {"cache": flight}
            yield Program("shrink", shrink, args, {"parts": parts}, alive)
            if size // parts % 2 == 0:
                args = flight.slots, np.zeros(size // 2, np.int32)
                yield Program("shrink_slots", shrink_slots, args, {"parts": parts}, alive)
        if refill == size:
            return flight.slots.prefix, flight.slots.samples
        args, alive = (flight, np.zeros(refill, np.int32)), {"cache": flight}
        return (yield Program("take_out", take_out, args, {"parts": parts}, alive, calls=waves))

    def abstract_flight(self, shapes: Any, places: int | None = None) -> InFlight:
        """Returns abstract slots and lanes with a ring of `places`, by default the largest.

        Args:
          shapes: abstract `Admission` of all prompts together.
          places: of the ring.
        """
        size, _, lanes = self.sizes(len(shapes.row))
        places = self.sampling.max_tokens if places is None else places
        how = self._opening(Room(1, size, lanes, places))
        axes = Admission(0, 0, 0, KV(1, 1, 0))
        first = jax.tree.map(partial(_first, size), axes, shapes)
        return flight_layout(mesh_of(shapes.token), open_flight.eval_shape(first, **how))

    def _opening(self, room: Room) -> dict[str, Any]:
        length, apart = self.sampling.max_tokens, self.plan.unroll
        return {"responses": self.group_size, "length": length, "room": room, "unroll": apart}


def _first(count: int, axis: int, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:axis], count, *x.shape[axis + 1 :]), x.dtype)


def flat(rows: np.ndarray) -> np.ndarray:
    """Returns numbers of each part, int[parts, n], as programs take them, int32[parts * n]."""
    return np.ascontiguousarray(rows.reshape(-1), np.int32)


def first_of_each(mask: np.ndarray, count: int) -> np.ndarray | None:
    """Returns the first `count` places of each row that a mask marks, int[parts, count].

    Args:
      mask: bool[parts, n].
      count: of a row, at least 1.

    Returns:
      None if a row has fewer.
    """
    if mask.sum(axis=1).min() < count:
        return None
    return np.argsort(~mask, axis=1, kind="stable")[:, :count]


def lanes_of_slots(cell: np.ndarray, slots: int, columns: int) -> np.ndarray:
    """Returns how many lanes each slot has, int[parts, S].

    Args:
      cell: int[parts, N], see `rollout.slots.Lanes`.
      slots, columns: S of a part, and M.
    """
    return np.stack([np.bincount(own // columns, minlength=slots + 1)[:slots] for own in cell])


def lane_counts(lanes: int, halvings: int) -> tuple[int, ...]:
    """Returns how many lanes there may be, rising: N, 3/4 N, N/2, 3/8 N, N/4, …"""
    halves = [lanes]
    while len(halves) <= halvings and halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    between = [3 * half // 2 for half in halves[1:] if half % 2 == 0]
    return tuple(sorted(halves + between))


def choose_shrink(
    taken: np.ndarray, waiting: np.ndarray, cell: np.ndarray, columns: int, widths: tuple[int, ...]
) -> Shrunk | None:
    """Returns which slots and lanes are left when the batch shrinks as it can.

    Args:
      taken: bool[parts, S], slots that hold a prompt; they stay, also with all responses ended.
      waiting: int[parts, S], responses of theirs that have not begun.
      cell: int[parts, N], of the lanes.
      columns: M, columns of the cells.
      widths: how many lanes a part may have, rising.

    Returns:
      None if all lanes are needed.
    """
    size = taken.shape[1]
    going = cell < size * columns
    needed = (going.sum(axis=1) + waiting.sum(axis=1)).max()
    narrow = next((width for width in widths if width >= needed), cell.shape[1])
    if narrow >= cell.shape[1]:
        return None
    small = size
    while small % 2 == 0 and small // 2 >= taken.sum(axis=1).max():
        small //= 2
    slots = np.tile(np.arange(size), (len(taken), 1))
    if small < size:
        slots = np.argsort(~taken, axis=1, kind="stable")[:, :small]
    lanes = np.argsort(~going, axis=1, kind="stable")[:, :narrow]
    wide = columns
    if not waiting.any():
        most = lanes_of_slots(cell, size, columns).max()
        while wide % 2 == 0 and wide // 2 >= most:
            wide //= 2
    fresh = np.full(lanes.shape, small * wide)
    for part, (kept, own) in enumerate(zip(slots, lanes, strict=True)):
        place = np.full(size + 1, small)
        place[kept] = np.arange(small)
        used = np.zeros(small + 1, int)
        for lane, number in enumerate(own):
            slot = place[cell[part, number] // columns]
            if not going[part, number]:
                continue
            column = cell[part, number] % columns if wide == columns else used[slot]
            fresh[part, lane] = slot * wide + column
            used[slot] += 1
    return Shrunk(slots, lanes, fresh, wide)


def ring_sizes(block: int, most: int) -> tuple[int, ...]:
    """Returns the sizes that a ring may have: doubling from `block` on, then `most`."""
    sizes = [block]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


def fit_ring(flight: InFlight, needed: int, sizes: tuple[int, ...]) -> InFlight:
    """Returns what is in flight with a ring of `needed` places, or all that there can be.

    A ring shrinks when a quarter would do: what grows and shrinks in turns would be copied often.
    """
    now = sizes.index(ring_places(flight.lanes))
    wanted = next((i for i, size in enumerate(sizes) if size >= needed), len(sizes) - 1)
    if now - 1 <= wanted <= now:
        return flight
    lanes, cursor = resize_ring(flight.lanes, flight.cursor, places=sizes[wanted])
    return flight._replace(lanes=lanes, cursor=cursor)
