"""From a config to data sets and batches."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import label_map, label_set, spellings
from emor3_jax.data.pipeline import (
    BatchSpec,
    EvalBatches,
    Parts,
    TrainBatches,
    eval_batches,
    train_batches,
)
from emor3_jax.data.prompts import PromptTemplates, opened_tag
from emor3_jax.data.sources import Source, expand_files
from emor3_jax.data.views import SUBSETS, Joined, Relabelled, Subset, read_ids
from emor3_jax.files import expand_user
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.processor import Processor
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import host_rows
from emor3_jax.prepare.judge import JudgeProcessors, make_prefix_encoder
from emor3_jax.prepare.profile import drops_last_batch, template_names
from emor3_jax.prepare.responses import Responses
from emor3_jax.prepare.sources import SOURCES, SourceContext, check_kind

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """The data of a run.

    Attributes:
      train: endless batches.
      evaluate: name → batches, in the config's order.
      labels: "train" and each name → label set.
      sources: likewise → rows.
      responses: to learn from, of the training rows; None where the run samples its own.
    """

    train: TrainBatches
    evaluate: dict[str, EvalBatches]
    labels: dict[str, tuple[str, ...]]
    sources: dict[str, Source]
    responses: Responses | None = None

    def counters(self) -> dict[str, float]:
        """Returns `data/<reason>`: training rows left out so far, for each reason that occurred."""
        counts = self.train.stats.counts() | {"question_cut": self.train.stats.questions_cut}
        return {f"data/{reason}": float(count) for reason, count in counts.items() if count}

    def image(self, name: str) -> Callable[[str], bytes | None]:
        """Returns a function from a row id of a data set to its encoded image."""

        def find(row_id: str) -> bytes | None:
            source = self.sources[name]
            return source[source.find(row_id)].images[0]

        return find


PARQUET_LABELS = "mikels8"
"""The labels of data that does not say them: EmoSet's, as the release trains on."""


def data_sets(config: ConfigDict) -> dict[str, tuple[str, ConfigDict]]:
    """Returns name → (field, data set) of all data sets of a config, "train" first.

    Those of `data.mix` are named "train.<name>", those of `evaluate.sets` by their own name.
    """
    found = {"train": ("data.train", config.data.train)}
    found |= {f"train.{name}": (f"data.mix.{name}", each) for name, each in config.data.mix.items()}
    sets = config.evaluate.sets
    return found | {name: (f"evaluate.sets.{name}", each) for name, each in sets.items()}


def open_own(config: ConfigDict, field: str, dataset: ConfigDict) -> Source:
    """Returns all rows of one data set in the labels that its files have.

    Args:
      config: of the run.
      field: where in the config the data set stands.
      dataset: its description.

    Raises:
      ConfigError, DataError: as `open_source`.
    """
    return _open(config, field, dataset)[0]


def _open(config: ConfigDict, field: str, dataset: ConfigDict) -> tuple[Source, str]:
    check_kind(field, dataset)
    wants_responses = config.sft.target == "response"
    run = SourceContext(field, config.data.folder, config.data.scene_size, wants_responses)
    return SOURCES[dataset.kind](dataset, run)


def open_source(
    config: ConfigDict, field: str, dataset: ConfigDict, labels: str = ""
) -> tuple[Source, str]:
    """Opens one data set: its rows in the wanted labels, all of them or a subset.

    Args:
      config: of the run.
      field: where in the config the data set stands.
      dataset: its description.
      labels: the label set to put it in instead of `dataset.labels`.

    Returns:
      The rows and their label set, as `label_set` takes it.

    Raises:
      ConfigError: if its kind is unknown, or its path or subset cannot be used.
      DataError: if it cannot be opened.
    """
    try:
        source, own = _open(config, field, dataset)
        wanted = labels or dataset.labels or own or PARQUET_LABELS
        if own and wanted != own:
            source = Relabelled(source, label_map(own, wanted))
        elif not own:
            # Labels that are texts may be spelt in any way.
            source = Relabelled(source, spellings(label_set(wanted)))
        if dataset.ids:
            source = Subset(source, read_ids(dataset.ids, source))
        if dataset.subset:
            texts, found = list(source.texts()), label_set(wanted)
            draw = SUBSETS[dataset.subset_mix]
            seed = config.seed if dataset.subset_seed < 0 else dataset.subset_seed
            source = Subset(source, draw(texts, found, dataset.subset, seed))
    except DataError as error:
        raise DataError(f"config.{field}: {error}") from error
    return source, wanted


def train_labels(config: ConfigDict) -> tuple[str, ...]:
    """Returns the labels of the training data by the config alone, without opening it."""
    return label_set(config.data.train.labels or PARQUET_LABELS)


def load_templates(config: ConfigDict) -> PromptTemplates:
    """Reads the prompt templates of a config."""
    return PromptTemplates.load(**template_names(config))


STATED_VALUES = ("valence", "arousal")
"""Numbers of rows (`Texts.values`) that a `set` template may ask for, in tags of their names."""


