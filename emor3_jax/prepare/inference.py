"""From a run's config and data to what its policy is asked later (`data.inference_settings`)."""

import collections
import itertools

from ml_collections import ConfigDict

from emor3_jax.data.inference_settings import QUESTION, InferenceSettings
from emor3_jax.data.sources import Source
from emor3_jax.embedded.emoscenes.words import QUESTION as SCENES_QUESTION
from emor3_jax.prepare.data import load_templates, train_labels
from emor3_jax.prepare.profile import listed_labels, resizes_twice

_ROWS = 1000
"""Rows whose questions are compared."""


def inference_settings(
    config: ConfigDict, labels: tuple[str, ...] = (), source: Source | None = None
) -> InferenceSettings:
    """Returns labels, question, templates, length and first resize with which a policy was trained.

    Args:
      config: of the run.
      labels: of the training data; () reads them from the config alone.
      source: the training rows, of whose questions the most frequent one is taken; None takes that
        of the config.
    """
    labels = labels or train_labels(config)
    own = SCENES_QUESTION if config.data.train.kind == "emoscenes" else QUESTION
    question = config.data.train.question or own
    if source is not None:
        first = itertools.islice(source.texts(), _ROWS)
        asked = collections.Counter(texts.question for texts in first if texts.question)
        question = asked.most_common(1)[0][0] if asked else question
    limits = config.data.min_pixels, config.data.max_pixels
    return InferenceSettings(
        labels,
        question,
        load_templates(config),
        listed_labels(config, labels),
        config.rollout.max_tokens,
        limits if resizes_twice(config) and any(limits) else None,
    )
