"""Images that two splits share, or one repeats, by a hash of bytes or a perceptual one (dHash).

The bytes reveal exact copies only. The 64-bit difference hash (does brightness rise from one cell
of a 9 x 8 raster to the next?) also finds an image that was re-encoded or scaled, because that
changes few of its bits and barely changes a raster of 16 x 16 grey levels. The hash proposes
candidates and the raster decides. Flat images have a nearly empty hash, so they are compared by
bytes alone.
"""

import concurrent.futures
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from emor3_jax.data.sources import Source
from emor3_jax.models.images import MAX_DECODED_PIXELS, open_image

MOST_BITS = 3
"""Maximum Hamming distance of the hashes of two candidates."""

MOST_LEVELS = 4.0
"""Maximum mean difference of the rasters of one image, in grey levels of 256."""

# A hash with fewer ones, or fewer zeros, does not identify an image.
_FEWEST_BITS = 8
# With more bands than `MOST_BITS`, two hashes that close agree in at least one of them.
_BANDS = MOST_BITS + 1
_BITS = 64


class DHash(NamedTuple):
    """The difference hash of an image, with the raster that confirms a match.

    Attributes:
      bits: the 64-bit hash.
      raster: uint8[16, 16], grey levels.
    """

    bits: int
    raster: np.ndarray


class Fingerprint(NamedTuple):
    """The fingerprint of an image.

    Attributes:
      bytes: hash of the encoded bytes.
      dhash: None if the image is flat or damaged, or was not decoded.
    """

    bytes: bytes
    dhash: DHash | None


def fingerprints(source: Source, decode: bool) -> dict[str, Fingerprint]:
    """Returns row id → fingerprint of every image that exists.

    Args:
      source: the rows.
      decode: decode the images to compute their difference hashes too.
    """

    def read(index: int) -> tuple[str, Fingerprint | None]:
        row = source[index]
        data = row.images[0] if row.images else None
        if data is None:
            return row.texts.id, None
        hashed = hashlib.sha256(data).digest()[:16]
        return row.texts.id, Fingerprint(hashed, dhash(data) if decode else None)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(read, range(len(source)))
        return {row_id: each for row_id, each in found if each is not None}


def dhash(encoded: bytes, most: int = MAX_DECODED_PIXELS) -> DHash | None:
    """Returns the difference hash of an image; None if it is flat or cannot be decoded."""
    try:
        with open_image(encoded, most) as image:
            # JPEGs are decoded at an eighth of their size where that is enough.
            image.draft("L", (72, 64))
            grey = image.convert("L")
            cells = np.asarray(grey.resize((9, 8), Image.BOX))
            raster = np.asarray(grey.resize((16, 16), Image.BOX))
    except Exception:
        # PIL's decoders raise many kinds of errors.
        return None
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    if not _FEWEST_BITS <= bits.sum() <= _BITS - _FEWEST_BITS:
        return None
    return DHash(int.from_bytes(np.packbits(bits).tobytes(), "big"), raster)


def shared(a: dict[str, Fingerprint], b: dict[str, Fingerprint]) -> list[tuple[str, str]]:
    """Returns the pairs of rows of two sets that show the same image, each row of `b` once.

    Args:
      a, b: as `fingerprints` returns them.
    """
    index = _Index()
    for row_id, found in a.items():
        index.add(row_id, found)
    pairs = ((index.find(found), row_id) for row_id, found in b.items())
    return [(other, row_id) for other, row_id in pairs if other is not None]


def repeated(rows: dict[str, Fingerprint]) -> list[list[str]]:
    """Returns the groups of rows of one set that show the same image, two rows or more each.

    Args:
      rows: as `fingerprints` returns them.
    """
    index, groups, group_of = _Index(), [], {}
    for row_id, found in rows.items():
        other = index.find(found)
        index.add(row_id, found)
        if other is None:
            continue
        if other not in group_of:
            group_of[other] = len(groups)
            groups.append([other])
        group_of[row_id] = group_of[other]
        groups[group_of[other]].append(row_id)
    return groups


class _Index:
    """Fingerprints of rows, to find one that shows the same image."""

    def __init__(self) -> None:
        self._by_bytes: dict[bytes, str] = {}
        self._buckets: dict[tuple[int, int], list[tuple[DHash, str]]] = defaultdict(list)

    def add(self, row_id: str, found: Fingerprint) -> None:
        """Adds a row."""
        self._by_bytes[found.bytes] = row_id
        if found.dhash is not None:
            for band in _bands(found.dhash.bits):
                self._buckets[band].append((found.dhash, row_id))

    def find(self, found: Fingerprint) -> str | None:
        """Returns the id of a row that shows the same image, None if there is none."""
        other = self._by_bytes.get(found.bytes)
        if other is None and found.dhash is not None:
            bands = _bands(found.dhash.bits)
            near = (each for band in bands for each in self._buckets.get(band, ()))
            other = next((name for hashed, name in near if _alike(hashed, found.dhash)), None)
        return other


def _alike(a: DHash, b: DHash) -> bool:
    if (a.bits ^ b.bits).bit_count() > MOST_BITS:
        return False
    return float(np.abs(a.raster.astype(np.int16) - b.raster).mean()) <= MOST_LEVELS


def _bands(bits: int) -> Sequence[tuple[int, int]]:
    width = _BITS // _BANDS
    return [(i, bits >> (i * width) & (2**width - 1)) for i in range(_BANDS)]
