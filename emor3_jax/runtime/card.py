"""The model card of a run's policy, from its config, data and results."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from emor3_jax.config import EMBEDDED, default
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io.card import DescribedSet, Provenance, model_card, snippet
from emor3_jax.io.fields import fields_of
from emor3_jax.models import is_hub_id
from emor3_jax.prepare import judge_names
from emor3_jax.prepare.data import data_sets

Results = tuple[Mapping[str, Evaluation], Mapping[str, Evaluation]]

_LEFT_OUT = (
    *("log.", "checkpoint.", "guard.", "mesh.", "data.train.", "data.mix.", "evaluate.sets."),
    *("data.folder", "data.workers", "data.read_ahead", "policy.path", "policy.embedded_folder"),
    *("reward.table_cache",),
)
"""Beginnings of settings that change no result, or that stand elsewhere in the card."""


def card_of_run(
    name: str,
    program: str,
    config: ConfigDict,
    family: str,
    step: int,
    settings: InferenceSettings,
    rows: Mapping[str, int] | None = None,
    results: Results | None = None,
) -> str:
    """Returns the model card of a run's policy, without any path of this machine.

    Args:
      name: of the policy.
      program: "train" or "sft"; "" if it is not known.
      config: of the run.
      family: model type of the policy.
      step: of its parameters.
      settings: what it is asked.
      rows: name of a data set → its rows, as far as they are known.
      results: evaluations before and after; None if it was not evaluated at this step.
    """
    base = config.policy.path
    is_id = base != EMBEDDED and is_hub_id(base) and not Path(base).exists()
    named = "the embedded base policy" if base == EMBEDDED else _without_folder(base)
    described = [
        DescribedSet(
            where,
            each.kind,
            each.split or "–",
            each.labels or "of the data",
            (rows or {}).get(where, "–"),
        )
        for where, (_, each) in data_sets(config).items()
    ]
    return model_card(
        name,
        Provenance(family, program, step, config.steps, named, is_id),
        described,
        list(_changed(config)),
        _judges(config, program),
        results,
        snippet(name, "photo.jpg", settings.prompt, settings.max_tokens),
    )


def _judges(config: ConfigDict, program: str) -> tuple[str, str]:
    """Returns who was asked for reflections in training and in evaluation."""
    told = {"policy": "the policy itself", "reference": "the policy that it started from"}
    training, evaluation = (told.get(x, _without_folder(x)) for x in judge_names(config))
    if program == "sft" or not config.reflect.enabled:
        training = "nobody"
    if not (config.reflect.enabled or config.evaluate.reflect):
        evaluation = "nobody"
    return training, evaluation


def _changed(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields the settings that are not the defaults; of a file its name alone."""
    usual = dict(fields_of(json.loads(default().to_json_best_effort())))
    for field, value in fields_of(json.loads(config.to_json_best_effort())):
        if field in usual and value == usual[field]:
            continue
        if not field.startswith(_LEFT_OUT):
            shown = _without_folder(value) if isinstance(value, str) else value
            yield field, json.dumps(shown, ensure_ascii=False)


def _without_folder(name: str) -> str:
    """Returns the last part of a path; an id on the hub, and any other text, as it is."""
    is_path = "/" in name and (os.path.exists(name) or not is_hub_id(name))
    return Path(name).name if is_path else name
