"""Short responses side by side: G responses in fewer rows, so that none pays for the longest.

    [ r1 r1 r1 r4 r4 .  ]       instead of a row of T places for each; every token still sees the
    [ r2 r2 r3 r3 r3 r3 ]       prompt and its own response alone, at its own positions

Where the attention kernel takes it (splash), several prompts also share a row: all their responses
lie side by side (`join`), and only the end of the row is padding.

Deviations, numbered:
 1. Rows are filled first fit, the longest responses first, in as many rows for every group: what a
    group needs less of is padding. The optimum would save little more.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.types import Packing


def plan(lengths: np.ndarray, size: int, sizes: Sequence[int]) -> Packing | None:
    """Returns how to pack a batch with as few places as can be, or None if it is best as it is.

    Args:
      lengths: int[B, G], at least 1.
      size: T, at least the longest.
      sizes: choices for C. R is G, or half of it (rounded up) once or several times, so that few
        shapes are compiled.
    """
    b, g = lengths.shape
    rows_allowed = [g]
    while rows_allowed[-1] > 1:
        rows_allowed.append(-(-rows_allowed[-1] // 2))
    best, best_places = None, g * size
    for width in sorted({*sizes, size}):
        if width < lengths.max():
            continue
        found = [_first_fit(row, width) for row in lengths]
        needed = max(len(fill) for _, fill in found)
        rows = min(r for r in rows_allowed if r >= needed)
        if rows < g and rows * width < best_places:
            best, best_places = (rows, width, [place for place, _ in found]), rows * width
    if best is None:
        return None
    rows, width, places = best
    place = np.asarray(places, np.int32)
    source = np.full((b, rows * width), -1, np.int32)
    for i, j in np.ndindex(b, g):
        n = lengths[i, j]
        source[i, place[i, j] : place[i, j] + n] = j * size + np.arange(n)
    return Packing(source.reshape(b, rows, width), place)


def _first_fit(lengths: np.ndarray, width: int) -> tuple[list[int], list[int]]:
    """Returns where each response begins in rows of `width`, and how far each row is filled."""
    fill: list[int] = []
    place = [0] * len(lengths)
    for i in np.argsort(-lengths, kind="stable"):
        n = int(lengths[i])
        row = next((r for r, used in enumerate(fill) if used + n <= width), len(fill))
        if row == len(fill):
            fill.append(0)
        place[i] = row * width + fill[row]
        fill[row] += n
    return place, fill


def join(lengths: np.ndarray, rows: int, size: int, width: int) -> Packing:
    """Packs all responses to a few prompts side by side in one row.

    Args:
      lengths: int[B, G].
      rows: their number; each has the responses to B / rows prompts, one after the other.
      size: T, at least the longest.
      width: C, at least the tokens of the fullest row.

    Returns:
      A packing of one row for each B / rows prompts: `source` is int32[rows, 1, C], and counted
      over [B / rows * G * T].
    """
    each = lengths.reshape(rows, -1)
    place = np.cumsum(each, axis=1) - each
    source = np.full((rows, width), -1, np.int32)
    for row, (counts, starts) in enumerate(zip(each, place, strict=True)):
        first = np.repeat(np.arange(len(counts)) * size - starts, counts)
        source[row, : len(first)] = first + np.arange(len(first))
    return Packing(source[:, None], place.reshape(lengths.shape).astype(np.int32))


def pack(packing: Packing, x: jax.Array) -> jax.Array:
    """Returns [rows, R, C] of [B, G, T]; positions without a token are undefined."""
    source = jnp.maximum(packing.source, 0)
    rows = len(source)
    flat = jnp.take_along_axis(x.reshape(rows, -1), source.reshape(rows, -1), axis=1)
    return flat.reshape(source.shape)


def unpack(packing: Packing, x: jax.Array, size: int) -> jax.Array:
    """Returns [B, G, T] of [rows, R, C]; positions after the end of a response are undefined.

    Args:
      packing: where the tokens are.
      x: the packed values.
      size: T.
    """
    rows = len(x)
    place = (jnp.asarray(packing.place)[..., None] + jnp.arange(size)).reshape(rows, -1)
    flat = jnp.take_along_axis(x.reshape(rows, -1), place, axis=1, mode="clip")
    return flat.reshape(*packing.place.shape, size)
