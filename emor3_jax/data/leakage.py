"""Pictures that two splits share, by the hash of their bytes or by their look.

By bytes only exact copies are found. By look, a picture that was saved anew or scaled is found too:
its 64-bit difference hash (does brightness rise from one cell of a 9 x 8 raster to the next?)
changes by few bits, and a raster of 16 x 16 grey levels by little. The hash finds candidates, the
raster decides. Flat pictures, whose hash is nearly empty, are compared by bytes alone.
"""

import concurrent.futures
import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from emor3_jax.data.sources import Source

MOST_BITS = 3
"""Two hashes that differ by at most so many bits are candidates for one picture."""

MOST_LEVELS = 4.0
"""Candidates whose rasters differ by at most so many of 256 grey levels, on average, are one."""

# A hash with fewer bits, or fewer missing ones, says nothing.
_FEWEST_BITS = 8
# With more bands than `MOST_BITS`, hashes that near agree in one of them.
_BANDS = MOST_BITS + 1
_BITS = 64


class Look(NamedTuple):
    """What a picture looks like from afar.

    Attributes:
      hash: 64 bits.
      raster: uint8[16, 16], grey levels.
    """

    hash: int
    raster: np.ndarray


class Print(NamedTuple):
    """The fingerprint of a picture.

    Attributes:
      bytes: hash of the encoded bytes.
      look: None where the picture is flat, damaged, or was not looked at.
    """

    bytes: bytes
    look: Look | None


def prints(source: Source, look: bool) -> dict[str, Print]:
    """Returns row id → fingerprint of all pictures that are there.

    Args:
      source: the rows.
      look: whether to decode the pictures.
    """

    def read(index: int) -> tuple[str, Print | None]:
        row = source[index]
        data = row.images[0] if row.images else None
        if data is None:
            return row.texts.id, None
        seen = look_of(data) if look else None
        return row.texts.id, Print(hashlib.sha256(data).digest()[:16], seen)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(read, range(len(source)))
        return {row_id: each for row_id, each in found if each is not None}


def look_of(encoded: bytes) -> Look | None:
    """Returns what a picture looks like; None if it is flat or cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            # JPEGs are decoded at an eighth of their size where that is enough.
            picture.draft("L", (72, 64))
            grey = picture.convert("L")
            cells = np.asarray(grey.resize((9, 8), Image.BOX))
            raster = np.asarray(grey.resize((16, 16), Image.BOX))
    except Exception:
        # PIL's decoders raise many kinds of errors.
        return None
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    if not _FEWEST_BITS <= bits.sum() <= _BITS - _FEWEST_BITS:
        return None
    return Look(int.from_bytes(np.packbits(bits).tobytes(), "big"), raster)


def shared(a: dict[str, Print], b: dict[str, Print]) -> list[tuple[str, str]]:
    """Returns the pairs of rows of two sets that show the same picture, each row of `b` once.

    Args:
      a, b: as `prints` returns them.
    """
    by_bytes = {found.bytes: row_id for row_id, found in a.items()}
    bands: dict[tuple[int, int], list[tuple[Look, str]]] = defaultdict(list)
    for row_id, found in a.items():
        if found.look is not None:
            for band in _bands(found.look.hash):
                bands[band].append((found.look, row_id))
    pairs = []
    for row_id, found in b.items():
        other = by_bytes.get(found.bytes)
        if other is None and found.look is not None:
            near = (each for band in _bands(found.look.hash) for each in bands.get(band, ()))
            other = next((name for look, name in near if _alike(look, found.look)), None)
        if other is not None:
            pairs.append((other, row_id))
    return pairs


def _alike(a: Look, b: Look) -> bool:
    if (a.hash ^ b.hash).bit_count() > MOST_BITS:
        return False
    return float(np.abs(a.raster.astype(np.int16) - b.raster).mean()) <= MOST_LEVELS


def _bands(look: int) -> Sequence[tuple[int, int]]:
    width = _BITS // _BANDS
    return [(i, look >> (i * width) & (2**width - 1)) for i in range(_BANDS)]
