"""Faces in small: a base policy's config for grey images, and their caption loader."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from PIL import Image

from configs import fer2013
from emor3_jax.embedded import base_policy
from emor3_jax.embedded.faces import tasks
from emor3_jax.embedded.faces.captions import CaptionLoader, caption_targets
from emor3_jax.embedded.faces.images import read_images
from emor3_jax.embedded.loader import ExampleLoader
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import Policy
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.types import Images

COUNT, HELD_OUT = 1064, 1024


def collate(policy: Policy, patches: Sequence[np.ndarray]) -> tuple[Images, np.ndarray]:
    """Returns images of 2 x 2 patches as a batch, and the slots of their one token."""
    encoded = [policy.layout.arrange(x, (1, 2, 2)) for x in patches]
    return policy.layout.collate([x.image for x in encoded], 1), encoded[0].slots


def make_config(folder: Path) -> ConfigDict:
    """Writes grey images of 16 pixels, whose brightness tells the label, one of them unlabelled."""
    path = folder / "faces.parquet"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(COUNT + 1):
        label = tasks.LABELS[i % len(tasks.LABELS)]
        grey = 30 * (i % len(tasks.LABELS)) + rng.integers(0, 20, (16, 16))
        out = io.BytesIO()
        Image.fromarray(grey.astype(np.uint8)).save(out, "PNG")
        answer = label if i else "boredom"
        image = {"bytes": out.getvalue(), "path": None}
        rows.append({"images": [image], "problem": "<image>which emotion ?", "answer": answer})
    pq.write_table(pa.Table.from_pylist(rows), path)

    config = fer2013.get_config("base")
    config.compile_cache = ""
    config.data.path = str(path)
    config.data.size = 16
    config.model.update({"patch": 4, "window": 16})
    config.model.update({"vision_width": 32, "vision_layers": 1, "vision_heads": 1})
    config.model.update({"width": 32, "layers": 1, "heads": 2, "kv_heads": 1})
    config.look.update({"steps": 24, "warmup_steps": 2, "batch": 16, "learning_rate": 2e-2})
    config.update({"steps": 3, "warmup_steps": 1, "batch": 4})
    return config


def make_captions(config: ConfigDict) -> CaptionLoader:
    """Returns the loader without augmentation, with a tokenizer that knows the whole dataset."""
    dataset = base_policy.DATASETS["faces"](config)
    tokenizer = train_tokenizer(dataset.corpus, 600)
    policy = base_policy.small_policy(config, tokenizer)
    processor = Processor(tokenizer, ImageSettings(256, 256, patch_size=4), policy.layout)
    targets = caption_targets(dataset, tokenizer)
    images = read_images(dataset.images, processor)
    return CaptionLoader(ExampleLoader(dataset, processor, policy, images, targets[:, 0]), targets)


def labels_of(captions: CaptionLoader) -> dict[int, str]:
    """Returns first token → label."""
    tokenizer = captions.rows.processor.tokenizer
    tokens = tokenizer(list(tasks.LABELS), add_special_tokens=False).input_ids
    return {first[0]: label for first, label in zip(tokens, tasks.LABELS, strict=True)}
