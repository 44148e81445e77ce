"""A whole run in small: a random policy in a folder, parquet files of drawn scenes, a config."""

import io
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from configs import cpu_demo
from emor3_jax.config import dataset
from emor3_jax.data.labels import label_set
from emor3_jax.embedded.emoscenes import draw, scene, tasks
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.models import FAMILIES, LoadedPolicy, Policy, parse_config, save
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.models.shapes import SmallSizes
from emor3_jax.rewards import Group

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


def small_policy(
    tokenizer: PreTrainedTokenizerBase, family: str = "qwen2_5_vl", parts: int = 1
) -> Policy:
    """Returns a policy of a hundred thousand parameters that reads scenes of 112 pixels a side.

    So many devices can cut its heads and vocabulary.
    """
    sizes = SmallSizes(
        vocab_size=-(-len(tokenizer) // parts) * parts,
        width=32,
        layers=1,
        heads=2 * parts,
        kv_heads=parts,
        vision_width=32,
        vision_layers=1,
        vision_heads=parts,
        patch=14,
        window=112,
        image=112,
    )
    return parse_config(FAMILIES[family].small_config(sizes) | special_ids(tokenizer))


def write_policy(
    folder: Path, family: str = "qwen2_5_vl", words: int = 800, parts: int = 1
) -> None:
    """Writes a random policy as `small_policy` describes it, of at most so many words."""
    tokenizer = train_tokenizer(tasks.text_corpus(20), words)
    policy = small_policy(tokenizer, family, parts)
    params = jax.device_get(policy.init(jax.random.key(0)))
    images = ImageSettings(min_pixels=112**2, max_pixels=112**2)
    save(LoadedPolicy(policy, params, Processor(tokenizer, images, policy.layout)), folder)


def make_folder(folder: Path, family: str = "qwen2_5_vl") -> Path:
    """Fills a folder with such a policy and two parquet files."""
    write_policy(folder / "policy", family)
    write_rows(folder / "train.parquet", 14, 0, bad=True)
    write_rows(folder / "test.parquet", 6, 1)
    return folder


def make_config(folder: Path) -> ConfigDict:
    """A run of three steps of 4 prompts with 3 responses each, in `folder`."""
    config = cpu_demo.get_config()
    # Of golden runs, whatever the demo takes.
    config.policy_update.learning_rate = 2e-4
    config.policy.path = str(folder / "policy")
    config.data.train = dataset(kind="parquet", path=str(folder / "train.parquet"))
    config.evaluate.sets = ConfigDict()
    config.evaluate.sets.test = dataset(kind="parquet", path=str(folder / "test.parquet"))
    config.evaluate.prompts, config.evaluate.every, config.evaluate.during = 4, 2, 4
    config.evaluate.likelihood = False
    config.steps = 3
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 4, 3, 8
    config.policy_update.prompts, config.policy_update.micro_prompts = 2, 1
    config.policy_update.response_lengths = (8,)
    config.reflect.text_lengths = (8,)
    config.checkpoint.every, config.checkpoint.stop_seconds = 2, 600.0
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


def share_of_length(group: Group) -> jax.Array:
    """A reward term on the device: length over the group's longest."""
    return group.lengths / jnp.max(group.lengths, axis=1, keepdims=True)