def stated_values(config: ConfigDict, source: Source) -> dict[str, dict[str, float]]:
    """Returns row id → name → true value, of the numbers that the `set` template asks for.

    Args:
      config: of the run.
      source: the rows.
    """
    template = load_templates(config).set
    asked = [name for name in STATED_VALUES if f"<{name}>" in template]
    if not asked:
        return {}
    found = {x.id: {k: v for k, v in x.values if k in asked} for x in source.texts()}
    return {row_id: values for row_id, values in found.items() if values}


def open_data(
    config: ConfigDict,
    policy: LoadedPolicy,
    mesh: Mesh | None = None,
    *,
    imitate: bool = False,
    judges: JudgeProcessors | None = None,
) -> Data:
    """Opens the training data and all evaluation sets.

    Args:
      config: of the run.
      policy: its processor shapes the batches.
      mesh: says which rows of each batch this host reads; None is all.
      imitate: supervised fine-tuning; with `sft.target="response"`, training rows without a
        response that can be learned are left out.
      judges: for whom images are encoded too, in training and in evaluation; None is nobody.

    Raises:
      ConfigError, DataError: naming the field or file, the value and the way out.
    """
    judges, template = judges or JudgeProcessors(), load_templates(config).set
    if tag := opened_tag(policy.processor.tokenizer):
        logger.warning(
            "the policy's chat template opens %s for each response: a response that begins there "
            "has no format score, and no reflection finds its steps; take a template without it "
            "(chat_template.jinja in the policy's folder)",
            tag,
        )
    sources, named = {}, {}
    # What is built is there for the other hosts.
    with hosts.first_goes_first():
        for name, (field, dataset) in data_sets(config).items():
            # What is mixed in answers in the labels of `data.train`.
            labels = named["train"] if name.startswith("train.") else ""
            sources[name], named[name] = open_source(config, field, dataset, labels)
    _warn_of_training_rows(config, sources)
    parts = _mix(config, sources)
    responses = Responses(config, policy) if imitate and config.sft.target == "response" else None
    labels = {name: label_set(named[name]) for name in sources}

    def rows(name: str) -> tuple:
        return sources[name], policy.processor, template, labels[name]

    def spec(prompts: int, dataset: ConfigDict, judge: Processor | None) -> BatchSpec:
        return BatchSpec(
            prompts,
            tuple(config.data.prompt_lengths),
            tuple(config.data.image_windows),
            workers=config.data.workers,
            host_rows=None if mesh is None else host_rows(mesh, prompts),
            graded=dataset.graded,
            cut_questions=config.data.long_prompts == "cut",
            read_ahead=config.data.read_ahead,
            prefixes=make_prefix_encoder(config, judge),
        )

    return Data(
        train_batches(
            *rows("train"),
            spec(config.rollout.prompts, config.data.train, judges.training)._replace(
                drop_last=drops_last_batch(config),
                learnable=None if responses is None else responses.read,
            ),
            seed=config.seed,
            parts=parts,
            sort_by_size=config.data.sort_by_size,
        ),
        {
            name: eval_batches(
                *rows(name),
                spec(config.evaluate.prompts, dataset, judges.evaluation),
                limit=dataset.limit,
            )
            for name, dataset in config.evaluate.sets.items()
        },
        labels,
        sources,
        responses,
    )


def _warn_of_training_rows(config: ConfigDict, sources: dict[str, Source]) -> None:
    """Says which evaluation sets hold rows of a training set, by files and ids.

    Equal images under other names are what `emor3_jax.inspect --leakage` looks for.
    """
    described = data_sets(config)
    for name, (field, dataset) in described.items():
        for trained, (where, training) in described.items():
            is_training = trained == "train" or trained.startswith("train.")
            if not is_training or field == where or not field.startswith("evaluate.sets."):
                continue
            if not _origin(dataset) & _origin(training):
                continue
            ids = {texts.id for texts in sources[trained].texts()}
            both = sum(texts.id in ids for texts in sources[name].texts())
            if both:
                logger.warning(
                    "config.%s: %d of %d rows are also rows of config.%s, so its scores are of "
                    "training images; choose another split, path or ids",
                    field,
                    both,
                    len(sources[name]),
                    where,
                )


def _origin(dataset: ConfigDict) -> set[tuple[str, str]]:
    """Returns the files or the folder of a data set, each with its kind."""
    path = dataset.path
    files = expand_files(path) if dataset.kind == "parquet" else [expand_user(path)]
    return {(dataset.kind, str(file.resolve())) for file in files}


def _mix(config: ConfigDict, sources: dict[str, Source]) -> Parts:
    """Joins the training sets into `sources["train"]`; returns how they take turns."""
    described = {"train": config.data.train, **config.data.mix}
    parts = {"train": sources["train"]}
    parts |= {name: sources.pop(f"train.{name}") for name in config.data.mix}
    if len(parts) > 1:
        sources["train"] = Joined(parts)
    starts = np.cumsum([0, *map(len, parts.values())])
    weights = [dataset.weight for dataset in described.values()]
    return Parts(starts, weights, [dataset.balance == "class" for dataset in described.values()])
