"""EmoScenes as pretraining data of the base policy."""

import numpy as np
from ml_collections import ConfigDict

from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.data.labels import LABEL_SETS
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.embedded.dataset import PretrainDataset
from emor3_jax.embedded.emoscenes import builder, tasks
from emor3_jax.embedded.emoscenes.scene import Scene
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.embedded.pretrain import Size

SIZES = (Size(100, 56), Size(44, 16), Size(64, 4))
"""Of SET responses, questions about an image, and texts to judge."""


def drawn_scenes(config: ConfigDict) -> PretrainDataset:
    """Returns both pretraining splits of EmoScenes, and draws them first if needed.

    Args:
      config: see `emor3_jax.config.base_policy`.
    """
    splits = ("pretrain", "shifted_pretrain")
    built = builder.prepare(config.data.folder, config.data.size, splits=splits)
    rows = [row for split in splits for row in builder.load(split, built.data_dir)]
    order = np.random.default_rng(config.seed).permutation(len(rows))[: config.data.limit]
    rows = [rows[i] for i in order]
    scenes = [Scene.from_json(bytes(row["scene"]).decode()) for row in rows]
    return PretrainDataset(
        images=[bytes(row["image"]) for row in rows],
        labels=[scene.label for scene in scenes],
        examples=lambda i, rng: tasks.scene_examples(scenes[i], rng),
        caption_prefix="",
        caption_targets={},
        corpus=tasks.text_corpus(),
        sizes=SIZES,
        held_out=256,
        settings=InferenceSettings(
            LABEL_SETS["mikels8"], QUESTION, PromptTemplates.load("tiny", "tiny", "tiny"), (), 64
        ),
    )
