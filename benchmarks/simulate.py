"""Simulate a step on drawn response lengths, without a policy: lanes of the rollout, padding.

    python -m benchmarks.simulate [--seed=0] [--steps=30]

512 prompts draw the lengths of their 8 responses: log-normal, 265 tokens on average, 1 % of them
cut at 2,048. The engine admits, decodes, shrinks and takes out as it does in a run; only its
programs are replaced by arithmetic on these lengths. For each slice, with the sizes of its config,
two ways are printed: a lane for each response of a prompt in flight (a slot is refilled as a whole
when its group has ended, as the engine did until 2026-11-29), and fewer lanes than responses (a
lane is refilled when its response has ended). Columns:

* steps: of decoding, each of which reads all weights;
* lanes: share of the steps of all lanes that sampled a token (lane efficiency);
* most: the largest lane efficiency that the imbalance of the parts allows, since all of them decode
  until the one with the most tokens has ended;
* ring, blocks: places of the ring that attention reads for one that it needs, over the whole ring
  (XLA) and by the blocks in use (the TPU's kernel);
* programs: shapes that the decoder is compiled for.

Then the padding of reference and update, over `steps` steps, see `benchmarks.simulate_padding`.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import simulate_padding
from benchmarks.compile_matrix import config_of
from benchmarks.options import whole
from benchmarks.simulate_padding import draw_lengths
from emor3_jax.models.decode_attention import places_read
from emor3_jax.parallel import topology
from emor3_jax.rollout import engine
from emor3_jax.rollout.engine import Engine, Plan
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import Room

SHAPE, LONGEST = (512, 8), 2048


class Case(NamedTuple):
    """A mesh and a plan.

    Attributes:
      name: of the slice.
      parts: that the mesh cuts a batch into.
      slots, refill, lanes: of a part.
    """

    name: str
    parts: int
    slots: int
    refill: int
    lanes: int


def _case(name: str) -> Case:
    """Returns a slice as the config of the 3B cuts it."""
    config = config_of("3b", name)
    parts, rollout = topology.parse(name).device_count // config.mesh.tensor, config.rollout
    return Case(name, parts, *(n // parts for n in (rollout.slots, rollout.refill, rollout.lanes)))


LANES = (
    *map(_case, ("v5e-64", "v4-32", "v4-8", "v5p-8")),
    Case("one device", 1, 64, 4, 128),
)
"""Fewer lanes than responses: a lane is refilled when its response ends."""

GROUPS = tuple(case._replace(slots=case.lanes // 8) for case in LANES)
"""A lane for each response of a prompt in flight: a slot is refilled when its group has ended."""


class _Flight(NamedTuple):
    slots: "_FakeSlots"
    lanes: "_FakeLanes"
    cursor: int = 0


class _FakeSlots(NamedTuple):
    row: np.ndarray
    begun: np.ndarray
    wave: np.ndarray
    prefix: None = None
    samples: None = None


class _FakeLanes(NamedTuple):
    cell: np.ndarray
    age: np.ndarray
    left: np.ndarray
    places: int


class Counts(NamedTuple):
    """What a rollout took.

    Attributes:
      steps: of decoding.
      lane_steps, tokens: steps of all lanes, and those that sampled a token.
      read, ragged, needed: places of the ring that attention reads over the whole ring (XLA) and
        by the blocks in use (`models.decode_attention`), and those that hold a key it needs.
      programs: shapes of the decoder's programs.
    """

    steps: int
    lane_steps: int
    tokens: int
    read: int
    ragged: int
    needed: int
    programs: frozenset


def simulate(lengths: np.ndarray, case: Case, plan: Plan) -> Counts:
    """Returns what the engine takes for responses of these lengths.

    Args:
      lengths: int[B, G].
      case: mesh, and sizes of a part.
      plan: block and halvings; the sizes are those of the case.
    """
    prompts, g = lengths.shape
    parts, each = case.parts, prompts // case.parts
    plan = plan._replace(
        slots=min(case.slots * parts, prompts),
        refill=case.refill * parts,
        lanes=case.lanes * parts,
    )
    total = dict.fromkeys(("steps", "lane_steps", "tokens", "read", "ragged", "needed"), 0)
    programs = set()

    def open_flight(rows: np.ndarray, *, room: Room, **_: Any) -> _Flight:
        slots, lanes = room.slots // parts, room.lanes // parts
        row = np.zeros((parts, slots), int)
        row[:, : rows.shape[1]] = rows
        begun = np.where(np.arange(slots) < rows.shape[1], 0, g) + 0 * row
        idle = np.full((parts, lanes), slots * g)
        held = _FakeSlots(row, begun, 0 * row)
        return _Flight(held, _FakeLanes(idle, 0 * idle, 0 * idle, room.places))

    def admit(flight: _Flight, rows: np.ndarray, at: np.ndarray, wave: int, **_: Any) -> _Flight:
        at = at.reshape(parts, -1)
        for values, new in zip(flight.slots[:3], (rows, 0, int(wave)), strict=True):
            np.put_along_axis(values, at, new, axis=1)
        return flight

    def resize_ring(lanes: _FakeLanes, cursor: int, *, places: int) -> tuple[_FakeLanes, int]:
        return lanes._replace(places=places), min(lanes.places, places) % places

    def shrink(lanes: _FakeLanes, at: np.ndarray, cell: np.ndarray, **_: Any) -> _FakeLanes:
        at = at.reshape(parts, -1)
        age, left = (np.take_along_axis(x, at, axis=1) for x in lanes[1:3])
        return _FakeLanes(cell.reshape(parts, -1).astype(int), age, left, lanes.places)

    def shrink_slots(slots: _FakeSlots, at: np.ndarray, **_: Any) -> _FakeSlots:
        at = at.reshape(parts, -1)
        return _FakeSlots(*(np.take_along_axis(x, at, axis=1) for x in slots[:3]))

    def decode_block(flight: _Flight, *_: Any, block: int, columns: int, **__: Any) -> _Flight:
        row, begun, wave = (x.copy() for x in flight.slots[:3])
        cell, age, left = (x.copy() for x in flight.lanes[:3])
        places = flight.lanes.places
        cells, steps = row.shape[1] * columns, 0
        programs.add((cell.shape[1], row.shape[1], columns, places))
        for step in range(block):
            for part in np.flatnonzero((cell >= cells).any(axis=1) & (begun < g).any(axis=1)):
                idle = iter(np.flatnonzero(cell[part] >= cells))
                for slot in np.lexsort((np.arange(row.shape[1]), wave[part])):
                    while begun[part, slot] < g and (lane := next(idle, None)) is not None:
                        response = begun[part, slot]
                        cell[part, lane], age[part, lane] = slot * g + response, 0
                        left[part, lane] = lengths[row[part, slot], response]
                        begun[part, slot] += 1
            live = cell < cells
            if not live.any():
                break
            steps = step + 1
            total["steps"] += 1
            total["lane_steps"] += live.size
            total["tokens"] += live.sum()
            found = places_read(age, (flight.cursor + step) % places, places)
            for name, count in zip(("needed", "ragged", "read"), found, strict=True):
                total[name] += count
            age, left = age + live, left - live
            ended = live & (left == 0)
            cell[ended], age[ended] = cells, 0
        return flight._replace(
            slots=_FakeSlots(row, begun, wave),
            lanes=_FakeLanes(cell, age, left, places),
            cursor=(flight.cursor + steps) % places,
        )

    def admissions() -> Iterator[np.ndarray]:
        for first in range(0, each, case.refill):
            yield np.arange(parts)[:, None] * each + np.arange(first, first + case.refill)

    fakes = {
        "open_flight": open_flight,
        "admit": admit,
        "resize_ring": resize_ring,
        "shrink": shrink,
        "shrink_slots": shrink_slots,
        "decode_block": decode_block,
        "ring_places": lambda lanes: lanes.places,
        "take_out": lambda *_, **__: (None, None),
    }
    sampling = Sampling(LONGEST, 1.0, 1.0, ())
    one = Engine(None, sampling, plan, g, parts, None)  # type: ignore[arg-type]
    with mock.patch.multiple(engine, **fakes), mock.patch.object(engine.hosts, "fetch", tuple):
        rows = [each.row for each in one.run({}, admissions(), prompts, None)]
    if sorted(np.concatenate(rows)) != list(range(prompts)) or total["tokens"] != lengths.sum():
        raise AssertionError("a response was lost or decoded twice")
    return Counts(**total, programs=frozenset(programs))


def rows(seed: int) -> Iterator[str]:
    """Yields the lines of the table."""
    lengths = draw_lengths(SHAPE, LONGEST, seed)
    plan = Plan(block=128)
    yield (
        "| slice | parts | slots | lanes | refilled | steps | lanes | most | ring | blocks "
        "| programs |"
    )
    yield "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    for name, cases in (("groups", GROUPS), ("responses", LANES)):
        for case in cases:
            found, own = simulate(lengths, case, plan), lengths.reshape(case.parts, -1).sum(axis=1)
            yield (
                f"| {case.name} | {case.parts} | {case.slots} | {case.lanes} | {name} | "
                f"{found.steps:,} | {found.tokens / found.lane_steps:.2f} | "
                f"{own.mean() / own.max():.2f} | "
                f"{found.read / found.needed:.1f} | {found.ragged / found.needed:.2f} | "
                f"{len(found.programs)} |"
            )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--steps", type=whole(1), default=30)
    args = parser.parse_args()
    for row in rows(args.seed):
        print(row, flush=True)
    print()
    simulate_padding.print_table(args.steps)


if __name__ == "__main__":
    main()
