"""Prepares what a base policy learns, in batches: pictures with lessons, or with labels to name."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from emor3_jax.data.prompts import IMAGE_TOKEN
from emor3_jax.embedded import pretrain
from emor3_jax.embedded.courses import Course
from emor3_jax.embedded.look import Looks
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
      names: int32[N], the first token of each picture's label; None if the policy does not learn to
        look.
      sights: int32[N, K], the first tokens with which a description of it may go on after the
        course's opening, or its label's where the course tells none; None likewise.
      strength: of `warp`; 0 leaves pictures as they are.
      hide: chance of a picture that is looked at to be partly hidden, as of `erase`.
    """

    course: Course
    processor: Processor
    shapes: Config
    pictures: Pictures
    names: np.ndarray | None
    sights: np.ndarray | None
    strength: float
    hide: float

    @classmethod
    def of(
        cls,
        course: Course,
        processor: Processor,
        shapes: Config,
        names: dict[str, int],
        *,
        strength: float = 0.0,
        hide: float = 0.0,
    ) -> "Teacher":
        """Reads the pictures of a course.

        Args:
          course, processor, shapes, strength, hide: see the attributes.
          names: the first token of each label; empty if the policy does not learn to look.

        Raises:
          ImageError: if a picture cannot be decoded or is of another shape than the first.
        """
        tokens = sights = None
        if names:
            tokens = np.asarray([names[label] for label in course.labels], np.int32)
            seen = _sights(course, processor) or {label: [name] for label, name in names.items()}
            sights = np.asarray([seen[label] for label in course.labels], np.int32)
        pictures = read_pictures(course.images, processor, shapes.vision)
        return cls(course, processor, shapes, pictures, tokens, sights, strength, hide)

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
            rng = np.random.default_rng((seed, count))
            yield self._look(rows, rng, _key(seed, count), self.hide)

    def held_out_looks(self, batch: int) -> Iterator[Looks]:
        """Returns batches of the rows that were held out, the last one smaller."""
        rng = np.random.default_rng(0)
        for rows in self._held_out(batch):
            yield self._look(rows, rng)

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

    def _look(
        self,
        rows: np.ndarray,
        rng: np.random.Generator,
        key: jax.Array | None = None,
        hide: float = 0.0,
    ) -> Looks:
        sights = self.sights[rows, rng.integers(self.sights.shape[1], size=len(rows))]
        return Looks(self._take(rows, key, hide), np.stack([self.names[rows], sights], axis=1))

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
        names = None if self.names is None else self.names[rows]
        return Lessons(self._take(rows, key, 0.0), *groups, names)


def _sights(course: Course, processor: Processor) -> dict[str, list[int]]:
    """Returns the first tokens with which a description may go on, by label."""

    def tokens(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    at = len(tokens(course.opening))
    return {
        label: [tokens(f"{course.opening} {sight}")[at] for sight in sights]
        for label, sights in course.sights.items()
    }


def _key(seed: int, count: int) -> jax.Array:
    """Returns the key of what changes in one batch."""
    return jax.random.fold_in(jax.random.key(seed), count)
