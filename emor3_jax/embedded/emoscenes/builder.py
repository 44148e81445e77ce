"""EmoScenes as a tfds dataset in array_record files, built and read without TensorFlow.

Every split is drawn from a seed; no image (cues and layout) is in two splits.
"""

import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from emor3_jax.data.datasets.base import LocalDatasetInfo, quiet
from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes.draw import MAX_SIZE, MIN_SIZE, draw

logger = logging.getLogger(__name__)

STYLE_OF_SPLIT = {
    "pretrain": "drawn",
    "train": "drawn",
    "validation": "drawn",
    "test": "drawn",
    "shifted_pretrain": "shifted",
    "shifted_test": "shifted",
}
DEMO_COUNTS = {
    "pretrain": 6000,
    "train": 3000,
    "validation": 400,
    "test": 800,
    "shifted_pretrain": 1200,
    "shifted_test": 600,
}


@dataclasses.dataclass(eq=False)
class EmoScenesConfig(tfds.core.BuilderConfig):
    """The EmoScenes to draw.

    Attributes:
      size: pixels a side, 112 to 224.
      counts: images of each split; a split left out is not drawn.
      seed: another seed draws other images.
      splits: of `counts`, those that are drawn; the others are only kept free of their images. None
        draws all.
    """

    name: str = ""
    size: int = 112
    counts: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict(DEMO_COUNTS))
    seed: int = 0
    splits: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size is {self.size}; it must be in [{MIN_SIZE}, {MAX_SIZE}] pixels")
        for split, count in self.counts.items():
            if split not in STYLE_OF_SPLIT:
                raise ValueError(
                    f"counts names the split {split!r}; EmoScenes has {', '.join(STYLE_OF_SPLIT)}"
                )
            if count < 1:
                raise ValueError(f"counts[{split!r}] is {count}; it must be at least 1")
        counts = "_".join(str(self.counts.get(split, 0)) for split in STYLE_OF_SPLIT)
        self.name = f"{self.size}px_seed{self.seed}_{counts}"
        if self.splits is not None:
            for split in self.splits:
                if split not in self.counts:
                    raise ValueError(f"splits names {split!r}; counts has {', '.join(self.counts)}")
            self.name += "".join(f"_{split}" for split in self.splits)


class EmoScenes(tfds.core.GeneratorBasedBuilder):
    """Drawn scenes, each with the emotion that it evokes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        return LocalDatasetInfo(
            builder=self,
            description="Small drawn scenes whose emotion is a documented sum of visible cues.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "label": tfds.features.Text(),
                    "scene": tfds.features.Text(),
                    "image_id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        config = self.builder_config
        sampled = sample_splits(config.counts, config.seed)
        wanted = sampled if config.splits is None else config.splits
        return {split: self._generate_examples(split, sampled[split]) for split in wanted}

    def _generate_examples(self, split: str, found: Sequence[scenes.Scene]) -> Iterator:
        for number, scene in enumerate(found):
            image_id = f"{split}_{number:06d}"
            yield (
                image_id,
                {
                    "image": io.BytesIO(encode(scene, self.builder_config.size)),
                    "label": scene.label,
                    "scene": scene.to_json(),
                    "image_id": image_id,
                },
            )


def encode(scene: scenes.Scene, size: int) -> bytes:
    """A scene as the bytes of a PNG file."""
    buffer = io.BytesIO()
    draw(scene, size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def sample_splits(counts: Mapping[str, int], seed: int) -> dict[str, list[scenes.Scene]]:
    """The scenes of every split that `counts` names; all images differ."""
    seen: set[tuple] = set()
    splits: dict[str, list[scenes.Scene]] = {}
    for number, (split, style) in enumerate(STYLE_OF_SPLIT.items()):
        rng = np.random.default_rng([seed, number])
        found: list[scenes.Scene] = []
        while len(found) < counts.get(split, 0):
            scene = scenes.sample(style, rng)
            if scene.key not in seen:
                seen.add(scene.key)
                found.append(scene)
        if found:
            splits[split] = found
    return splits


def prepare(
    data_dir: str | Path,
    size: int = 112,
    counts: Mapping[str, int] | None = None,
    seed: int = 0,
    splits: Sequence[str] | None = None,
) -> EmoScenes:
    """Draws the dataset below `data_dir`, or finds it there.

    Args:
      data_dir: folder of tfds datasets; made where it is missing.
      size: pixels a side, 112 to 224.
      counts: images by split, by default `DEMO_COUNTS`.
      seed: another seed draws other images.
      splits: those to draw, each with the images that it has where all are drawn; None for all.

    Raises:
      ValueError: a split is unknown, a count below 1 or the size out of range.
    """
    chosen = None if splits is None else tuple(splits)
    config = EmoScenesConfig(
        size=size, counts=dict(counts or DEMO_COUNTS), seed=seed, splits=chosen
    )
    builder = EmoScenes(config=config, data_dir=str(data_dir), file_format="array_record")
    if not Path(builder.data_dir).is_dir():
        logger.warning("EmoScenes: drawing, once, images into %s", builder.data_dir)
    with quiet():
        builder.download_and_prepare()
    return builder


def load(split: str, data_dir: str | Path) -> Sequence[dict[str, Any]]:
    """Opens one split of the dataset that `prepare` drew.

    Args:
      split: one of `STYLE_OF_SPLIT`.
      data_dir: the folder given to `prepare`, or the folder of one version of the dataset in it
        where several are there.

    Returns:
      A random access source of {"image", "label", "scene", "image_id"}, all bytes: the image as a
      PNG file, the texts in UTF-8; `Scene.from_json` reads a scene.

    Raises:
      FileNotFoundError: no dataset, or several, below `data_dir`.
      ValueError: the dataset has no such split.
    """
    found = sorted(p.parent for p in Path(data_dir).glob("**/dataset_info.json"))
    found = [p for p in found if not p.name.startswith("incomplete.")]
    if len(found) != 1:
        there = ", ".join(map(str, found)) or "none"
        raise FileNotFoundError(
            f"{data_dir} must hold one EmoScenes dataset, found {there}; draw it with "
            "emor3_jax.embedded.emoscenes.builder.prepare, or give the folder of one"
        )
    builder = tfds.builder_from_directory(found[0])
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"no split {split!r} in {found[0]}; it has {known}")
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
