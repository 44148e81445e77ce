"""What a base policy is taught, by kind of data: pictures, their labels, and tasks about them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from emor3_jax.data.labels import normalize
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.data.sources import ParquetSource
from emor3_jax.embedded import faces, tasks
from emor3_jax.embedded.emoscenes import builder
from emor3_jax.embedded.emoscenes.scene import Scene
from emor3_jax.embedded.pretrain import Size
from emor3_jax.embedded.tasks import Task


class Course(NamedTuple):
    """What a base policy is trained on.

    Attributes:
      images: random access source of encoded images.
      labels: the emotion of each.
      tasks: (row, rng) -> the five tasks about that image.
      opening: the words that every description begins with, whatever the image; may be empty.
      sights: how it goes on after them and a space, by label, each with another first word; empty
        where a policy that looks is to predict labels alone.
      corpus: texts for the tokenizer.
      sizes: of the lessons: SET responses, other questions about an image, texts to judge.
      held_out: how many rows at the end are kept for the report.
    """

    images: Sequence[bytes]
    labels: Sequence[str]
    tasks: Callable[[int, np.random.Generator], list[Task]]
    opening: str
    sights: Mapping[str, str]
    corpus: list[str]
    sizes: tuple[Size, Size, Size]
    held_out: int


def emoscenes(config: ConfigDict) -> Course:
    """Returns the course on both pretraining splits of EmoScenes, drawing them first if needed."""
    built = builder.prepare(config.data.folder, config.data.size)
    rows = [
        row
        for split in ("pretrain", "shifted_pretrain")
        for row in builder.load(split, built.data_dir)
    ]
    order = np.random.default_rng(config.seed).permutation(len(rows))[: config.data.limit]
    rows = [rows[i] for i in order]
    scenes = [Scene.from_json(bytes(row["scene"]).decode()) for row in rows]
    return Course(
        images=[bytes(row["image"]) for row in rows],
        labels=[scene.label for scene in scenes],
        tasks=lambda i, rng: tasks.tasks(scenes[i], rng),
        opening="",
        sights={},
        corpus=tasks.text_corpus(),
        sizes=(Size(100, 56), Size(44, 16), Size(64, 4)),
        held_out=256,
    )


def labelled_faces(config: ConfigDict) -> Course:
    """Returns the course on labelled faces, such as FER-2013's, from parquet files."""
    source = ParquetSource(config.data.path)
    order = np.random.default_rng(config.seed).permutation(len(source))[: config.data.limit]
    rows = [source[int(i)] for i in order]
    rows = [row for row in rows if normalize(row.texts.answer or "") in faces.LABELS]
    labels = [normalize(row.texts.answer) for row in rows]
    templates = PromptTemplates.load(set="tiny", coherence="tiny", consistency="tiny")
    questions = sorted({row.texts.question for row in rows})

    def about(i: int, rng: np.random.Generator) -> list[Task]:
        return faces.tasks(labels[i], rows[i].texts.question, templates, rng)

    return Course(
        images=[row.images[0] for row in rows],
        labels=labels,
        tasks=about,
        opening=faces.OPENING,
        sights=faces.BROWS,
        corpus=faces.corpus(questions, templates),
        sizes=(Size(152, 64), Size(44, 20), Size(72, 4)),
        held_out=1024,
    )


COURSES: dict[str, Callable[[ConfigDict], Course]] = {
    "emoscenes": emoscenes,
    "faces": labelled_faces,
}
