"""The kernel of decoded tokens against XLA, and the places of the ring that it reads."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ring_cases

from emor3_jax.models import decode_attention, decode_kernel
from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.decode_attention import count_blocks, make_work, places_read


@pytest.fixture(autouse=True)
def few_chains(monkeypatch):
    """Small batches of blocks: emulated, a large one takes long to compile."""
    monkeypatch.setattr(decode_kernel, "_CHAINS", 4)


class Sizes(NamedTuple):
    """Slots, lanes, key heads, queries of each, and width; places of ring and prompts; layers."""

    slots: int
    lanes: int
    heads: int
    each: int
    width: int
    places: int
    length: int
    layers: int


SIZES = {
    "blocks of a ring and of prompts": Sizes(4, 2, 2, 2, 16, 384, 512, 2),
    "one block, slots that are no power of two": Sizes(3, 3, 1, 3, 8, 24, 40, 3),
    "one lane": Sizes(1, 1, 2, 9, 16, 256, 128, 1),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values(sizes):
    ragged = jax.jit(ring_cases.ragged)
    for seed in range(4):
        case = ring_cases.make_case(*sizes, seed=seed)
        for layer in range(sizes.layers):
            found = ragged(case, jnp.int32(layer))
            np.testing.assert_allclose(found, ring_cases.by_xla(case, layer), atol=2e-6)


def test_values_in_the_batches_of_a_tpu(monkeypatch):
    monkeypatch.undo()
    case = ring_cases.make_case(2, 8, 2, 8, 16, 512, 512, 1, seed=5)
    found = jax.jit(ring_cases.ragged)(case, jnp.int32(0))
    np.testing.assert_allclose(found, ring_cases.by_xla(case, 0), atol=2e-6)


def test_bfloat16_is_rounded_as_xla_rounds():
    case = ring_cases.make_case(2, 2, 1, 4, 16, 256, 256, 1, seed=3, dtype=jnp.bfloat16)
    found = jax.jit(ring_cases.ragged)(case, jnp.int32(0))
    wanted = ring_cases.by_xla(case, 0)
    assert found.dtype == wanted.dtype == jnp.bfloat16
    # Weights and results are rounded once each, to 8 bits.
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, wanted)), atol=2**-7)


def test_only_blocks_in_use_are_read():
    """What may not be read is not a number, and would make the result none."""
    sizes = SIZES["blocks of a ring and of prompts"]
    case = ring_cases.make_case(*sizes, seed=1)
    wanted = [ring_cases.by_xla(case, layer) for layer in range(sizes.layers)]
    used = np.asarray(case.cache.mask).reshape(sizes.slots, sizes.lanes, -1, 128).any(axis=-1)
    used = np.repeat(used, 128, axis=-1)
    seen = np.asarray(case.prefix.mask).reshape(sizes.slots, -1, 256).any(axis=-1)
    seen = np.repeat(seen, 256, axis=-1)
    assert not used.all() and not seen.all()

    def spoil(x: Any, keep: np.ndarray) -> jax.Array:
        return jnp.where(keep, x, jnp.nan)

    cache = Cache(
        spoil(case.cache.k, used[:, :, None, None]),
        spoil(case.cache.v, used[:, :, None, :, None]),
        case.cache.mask,
    )
    prefix = KV(
        spoil(case.prefix.k, seen[:, None, None]),
        spoil(case.prefix.v, seen[:, None, :, None]),
        case.prefix.mask,
    )
    ragged = jax.jit(ring_cases.ragged)
    for layer in range(sizes.layers):
        found = ragged(case._replace(cache=cache, prefix=prefix), jnp.int32(layer))
        np.testing.assert_allclose(found, wanted[layer], atol=2e-6)


def test_the_blocks_of_lanes_by_hand():
    """A ring of 512 places, written next at 130; prompts of 300 places, of room for 512."""
    lengths = jnp.array([[0, 1], [130, 131], [400, 512], [3, 0]])
    work = make_work(lengths, jnp.array([0, 256, 257, 1]), jnp.int32(130), (2, 512, 512))
    assert work.starts.tolist() == [[130, 129], [0, 511], [242, 130], [127, 130]]
    # Two parts of two slots. In the first, lanes 1, 2 and 3 read 1, 2 and 3 blocks.
    assert work.counts.tolist() == [[6, 1], [4 + 4 + 2, 3]]
    assert work.lane[0, :6].tolist() == [1, 2, 2, 3, 3, 3]
    assert work.block[0, :6].tolist() == [1, 0, 1, 3, 0, 1]
    assert work.lane[1, :10].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert work.block[1, :10].tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 0, 1]
    assert work.slot[0, :1].tolist() == [1] and work.prompt_block[0, :1].tolist() == [0]
    assert work.slot[1, :3].tolist() == [0, 0, 1] and work.prompt_block[1, :3].tolist() == [0, 1, 0]


@given(
    block=st.sampled_from([4, 16]),
    blocks=st.integers(1, 5),
    lane=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_blocks_are_those_that_hold_a_place(block, blocks, lane):
    places = block * blocks
    length, start = round(lane[0] * places), min(int(lane[1] * places), places - 1)
    held = {(start + i) % places // block for i in range(length)}
    assert count_blocks(np.int64(length), np.int64(start), places, block) == len(held)


def test_places_read_by_hand():
    # Of 4 blocks of 128: none, one that is in use in part, one on each side of 128, all.
    lengths = np.array([0, 10, 129, 512])
    assert places_read(lengths, 200, 512) == (651, (0 + 1 + 2 + 4) * 128, 4 * 512)
    # A small ring is one block.
    assert places_read(np.array([[3, 0], [64, 1]]), 7, 64) == (68, 3 * 64, 4 * 64)


@pytest.mark.parametrize(
    ("length", "width", "places", "fits"),
    [
        (640, 128, 2048, True),
        (640, 128, 64, True),
        (640, 128, 1000, False),
        (600, 128, 2048, False),
        (640, 80, 2048, False),
        (640, 128, 0, False),
    ],
)
def test_sizes_of_which_a_tpu_reads_blocks(length, width, places, fits):
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    prefix = KV(array((2, 3, 1, width, length)), array((2, 3, 1, length, width)), None)
    cache = Cache(array((2, 3, 4, 1, width, places)), array((2, 3, 4, 1, places, width)), None)
    assert decode_attention.fits(prefix, cache) == fits
    assert not decode_attention.fits(None, cache, interpret=True)
    apart = cache._replace(k=(cache.k,), v=(cache.v,))
    assert not decode_attention.fits(prefix, apart, interpret=True)
