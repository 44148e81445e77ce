"""The rollout at speed: continuous batching of prompts, each with its group of responses.

    for finished in engine.run(params, admissions, prompts, key):
        ...       # a few prompts, as their groups end: ask the reflections, the keys are there

At most `slots` prompts are in flight, each with its `G` responses and one copy of its keys. They
decode together, in blocks of tokens. Between blocks the host reads which responses have ended and

* takes out `refill` prompts whose groups have ended, and admits as many waiting ones;
* resizes the ring-buffer KV cache to what the oldest response needs, in doubling sizes;
* when no prompt waits, drops ended responses from the batch: its prompts by halves, its responses
  by quarters and thirds in turn (8, 6, 4, 3, 2, 1 a prompt).

So a few long responses hold neither the batch nor its memory. Shapes come from short lists: at
most `halvings + 1` numbers of prompts, `2 * halvings + 1` of responses, and log2(T / block) + 1
sizes of the cache. The arrays in flight, and the programs on them, are in `rollout.slots`.

Deviations, numbered:
 1. The noise of a token comes from (key, prompt, response, index in the response), so that the
    samples do not depend on the slots: another `slots` or `refill` gives the same responses, as
    far as the arithmetic of another batch does.
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
from emor3_jax.parallel.program import Program, Programs, first_rows, mesh_of
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import (
    Admission,
    Slots,
    admit,
    begin,
    decode_block,
    first_prompts,
    open_slots,
    resize_ring,
    shrink,
    slots_layout,
    take_out,
    taken_layout,
)
from emor3_jax.types import Samples


class Plan(NamedTuple):
    """Limits on what is in flight; hashable.

    Attributes:
      slots: prompts in flight, 0 for all of the batch.
      refill: prompts that leave and enter at once, 0 for all; must divide `slots` and the batch.
      block: tokens between two reads of the host, and the smallest cache.
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
        least, widths = size >> plan.halvings, lane_counts(self.group_size, plan.halvings)
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
                leaving = slots.prefix, slots.samples
                yield Finished(row[at], *(leaving if size == refill else take_out(slots, at)))
                taken[at] = False
            if not going.any() or (waiting and not taken.all()):
                continue
            oldest = int(age[going].max())
            picked = None
            if not waiting:
                picked = choose_shrink(taken, ended, least, widths, self.num_shards)
            if picked is not None:
                slots, taken, going = shrink(slots, *picked), taken[picked[0]], going[picked[0]]
            slots = fit_ring(slots, oldest + block, sizes)
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
            "begin",
            begin,
            (admission,),
            how,
            {"cache": [in_flight, admission]},
            slots_layout,
            waves,
        )
        opened = (new, size, block)
        calls = 1 if refill < size else waves
        yield Program("open_slots", open_slots, opened, {}, {"cache": new}, slots_layout, calls)
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
                "admit", admit, args, {}, {"cache": [slots, new]}, slots_layout, waves
            )
        slots = yield Program(
            "decode",
            decode_block,
            (slots, key, np.int32(0), params, self.suppressed),
            {"policy": self.policy, "sampling": self.sampling, "block": block},
            {"cache": slots},
            slots_layout,
            -(-prompts // size) * -(-length // block),
        )
        for groups, lanes in self._shrunk(size):
            picked = np.zeros(groups, np.int32), np.zeros((groups, lanes), np.int32)
            yield Program("shrink", shrink, (slots, *picked), {}, {"cache": slots}, slots_layout)
        if refill == size:
            return slots.prefix, slots.samples
        return (
            yield Program(
                "take_out", take_out, (slots, rows), {}, {"cache": slots}, taken_layout, waves
            )
        )

    def abstract_slots(self, shapes: Admission, places: int = 0) -> Slots:
        """Returns abstract slots that are all taken, with a ring of `places`; 0 is the largest."""
        size, _ = self.sizes(len(shapes.row))
        length = self.sampling.max_tokens
        how = {"responses": self.group_size, "length": length, "unroll": self.plan.unroll}
        prefix = first_prompts(shapes.prefix, size)
        first = first_rows(shapes._replace(prefix=None), size)._replace(prefix=prefix)
        opened = begin.eval_shape(first, **how)
        slots = open_slots.eval_shape(opened, size, places or length)
        return slots_layout(mesh_of(shapes.token), slots)

    def _shrunk(self, size: int) -> list[tuple[int, int]]:
        """Returns slots and lanes after the largest shrink of the batch; none if it never does."""
        lanes = lane_counts(self.group_size, self.plan.halvings)[-2:]
        least, groups = size >> self.plan.halvings, size
        if size % (2 * self.num_shards) == 0 and size // 2 >= least:
            groups = size // 2
        largest = {(groups, self.group_size), (size, lanes[0])} - {(size, self.group_size)}
        return sorted(largest, key=lambda sizes: -sizes[0] * sizes[1])[:1]


def lane_counts(responses: int, halvings: int) -> tuple[int, ...]:
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


def ring_sizes(block: int, most: int) -> tuple[int, ...]:
    """Returns the sizes that a ring may have: doubling from `block` on, then `most`."""
    sizes = [block]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


def fit_ring(slots: Slots, needed: int, sizes: tuple[int, ...]) -> Slots:
    """Returns the slots with a ring that holds `needed` places, or all that there can be.

    A ring shrinks when a quarter would do: what grows and shrinks in turns would be copied often.
    """
    now = sizes.index(slots.cache.mask.shape[-1])
    wanted = next((i for i, size in enumerate(sizes) if size >= needed), len(sizes) - 1)
    if now - 1 <= wanted <= now:
        return slots
    cache, cursor = resize_ring(slots.cache, slots.cursor, places=sizes[wanted])
    return slots._replace(cache=cache, cursor=cursor)
