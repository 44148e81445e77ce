"""The arrays that flow between rollout, rewards, learner and evaluation.

Every leaf of a batch starts with its `B` prompts, so that any row operation is one `jax.tree.map`
(`take`, `split`, `join`). Shapes use the project's letters: `B` prompts, `G` responses to
each, `P` prompt tokens, `T` response tokens, `I` images of a prompt, `W` attention windows of an
image, `L` patches of a window, `K` labels.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.parallel.program import by_prompts, laid_out

Array = jax.Array | np.ndarray

NOTHING_TO_JUDGE = -3
"""`Scores.inferred` of a response without a text for the coherence question, or not asked."""


class Images(NamedTuple):
    """Images cut into patches, the patches grouped by attention window and padded to `L` slots.

    The patches that the merger joins are neighbours (`slot // merge_unit` is one merged slot), and
    a window holds `L = (window_size / patch_size) ** 2` patches. Padding slots have `mask` False.

    Attributes:
      patches: float[B, I, W, L, C], as the image processor of transformers flattens a patch
        (channel, time, row, column); of still images one frame alone, C = 3 * patch_size**2, in
        the type of the policy's arithmetic.
      coords: int32[B, I, W, L, 2], row and column of the patch in its image.
      mask: bool[B, I, W, L], True where a patch is real.
    """

    patches: Array
    coords: Array
    mask: Array


class Prompt(NamedTuple):
    """Prompt tokens, right padded, with their positions and image slots precomputed.

    Attributes:
      tokens: int32[B, P].
      positions: int32[B, P, 3], rope positions (temporal, height, width).
      mask: bool[B, P].
      image_slots: int32[B, P], for an image token the index of its feature among the merged slots
        of its own prompt, flattened over [I, W * L / merge_unit]; -1 for a text token.
    """

    tokens: Array
    positions: Array
    mask: Array
    image_slots: Array


class ImagePrefix(NamedTuple):
    """What questions about an image begin with, as a judge of other tokens or images reads it.

    Attributes:
      prompt: system turn and image, all their tokens, [B, P].
      images: one image a prompt, [B, 1, W, L].
      shared_length: int32[B], the number of these tokens.
      shared_position: int32[B], the rope position that follows them.
    """

    prompt: Prompt
    images: Images
    shared_length: Array
    shared_position: Array


class Batch(NamedTuple):
    """The rows that one step reads.

    Attributes:
      prompt: all tokens of each prompt but the last, [B, P].
      last_token: int32[B], the last token of each prompt, from which a response is sampled.
      next_position: int32[B], its rope position.
      images: one image a prompt, [B, 1, W, L].
      shared_length: int32[B], leading tokens, system turn and image, that the consistency question
        has in common with the prompt.
      shared_position: int32[B], the rope position that follows them.
      answers: int32[B], index of the label.
      grades: float32[B, K], the accuracy of each label as an answer: 1 for the row's label and 0
        for the others, or its share among raters over the largest share (soft labels).
      weight: float32[B], 1; 0 for a row that only fills the last batch of an evaluation.
      judge_prefix: the image as a judge reads it; None where all read the same prompts.
    """

    prompt: Prompt
    last_token: Array
    next_position: Array
    images: Images
    shared_length: Array
    shared_position: Array
    answers: Array
    grades: Array
    weight: Array
    judge_prefix: ImagePrefix | None = None

    @property
    def seen_by_judge(self) -> "Batch | ImagePrefix":
        """What a judge reads before a question about the image."""
        return self if self.judge_prefix is None else self.judge_prefix


class Samples(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: int32[B, G, T], 0 after the end.
      logprobs: float32[B, G, T], under the sampler's distribution, 0 after the end.
      lengths: int32[B, G], the end-of-sequence token included.
      ended: bool[B, G], False where the response was cut at T tokens.
    """

    tokens: Array
    logprobs: Array
    lengths: Array
    ended: Array

    @property
    def mask(self) -> jax.Array:
        """bool[B, G, T], True for the tokens that were generated."""
        return jnp.arange(self.tokens.shape[-1]) < self.lengths[..., None]

    def cut(self, size: int) -> "Samples":
        """Returns the samples with T cut to `size`, at least the length of the longest."""
        return self._replace(tokens=self.tokens[..., :size], logprobs=self.logprobs[..., :size])


