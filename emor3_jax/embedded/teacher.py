"""Prepares what a base policy learns, in batches: pictures with lessons, or with labels to name."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from emor3_jax.data.prompts import IMAGE_TOKEN
from emor3_jax.embedded import pretrain
from emor3_jax.embedded.courses import Course
from emor3_jax.embedded.look import Looks, first_tokens
from emor3_jax.embedded.pictures import Pictures, read_pictures, take
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.inputs import Images, Prompt
from emor3_jax.models.qwen2_5_vl.processor import Processor


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
      pictures: those of the course.
      names: int32[N, 2], the first tokens of each picture's label, and of how a description of it
        goes on after the course's opening (the label's again where the course tells none); None if
        the policy does not learn to look.
      strength: of `warp`; 0 leaves pictures as they are.
      hide: chance of a picture that is looked at to be partly hidden, as of `erase`.
    """

    course: Course
    processor: Processor
    shapes: Config
    pictures: Pictures
    names: np.ndarray | None
    strength: float
    hide: float

    @classmethod
    def of(
        cls,
        course: Course,
        processor: Processor,
        shapes: Config,
        *,
        looks: bool = False,
        strength: float = 0.0,
        hide: float = 0.0,
    ) -> "Teacher":
        """Reads the pictures of a course.

        Args:
          course, processor, shapes, strength, hide: see the attributes.
          looks: whether the policy learns to look.

        Raises:
          ImageError: if a picture cannot be decoded or is of another shape than the first.
          ValueError: if it looks, and two labels or two sights begin with the same token.
        """
        names = None
        if looks:
            labels = {label: label for label in course.labels}
            named = first_tokens(processor.tokenizer, labels)
            sights = {label: f" {sight}" for label, sight in course.sights.items()}
            begun = first_tokens(processor.tokenizer, sights) or named
            names = np.asarray([(named[label], begun[label]) for label in course.labels], np.int32)
        pictures = read_pictures(course.images, processor, shapes.vision)
        return cls(course, processor, shapes, pictures, names, strength, hide)

    def frame(self) -> pretrain.Frame:
        """Returns the constant prefixes of lessons."""
        return pretrain.make_frame(
            self.processor.tokenizer, self._grid, self.pictures.slots, self.shapes
        )

    def look_prompt(self) -> Prompt:
        """Returns `<|vision_start|>`, image, `<|vision_end|>` and the course's opening; B = 1."""
        slots = self.pictures.slots
        text = f"<|vision_start|>{IMAGE_TOKEN * len(slots)}<|vision_end|>{self.course.opening}"
        tokens = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return pretrain.make_prompt(tokens, self._grid, slots, self.shapes)[0]

    def look_prompts(self, seed: int) -> Iterator[Prompt]:
        """Returns `look_prompt` endlessly, with room for a question before the opening.

        The room is in the rope positions alone, and drawn anew each time.

        Args:
          seed: of the draws.
        """
        prompt = self.look_prompt()
        questions = (size.tokens - size.reply for size in self.course.sizes[:2])
        furthest = max(questions)
        rng = np.random.default_rng(seed)
        image_end = np.flatnonzero(prompt.image_slots[0] >= 0)[-1] + 1
        opened = np.arange(prompt.tokens.shape[1]) > image_end
        while True:
            room = np.where(opened, rng.integers(furthest), 0).astype(np.int32)
            yield prompt._replace(positions=prompt.positions + room[:, None])

    @property
    def learned(self) -> int:
        """How many rows are learned from; those after are held out, and never changed."""
        return len(self.course.images) - self.course.held_out

    def looks(self, batch: int, seed: int) -> Iterator[Looks]:
        """Returns endless batches of pictures and the tokens to name."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        # Batched before it is read: an element at a time, numbers take longer than their pictures.
        batches = self._rows(seed).batch(batch).to_iter_dataset(options)
        for count, rows in enumerate(batches):
            yield Looks(self._take(rows, _key(seed, count), self.hide), self.names[rows])

    def held_out_looks(self, batch: int) -> Iterator[Looks]:
        """Returns batches of the rows that were held out, the last one smaller."""
        for rows in self._held_out(batch):
            yield Looks(self._take(rows, None, 0.0), self.names[rows])

    def lessons(self, batch: int, seed: int) -> Iterator[Lessons]:
        """Returns endless batches; texts are drawn and tokenised in threads meanwhile."""
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch)

        def draw(row: int, rng: np.random.Generator) -> tuple[int, tuple[pretrain.Lesson, ...]]:
            return row, self._lesson(row, rng)

        drawn = self._rows(seed).random_map(draw).to_iter_dataset(options)
        for count, found in enumerate(drawn.batch(batch, batch_fn=list)):
            rows, lessons = zip(*found, strict=True)
            yield self._stack(np.asarray(rows), lessons, _key(seed, count))

    def held_out_lessons(self, batch: int, seed: int) -> Iterator[Lessons]:
        """Returns batches of the rows that were held out, the last one smaller."""
        rng = np.random.default_rng(seed)
        for rows in self._held_out(batch):
            yield self._stack(rows, [self._lesson(int(row), rng) for row in rows])

    @property
    def _grid(self) -> tuple[int, int, int]:
        return self.pictures.grid(self.processor.images)

    def _rows(self, seed: int) -> grain.MapDataset:
        return grain.MapDataset.range(self.learned).seed(seed).shuffle().repeat()

    def _held_out(self, batch: int) -> Iterator[np.ndarray]:
        for start in range(self.learned, len(self.course.images), batch):
            yield np.arange(start, min(start + batch, len(self.course.images)))

    def _take(self, rows: np.ndarray, key: jax.Array | None, hide: float) -> Images:
        settings = self.processor.images
        return take(self.pictures, rows, key, settings=settings, strength=self.strength, hide=hide)

    def _lesson(self, row: int, rng: np.random.Generator) -> tuple[pretrain.Lesson, ...]:
        """Returns the lessons about one picture: SET responses, questions about it, texts."""
        found = self.course.tasks(row, rng)
        kinds = (
            [t for t in found if t.kind == "set"],
            [t for t in found if t.with_image and t.kind != "set"],
            [t for t in found if not t.with_image],
        )
        return tuple(
            pretrain.make_lesson(self.processor.tokenizer, group, size)
            for group, size in zip(kinds, self.course.sizes, strict=True)
        )

    def _stack(
        self,
        rows: np.ndarray,
        lessons: Sequence[tuple[pretrain.Lesson, ...]],
        key: jax.Array | None = None,
    ) -> Lessons:
        groups = (
            jax.tree.map(lambda *x: np.stack(x), *group) for group in zip(*lessons, strict=True)
        )
        names = None if self.names is None else self.names[rows, 0]
        return Lessons(self._take(rows, key, 0.0), *groups, names)


def _key(seed: int, count: int) -> jax.Array:
    """Returns the key of what changes in one batch."""
    return jax.random.fold_in(jax.random.key(seed), count)
