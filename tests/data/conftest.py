"""A tokenizer, a policy's shapes and parquet files in the release's schema, all tiny."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import tiny

from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.models.processor import ImageSettings, Processor

LABELS = ("joy", "Fear", "anger")

IMAGES_TYPE = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def png(seed: int, height: int = 16, width: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def parquet_row(seed: int, **changes) -> dict:
    row = {
        "images": [{"bytes": png(seed), "path": None}],
        "problem": f"<image>which emotion is number {seed} ?",
        "answer": ("joy", "fear", " Anger ")[seed % 3],
    }
    return row | changes


def write_parquet(path, rows: list[dict], row_group_size: int = 4) -> None:
    schema = pa.schema(
        [
            ("images", IMAGES_TYPE),
            ("problem", pa.string()),
            ("answer", pa.string()),
            ("course_grained", pa.string()),
        ]
    )
    if any("distribution" in row for row in rows):
        share = pa.struct([("label", pa.string()), ("share", pa.float64())])
        schema = schema.append(pa.field("distribution", pa.list_(share)))
    rows = [{"course_grained": None} | row for row in rows]
    if said := [row["response"] for row in rows if row.get("response")]:
        several = isinstance(said[0], list)
        schema = schema.append(
            pa.field("response", pa.list_(pa.string()) if several else pa.string())
        )
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["which emotion is this ? joy , fear , anger yes or no"] * 4, 300)


@pytest.fixture(scope="session")
def policy(tokenizer):
    return tiny.make_policy(vocab_size=len(tokenizer), **special_ids(tokenizer))


@pytest.fixture(scope="session")
def processor(tokenizer, policy):
    settings = ImageSettings(patch_size=4, min_pixels=256, max_pixels=1024)
    return Processor(tokenizer, settings, policy.layout)


@pytest.fixture(scope="session")
def make():
    """The helpers above, for tests that write their own files."""
    return {"png": png, "row": parquet_row, "parquet": write_parquet, "labels": LABELS}