class Replies(NamedTuple):
    """Sampled reflections: the policy's replies to the questions about its own responses.

    Each field is a dict by the name of the question.

    Attributes:
      samples: the replies, [B, G, R].
      found: bool[B, G], True where there was a text to judge.
      lengths: int32[B, G], tokens of that text.
    """

    samples: dict[str, Samples]
    found: dict[str, Array]
    lengths: dict[str, Array]


class ReplyProbs(NamedTuple):
    """Reflection probabilities, instead of sampled reflections.

    Each field is a dict by the name of the question.

    Attributes:
      probs: float32[B, G, K'], probability of each meaning among all: the labels of coherence, yes
        and no of consistency.
      found: bool[B, G], True where there was a text to judge.
      lengths: int32[B, G], tokens of that text.
    """

    probs: dict[str, Array]
    found: dict[str, Array]
    lengths: dict[str, Array]


class Scores(NamedTuple):
    """Scores of responses, float32[B, G] each but for `answer` and `inferred`.

    Attributes:
      overall, format, accuracy: in [0, 1] (release: overall up to 1.1); accuracy is graded where
        the data set has soft labels (`Batch.grades`).
      reflections: name of a question → score in [0, 1]; where none is asked 0 (paper) or 1
        (release).
      answer: int32[B, G], index of the boxed label, -1 where there is none.
      inferred: int32[B, G], index of the label that the policy inferred from s1..s2, negative
        where the reply was no label, `NOTHING_TO_JUDGE` where it was not asked.
      terms: name → custom reward terms before their weights.
    """

    overall: Array
    format: Array
    accuracy: Array
    reflections: dict[str, Array]
    answer: Array
    inferred: Array
    terms: dict[str, Array]

    def named(self) -> dict[str, Array]:
        """Returns the scores by name, reflections and custom reward terms among them."""
        names = ("overall", "format", "accuracy")
        return {name: getattr(self, name) for name in names} | self.reflections | self.terms


class Packing(NamedTuple):
    """Positions of the response tokens of a micro-batch, [B, G, T], in R rows of C columns.

    Each group has such rows, or with N < B every B / N consecutive groups have some together.

    Attributes:
      source: int32[N, R, C], index of the token, counted over [B / N * G * T]; -1 for none.
      place: int32[B, G], index of the first token of each response, counted over [R * C].
    """

    source: Array
    place: Array


class Experience(NamedTuple):
    """A batch with all that a step finds out about it; what is not there yet is None.

    Attributes:
      batch: the prompts on the devices; None in what the log of a step keeps.
      samples: their responses, [B, G, T].
      replies: the reflections; None without reflection.
      scores: of the responses; None for given responses (supervised fine-tuning), as `rewards`.
      rewards: float32[B, G], what advantages compare.
      greedy: float32[B, 1], the reward of a greedy response to each prompt (ReMax).
      old_logprobs: float32[B, G, T], recomputed under the policy that sampled.
      ref_logprobs: float32[B, G, T], under the reference.
      advantages: float32[B, G].
      entropies: float32[B, G, T], of the distributions that tokens were drawn from, recomputed.
    """

    batch: Batch | None
    samples: Samples
    replies: Replies | ReplyProbs | None
    scores: Scores | None
    rewards: Array | None
    greedy: Array | None = None
    old_logprobs: Array | None = None
    ref_logprobs: Array | None = None
    advantages: Array | None = None
    entropies: Array | None = None


