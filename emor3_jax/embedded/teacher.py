"""Prepares what a base policy learns, in batches: pictures with lessons, or with labels to name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from emor3_jax.data.prompts import IMAGE_TOKEN
from emor3_jax.embedded import pretrain
from emor3_jax.embedded.courses import Course
from emor3_jax.embedded.look import Looks
from emor3_jax.embedded.warp import warp
from emor3_jax.models.qwen2_5_vl import layout
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import Images, Prompt
from emor3_jax.models.qwen2_5_vl.processor import Processor, decode


class Lessons(NamedTuple):
    """One batch: images, the three lessons about them, and the tokens to name them by, if any."""

    images: Images
    responses: pretrain.Lesson
    questions: pretrain.Lesson
    texts: pretrain.Lesson
    names: np.ndarray | None


class Teacher(NamedTuple):
    """Prepares what is learned: pictures of a course in window layout, with lessons or labels.

    Attributes:
      course: the pictures and tasks.
      processor: of the policy.
      shapes: of the policy.
      names: the first token of each label; empty if the policy does not learn to look.
      strength: of `warp`; 0 leaves pictures as they are.
    """

    course: Course
    processor: Processor
    shapes: Config
    names: dict[str, int]
    strength: float

    def lesson(
        self, row: int, rng: np.random.Generator
    ) -> tuple[layout.WindowLayout, tuple[pretrain.Lesson, ...], int | None]:
        """Returns one picture in window layout, its lessons and the token to name, if any."""
        found = self.course.tasks(row, rng)
        kinds = (
            [t for t in found if t.kind == "set"],
            [t for t in found if t.with_image and t.kind != "set"],
            [t for t in found if not t.with_image],
        )
        lessons = tuple(
            pretrain.make_lesson(self.processor.tokenizer, group, size)
            for group, size in zip(kinds, self.course.sizes, strict=True)
        )
        name = self.names[self.course.labels[row]] if self.names else None
        return self._picture(row, rng), lessons, name

    def look(self, row: int, rng: np.random.Generator) -> tuple[layout.WindowLayout, int]:
        """Returns one picture in window layout and the token to name."""
        return self._picture(row, rng), self.names[self.course.labels[row]]

    def frame(self) -> pretrain.Frame:
        """Returns the constant prefixes of lessons."""
        return pretrain.make_frame(self.processor.tokenizer, *self._grid(), self.shapes)

    def bare_prompt(self) -> Prompt:
        """Returns `<|vision_start|>`, the image and `<|vision_end|>`, B = 1."""
        grid, slots = self._grid()
        text = "<|vision_start|>" + IMAGE_TOKEN * len(slots) + "<|vision_end|>"
        tokens = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return pretrain.make_prompt(tokens, grid, slots, self.shapes)[0]

    def _grid(self) -> tuple[tuple[int, int, int], np.ndarray]:
        """Returns grid and slots of the first picture; all are of one size."""
        patches, grid = self.processor.patches(self.course.images[0])
        return grid, layout.window_layout(patches, grid, self.shapes.vision).slot_of_token

    def _picture(self, row: int, rng: np.random.Generator) -> layout.WindowLayout:
        picture = decode(self.course.images[row])
        if self.strength > 0 and row < self.learned:
            picture = warp(picture, self.strength, rng)
        patches, grid = self.processor.patches(picture)
        return layout.window_layout(patches, grid, self.shapes.vision)

    @property
    def learned(self) -> int:
        """How many rows are learned from; those after are held out, and never warped."""
        return len(self.course.images) - self.course.held_out

    def batches(self, make: Callable, stack: Callable, batch: int, seed: int) -> Iterator[Any]:
        """Returns endless batches, prepared in threads while the policy trains."""
        dataset = grain.MapDataset.range(self.learned).seed(seed).shuffle().repeat()
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch)
        rows = dataset.random_map(make).to_iter_dataset(options)
        return iter(rows.batch(batch, batch_fn=stack))

    def held_out(self, make: Callable, stack: Callable, batch: int, seed: int) -> Iterator[Any]:
        """Returns batches of the rows that were held out, the last one smaller."""
        rng = np.random.default_rng(seed)
        for start in range(self.learned, len(self.course.images), batch):
            rows = range(start, min(start + batch, len(self.course.images)))
            yield stack([make(row, rng) for row in rows])


def stack_lessons(
    rows: Sequence[tuple[layout.WindowLayout, tuple[pretrain.Lesson, ...], int | None]],
) -> Lessons:
    """Returns a batch of `Teacher.lesson`."""
    images, lessons, names = zip(*rows, strict=True)
    groups = (jax.tree.map(lambda *x: np.stack(x), *group) for group in zip(*lessons, strict=True))
    stacked = None if None in names else np.asarray(names, np.int32)
    return Lessons(layout.pad_images(images, len(images[0].mask)), *groups, stacked)


def stack_looks(rows: Sequence[tuple[layout.WindowLayout, int]]) -> Looks:
    """Returns a batch of `Teacher.look`."""
    images = layout.pad_images([image for image, _ in rows], len(rows[0][0].mask))
    return Looks(images, np.asarray([token for _, token in rows], np.int32))
