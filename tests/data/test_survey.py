import io

import numpy as np
import pytest
from PIL import Image

from emor3_jax.data.encode import Encoder
from emor3_jax.data.pipeline import BatchSpec, eval_batches
from emor3_jax.data.sources import ParquetSource, Texts
from emor3_jax.data.survey import (
    histogram,
    imbalance,
    mapped_counts,
    measure_padding,
    relabelling,
    survey,
    thumbnail,
    to_dict,
)

TEMPLATE = "{question} {labels}"
LENGTHS, WINDOWS = (60, 120, 240), (1, 4)


@pytest.fixture
def source(tmp_path, make):
    """Three images of 16 x 16, two of 32 x 32, and seven rows that are left out."""

    def images(side: tuple[int, int]) -> list[dict]:
        return [{"bytes": make["png"](0, *side), "path": None}]

    rows = [make["row"](i, images=images((16, 16))) for i in range(3)]
    rows += [make["row"](i, images=images((32, 32)), problem="why ?") for i in (3, 3)]
    rows += [
        make["row"](0, answer="rage"),
        make["row"](0, problem=""),
        make["row"](0, images=images((8, 128))),
        make["row"](0, images=[{"bytes": b"no image", "path": None}]),
        make["row"](0, images=[]),
        make["row"](0, images=2 * images((16, 16))),
        make["row"](0, problem="which ? " * 300),
    ]
    make["parquet"](tmp_path / "a.parquet", rows)
    return ParquetSource(tmp_path / "a.parquet")


@pytest.fixture
def found(source, processor, make):
    encoder = Encoder(processor, TEMPLATE, make["labels"], max(LENGTHS), max(WINDOWS))
    return survey(
        source,
        processor,
        encoder,
        TEMPLATE,
        make["labels"],
        max_tokens=max(LENGTHS),
        max_windows=max(WINDOWS),
    )


def test_rows_are_counted_as_the_pipeline_counts_them(found, source, processor, make):
    batches = eval_batches(
        source,
        processor,
        TEMPLATE,
        make["labels"],
        BatchSpec(12, LENGTHS, WINDOWS),
    )
    ((batch, ids),) = batches
    # The places of rows that were found damaged when they were read stay empty.
    kept = batch.weight > 0
    rows = [source.find(row_id) for row_id in ids if row_id]
    assert rows == found.index.tolist() == [0, 1, 2, 3, 4]
    assert batch.prompt.mask[kept].sum(axis=1).tolist() == found.prompt_tokens.tolist()
    tokens = (batch.prompt.image_slots >= 0).sum(axis=1)
    assert tokens[kept].tolist() == found.image_tokens.tolist()
    assert found.image_tokens.tolist() == [4, 4, 4, 16, 16]
    windows = batch.images.mask.any(axis=3).sum(axis=(1, 2))
    assert windows[kept].tolist() == found.windows.tolist()
    assert found.left_out == {k: n for k, n in batches.stats.counts().items() if n}
    assert found.left_out["missing_field"] == found.left_out["several_images"] == 1
    assert found.labels == {"joy": 3, "Fear": 1, "anger": 1} and found.questions == 5
    assert found.sizes.tolist() == found.resized.tolist() == [[16, 16]] * 3 + [[32, 32]] * 2


def test_padding_by_hand(found):
    tokens = np.array([50, 60, 61, 120, 240])
    measured = found._replace(prompt_tokens=tokens, windows=np.array([1, 1, 1, 4, 3]))
    # Batches pad to (60, 1), (120, 4), (240, 4); row 9 was left out.
    padding = measure_padding(measured, [[0, 1], [2, 3], [9, 4]], LENGTHS, WINDOWS)
    assert padding.shapes == {(60, 1): 1, (120, 4): 1, (240, 4): 1}
    assert padding.token_waste == pytest.approx(1 - (110 + 181 + 240) / (120 + 240 + 240))
    assert padding.window_waste == pytest.approx(1 - (2 + 5 + 3) / (2 + 8 + 4))
    numbers = to_dict(measured, padding)
    assert numbers["usable"] == 5 and numbers["image_tokens_total"] == 44
    assert numbers["shapes"]["120 tokens, 4 windows"] == 1


def test_histograms_by_hand():
    assert histogram(np.array([4, 4, 4])) == [(4, 4, 3)]
    assert histogram(np.array([1, 2, 2, 3])) == [(1, 1, 1), (2, 2, 2), (3, 3, 1)]
    assert histogram(np.array([0, 9, 10, 79]), 8) == [
        (0, 9, 2),
        (10, 19, 1),
        *((a, a + 9, 0) for a in range(20, 70, 10)),
        (70, 79, 1),
    ]
    assert histogram(np.array([], int)) == []


def test_thumbnails_are_small_and_in_proportion(make):
    small = Image.open(io.BytesIO(thumbnail(make["png"](0, 100, 400), (56, 672), 336)))
    assert small.size == (336, 28) and small.format == "JPEG"


def test_labels_and_their_other_names_are_counted():
    own = [Texts("?", x, "") for x in ("happy", "joyful", "happy", "rage", None, "sad")]
    mapped = [Texts("?", x, "") for x in ("Joy", "joy", "joy", "rage", None, "sadness")]
    found = relabelling(own, mapped, ("sadness", "joy", "fear"))
    assert found == [
        ("sad", "sadness", 1),
        ("happy", "joy", 2),
        ("joyful", "joy", 1),
        ("", "", 1),
        ("rage", "", 1),
    ]
    published = [("Happy", 20), ("joyful", 5), ("rage", 7), ("envy", 1), ("sad", 9)]
    assert mapped_counts(published, found) == {"joy": 25, "sadness": 9}


def test_imbalance_by_hand():
    assert imbalance([30, 10, 20]) == 3.0
    assert imbalance([3, 0]) is None and imbalance([]) is None
