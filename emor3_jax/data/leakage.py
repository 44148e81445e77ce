"""Pictures that two splits share, by the hash of their bytes or by their look.

By bytes only exact copies are found. By look, a picture that was saved anew or scaled is found too:
its 64-bit difference hash (does brightness rise from one cell of a 9 x 8 raster to the next?)
changes by few bits. Flat pictures, whose hash is nearly empty, are compared by bytes alone.
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
"""Two hashes of a look that differ by at most so many bits are one picture."""

# A hash with fewer bits, or fewer missing ones, says nothing.
_FEWEST_BITS = 8
# With more bands than `MOST_BITS`, hashes that near agree in one of them.
_BANDS = MOST_BITS + 1
_BITS = 64


class Print(NamedTuple):
    """The fingerprint of a picture.

    Attributes:
      bytes: hash of the encoded bytes.
      look: 64 bits; None where the picture is flat, damaged, or was not looked at.
    """

    bytes: bytes
    look: int | None


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


def look_of(encoded: bytes) -> int | None:
    """Returns the difference hash of a picture; None if it is flat or cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            # JPEGs are decoded at an eighth of their size where that is enough.
            picture.draft("L", (72, 64))
            grey = np.asarray(picture.convert("L").resize((9, 8), Image.BOX), np.int16)
    except Exception:
        # PIL's decoders raise many kinds of errors.
        return None
    bits = (grey[:, 1:] > grey[:, :-1]).reshape(-1)
    if not _FEWEST_BITS <= bits.sum() <= _BITS - _FEWEST_BITS:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def shared(a: dict[str, Print], b: dict[str, Print]) -> list[tuple[str, str]]:
    """Returns the pairs of rows of two sets that show the same picture, each row of `b` once.

    Args:
      a, b: as `prints` returns them.
    """
    by_bytes = {found.bytes: row_id for row_id, found in a.items()}
    bands: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
    for row_id, found in a.items():
        if found.look is not None:
            for band in _bands(found.look):
                bands[band].append((found.look, row_id))
    pairs = []
    for row_id, found in b.items():
        other = by_bytes.get(found.bytes)
        if other is None and found.look is not None:
            near = (each for band in _bands(found.look) for each in bands.get(band, ()))
            other = next(
                (i for look, i in near if (look ^ found.look).bit_count() <= MOST_BITS), None
            )
        if other is not None:
            pairs.append((other, row_id))
    return pairs


def _bands(look: int) -> Sequence[tuple[int, int]]:
    width = _BITS // _BANDS
    return [(i, look >> (i * width) & (2**width - 1)) for i in range(_BANDS)]
