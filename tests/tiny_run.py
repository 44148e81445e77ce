"""A whole run in small: a random policy in a folder, parquet files of drawn scenes, a config."""

import io
import json
import os
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from configs import cpu_demo
from emor3_jax.config import dataset
from emor3_jax.data.labels import label_set
from emor3_jax.embedded import tasks
from emor3_jax.embedded.base_policy import model_config
from emor3_jax.embedded.emoscenes import draw, scene
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import Policy, save
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor

SMALL = {
    **{
        "vocab_size": 800,
        "patch": 14,
        "window": 112,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 1,
    },
    **{"width": 32, "layers": 1, "heads": 2, "kv_heads": 1},
}
"""Sizes of a policy of 30 thousand parameters."""

QUESTION = "<image>which emotion ?"


def _png(s: scene.Scene) -> bytes:
    out = io.BytesIO()
    draw.draw(s, 112).save(out, "PNG")
    return out.getvalue()


def write_rows(
    path: Path, count: int, seed: int, bad: bool = False, responses: list | None = None
) -> None:
    """Writes rows in the release's schema; if wanted, one with each fault, or with responses."""
    rng = np.random.default_rng(seed)
    scenes = [scene.sample("drawn", rng) for _ in range(count)]
    rows = [
        {"images": [{"bytes": _png(s), "path": None}], "problem": QUESTION, "answer": s.label}
        for s in scenes
    ]
    for row, response in zip(rows, responses or (), strict=False):
        row["response"] = response
    if bad:
        rows[1]["answer"] = "boredom"
        rows[2]["problem"] = "<image>  "
        rows[3]["images"][0]["bytes"] = b"no image"
        rows[4]["problem"] = "<image>" + "which " * 500
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_policy(folder: Path) -> None:
    """Writes a random policy of 30 thousand parameters that reads scenes of 112 pixels a side."""
    tokenizer = train_tokenizer(tasks.text_corpus(20), 800)
    shapes = model_config(ConfigDict({"model": SMALL}), tokenizer)
    params = jax.device_get(model.init_params(shapes, jax.random.key(0)))
    processor = Processor(tokenizer, ImageSettings(min_pixels=112**2, max_pixels=112**2))
    save(Policy(shapes, params, processor), folder)


def make_folder(folder: Path) -> Path:
    """Fills a folder with such a policy and two parquet files."""
    write_policy(folder / "policy")
    write_rows(folder / "train.parquet", 14, 0, bad=True)
    write_rows(folder / "test.parquet", 6, 1)
    return folder


def make_config(folder: Path) -> ConfigDict:
    """A run of three steps of 4 prompts with 3 responses each, in `folder`."""
    config = cpu_demo.get_config()
    config.policy.path = str(folder / "policy")
    config.data.train = dataset(kind="parquet", path=str(folder / "train.parquet"))
    config.evaluate.sets = ConfigDict()
    config.evaluate.sets.test = dataset(kind="parquet", path=str(folder / "test.parquet"))
    config.evaluate.prompts, config.evaluate.every, config.evaluate.during = 4, 2, 4
    config.steps = 3
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 4, 3, 8
    config.policy_update.prompts, config.policy_update.micro_prompts = 2, 1
    config.policy_update.response_lengths = (8,)
    config.reflect.text_lengths = (8,)
    config.checkpoint.every = 2
    config.reward.table_cache = str(folder / "tables")
    config.log.compile_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    return config


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def letters(response: str, label: str) -> float:
    """A reward term in Python."""
    assert label in label_set("mikels8")
    return float(sum(c.isalpha() for c in response))
