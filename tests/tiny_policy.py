"""A random policy in a folder, and rows for it: what a whole run of a program needs."""

import io
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from emor3_jax.embedded import tasks
from emor3_jax.embedded.base_policy import model_config
from emor3_jax.embedded.emoscenes import draw, scene
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import Policy, save
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor

QUESTION = "<image>which emotion ?"


def write(folder: Path) -> None:
    """Writes a random policy of 30 thousand parameters that reads scenes of 112 pixels a side."""
    tokenizer = train_tokenizer(tasks.text_corpus(20), 800)
    sizes = {"vocab_size": 800, "vision_width": 32, "vision_layers": 1}
    sizes |= {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    shapes = model_config(ConfigDict({"model": sizes}), tokenizer)
    params = jax.device_get(model.init_params(shapes, jax.random.key(0)))
    processor = Processor(tokenizer, ImageSettings(min_pixels=112**2, max_pixels=112**2))
    save(Policy(shapes, params, processor), folder)


def write_rows(path: Path, count: int, seed: int, bad: bool = False) -> None:
    """Writes drawn scenes in the release's schema.

    Args:
      path: the parquet file.
      count: rows.
      seed: of the drawing.
      bad: rows 1 to 4 have a wrong label, no question, no image, a question that is too long.
    """
    rng = np.random.default_rng(seed)
    scenes = [scene.sample("drawn", rng) for _ in range(count)]
    rows = [
        {"images": [{"bytes": _png(s), "path": None}], "problem": QUESTION, "answer": s.label}
        for s in scenes
    ]
    if bad:
        rows[1]["answer"] = "boredom"
        rows[2]["problem"] = "<image>  "
        rows[3]["images"][0]["bytes"] = b"no image"
        rows[4]["problem"] = "<image>" + "which " * 500
    pq.write_table(pa.Table.from_pylist(rows), path)


def _png(s: scene.Scene) -> bytes:
    out = io.BytesIO()
    draw.draw(s, 112).save(out, "PNG")
    return out.getvalue()
