import io

import numpy as np
import pytest
from PIL import Image

from emor3_jax.data.generic import FilesSource
from emor3_jax.data.leakage import dhash, fingerprints, repeated, shared
from emor3_jax.data.sources import Texts


def scene(seed: int, side: int = 96) -> Image.Image:
    """Smooth random brightness, as photographs have."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return Image.fromarray(cells).resize((side, side), Image.BICUBIC).convert("RGB")


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def source(tmp_path):
    """Makes a source of encoded images; None is a file that is missing."""

    def make(name: str, images: list[bytes | None]) -> FilesSource:
        files = [tmp_path / f"{name}{i}" for i in range(len(images))]
        for file, data in zip(files, images, strict=True):
            if data is not None:
                file.write_bytes(data)
        texts = [Texts("?", "joy", f"{name}{i}") for i in range(len(files))]
        return FilesSource(name, files, texts)

    return make


def test_exact_copies_are_found_by_bytes(source):
    a = source("a", [saved(scene(i)) for i in range(5)])
    b = source("b", [saved(scene(9)), saved(scene(3)), None, b"damaged"])
    assert shared(fingerprints(a, False), fingerprints(b, False)) == [("a3", "b1")]
    assert shared(fingerprints(a, True), fingerprints(b, True)) == [("a3", "b1")]


def test_reencoded_or_scaled_copies_are_found_by_dhash(source):
    a = source("a", [saved(scene(i)) for i in range(60)])
    copies = [saved(scene(7), "JPEG", quality=60), saved(scene(50).resize((160, 128)))]
    b = source("b", [*copies, *(saved(scene(i)) for i in range(100, 160))])
    assert shared(fingerprints(a, False), fingerprints(b, False)) == []
    assert shared(fingerprints(a, True), fingerprints(b, True)) == [("a7", "b0"), ("a50", "b1")]


def test_flat_and_damaged_images_have_no_dhash(source):
    white, grey = (saved(Image.new("RGB", (40, 40), (x, x, x))) for x in (255, 128))
    assert dhash(white) is None and dhash(b"damaged") is None
    assert dhash(saved(scene(0))) is not None
    a, b = source("a", [white, b"x"]), source("b", [grey, white, b"y"])
    assert shared(fingerprints(a, True), fingerprints(b, True)) == [("a0", "b1")]


def test_images_that_a_set_repeats_are_grouped(source):
    images = [saved(scene(i)) for i in (0, 1, 0, 2, 0)]
    a = source("a", [*images, saved(scene(1), "JPEG", quality=60), saved(scene(1)), None])
    # By look, the re-encoded copy joins the two of equal bytes.
    assert repeated(fingerprints(a, False)) == [["a0", "a2", "a4"], ["a1", "a6"]]
    assert repeated(fingerprints(a, True)) == [["a0", "a2", "a4"], ["a1", "a5", "a6"]]
    assert repeated({}) == []