class Observed(NamedTuple):
    """Arrays of a step that each host reads, asked for before the device updates.

    Attributes:
      ids: of the prompts of all hosts.
      batch: this host's prompts, as host arrays.
      experience: samples, replies, scores and advantages of all hosts, without log-probabilities.
      answers: int32[B], index of the label, of all hosts.
      rewards: float32[B, G], of all hosts; None without scores.
    """

    ids: tuple[str, ...]
    batch: Batch
    experience: Experience
    answers: Array
    rewards: Array | None

    @property
    def lengths(self) -> np.ndarray:
        """int32[B, G], of the responses."""
        return jax.device_get(self.experience.samples.lengths)


class Clock(Protocol):
    """Measures the phases of a step, see `io.metrics.PhaseClock`."""

    def mark(self, phase: str, arrays: Any) -> None:
        """Marks the arrays with which a phase ends."""


class NoClock:
    """Measures nothing."""

    def mark(self, phase: str, arrays: Any) -> None:
        """Ignores the end of a phase."""


def bucket(size: int, sizes: Sequence[int]) -> int:
    """Returns the smallest of rising `sizes` that holds `size`, the last one if none does."""
    return next((s for s in sizes if size <= s), sizes[-1])


def take(tree: Any, rows: Array) -> Any:
    """Returns any rows of arrays.

    Args:
      tree: pytree of arrays, [B, …] each.
      rows: int32[R].

    Raises:
      ValueError: if rows are no integers.
    """
    return take_rows(tree, _as_rows(rows))


def split(tree: Any, count: int) -> list[Any]:
    """Splits arrays into equal parts: rows `i, count + i, …` make part `i`.

    Each device takes from its own rows, so a batch that is sharded over devices stays in place.

    Args:
      tree: pytree of arrays, [B, …] each.
      count: number of parts; must divide B.

    Raises:
      ValueError: if it does not.
    """
    return list(iterate_parts(tree, count))


def iterate_parts(tree: Any, count: int) -> Iterator[Any]:
    """Yields the parts of `split`, each made when it is asked for."""
    rows = len(jax.tree.leaves(tree)[0])
    if count < 1 or rows % count:
        raise ValueError(f"count={count}: must be at least 1 and divide the {rows} rows")
    if count == 1:
        yield tree
        return
    for part in range(count):
        yield take_part(tree, np.int32(part), count=count)


def stack_parts(tree: Any, count: int) -> Any:
    """Returns the parts of `split` stacked, [count, B / count, …], inside a jitted program."""

    def stack(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(stack, tree)


def join(trees: list[Any], rows: Array) -> Any:
    """Returns rows of several trees of arrays, counted through all of them.

    Args:
      trees: at least one.
      rows: int32[R].

    Raises:
      ValueError: if there is no tree, or rows are no integers.
    """
    if not trees:
        raise ValueError("trees=[]: give at least one")
    return join_rows(trees, _as_rows(rows))


def _as_rows(rows: Array) -> np.ndarray:
    found = np.asarray(rows)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"rows of type {found.dtype}: must be integers, the indices of rows")
    return found.astype(np.int32)


@jax.jit
@laid_out(by_prompts)
def take_rows(tree: Any, rows: jax.Array) -> Any:
    """`take` of rows int32[R], jitted."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)


@partial(jax.jit, static_argnames="count")
@laid_out(by_prompts)
def take_part(tree: Any, part: jax.Array, *, count: int) -> Any:
    """One part of `split`, jitted."""

    def every(x: jax.Array) -> jax.Array:
        parts = jnp.asarray(x).reshape(len(x) // count, count, *x.shape[1:])
        return jnp.take(parts, part, axis=1)

    return jax.tree.map(every, tree)


@jax.jit
@laid_out(by_prompts)
def join_rows(trees: list[Any], rows: jax.Array) -> Any:
    """`join` of rows int32[R], jitted."""
    return jax.tree.map(lambda *x: jnp.concatenate(x)[rows], *trees)
