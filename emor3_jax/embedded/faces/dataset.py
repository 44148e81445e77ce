"""Labelled faces as pretraining data of the base policy."""

import collections

import numpy as np
from ml_collections import ConfigDict

from emor3_jax.data.inference_settings import QUESTION, InferenceSettings
from emor3_jax.data.labels import normalize
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.data.sources import ParquetSource
from emor3_jax.embedded.dataset import PretrainDataset
from emor3_jax.embedded.faces import tasks
from emor3_jax.embedded.pretrain import Size
from emor3_jax.embedded.tasks import QAExample


def labelled_faces(config: ConfigDict) -> PretrainDataset:
    """Returns labelled faces, such as FER-2013's, from parquet files.

    Args:
      config: see `emor3_jax.config.base_policy`.

    Raises:
      DataError: if the files cannot be read.
    """
    source = ParquetSource(config.data.path)
    order = np.random.default_rng(config.seed).permutation(len(source))[: config.data.limit]
    rows = [source[int(i)] for i in order]
    rows = [row for row in rows if row.images and row.images[0] is not None]
    rows = [row for row in rows if normalize(row.texts.answer or "") in tasks.LABELS]
    labels = [normalize(row.texts.answer) for row in rows]
    templates = PromptTemplates.load(set="tiny", coherence="tiny", consistency="tiny")
    counts = collections.Counter(row.texts.question for row in rows)
    questions = sorted(counts)
    asked = next((question for question, _ in counts.most_common(1)), QUESTION)

    def examples(i: int, rng: np.random.Generator) -> list[QAExample]:
        return tasks.face_examples(labels[i], rows[i].texts.question, templates, rng)

    return PretrainDataset(
        images=[row.images[0] for row in rows],
        labels=labels,
        examples=examples,
        caption_prefix=tasks.CAPTION_PREFIX,
        caption_targets=tasks.BROWS,
        corpus=tasks.corpus(questions, templates),
        sizes=(Size(152, 64), Size(44, 20), Size(72, 4)),
        held_out=1024,
        settings=InferenceSettings(tasks.LABELS, asked, templates, (), 64),
    )
