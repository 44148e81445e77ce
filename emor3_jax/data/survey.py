"""Statistics of a data set as the pipeline will read it, without decoding any image.

Sizes come from the file headers, so damage behind a header shows only when an image is read.
Everything else follows the pipeline's own treatment of the rows.
"""

import collections
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageOps

from emor3_jax.data.encode import REASONS, Encoder, fault_of_images
from emor3_jax.data.labels import normalize
from emor3_jax.data.prompts import render_prompt
from emor3_jax.data.sources import Source, Texts, sizes_of
from emor3_jax.models.errors import ImageError
from emor3_jax.models.images import MOST_DECODED_PIXELS, open_image
from emor3_jax.models.processor import Processor

BARS = 8
"""Bars of a histogram, at most."""


class Survey(NamedTuple):
    """One data set.

    Attributes:
      name: of the data set.
      rows: all rows.
      labels: label → usable rows.
      left_out: reason → rows, of the reasons that occur.
      index: int64[n], the usable rows.
      sizes: int32[n, 2], height and width of their images in pixels.
      resized: int32[n, 2], the same as the policy sees them.
      image_tokens: int32[n].
      prompt_tokens: int32[n], of the whole prompt but its last token, as prompts are padded.
      windows: int32[n], attention windows of the image.
      questions: number of different questions.
      most_windows, most_tokens: of any row whose image can be read, also of those that are left out
        for their size; 0 where there is none.
    """

    name: str
    rows: int
    labels: dict[str, int]
    left_out: dict[str, int]
    index: np.ndarray
    sizes: np.ndarray
    resized: np.ndarray
    image_tokens: np.ndarray
    prompt_tokens: np.ndarray
    windows: np.ndarray
    questions: int
    most_windows: int
    most_tokens: int


def survey(
    source: Source,
    processor: Processor,
    encoder: Encoder,
    template: str,
    labels: Sequence[str],
    *,
    max_tokens: int,
    max_windows: int,
) -> Survey:
    """Counts a data set.

    Args:
      source: the rows.
      processor: of the policy.
      encoder: knows which rows the pipeline leaves out.
      template: the `set` template.
      labels: the label set.
      max_tokens: the largest of `data.prompt_lengths`.
      max_windows: the largest of `data.image_windows`.
    """
    left_out: collections.Counter[str] = collections.Counter()
    texts = list(source.texts())
    faults = [encoder.fault_of_texts(each) for each in texts]
    left_out.update(fault for fault in faults if fault)
    index = np.asarray([i for i, fault in enumerate(faults) if not fault], np.int64)
    sizes = sizes_of(source, index)
    lengths: dict[tuple, int] = {}
    kept, columns = [], []
    most_windows = most_tokens = 0
    for at, (row, (height, width)) in enumerate(zip(index, sizes, strict=True)):
        question = texts[row].question, texts[row].candidates
        if question not in lengths:
            # One image token stands for the image, and the last token is not padded.
            rendered = render_prompt(
                processor.tokenizer, template, question[0], question[1] or labels, 1
            )
            lengths[question] = len(rendered) - 2
        shape = _shape(int(height), int(width), encoder)
        if shape is None:
            left_out[fault_of_images(source[int(row)]) or "unreadable_image"] += 1
            continue
        resized, tokens, windows = shape
        prompt = lengths[question] + tokens
        most_windows, most_tokens = max(most_windows, windows), max(most_tokens, prompt)
        if windows > max_windows:
            left_out["large_image"] += 1
        elif prompt > max_tokens and not encoder.cuts:
            left_out["long_question"] += 1
        else:
            kept.append(at)
            columns.append((*resized, tokens, min(prompt, max_tokens), windows))
    found = np.asarray(columns, np.int32).reshape(-1, 5)
    names = {normalize(label): label for label in labels}
    counts = collections.Counter(names[normalize(texts[index[at]].answer)] for at in kept)
    return Survey(
        name=source.name,
        rows=len(texts),
        labels={label: counts[label] for label in labels},
        left_out={reason: left_out[reason] for reason in REASONS if left_out[reason]},
        index=index[kept],
        sizes=sizes[kept],
        resized=found[:, :2],
        image_tokens=found[:, 2],
        prompt_tokens=found[:, 3],
        windows=found[:, 4],
        questions=len(lengths),
        most_windows=most_windows,
        most_tokens=most_tokens,
    )


def _shape(height: int, width: int, encoder: Encoder) -> tuple[tuple[int, int], int, int] | None:
    """Returns resized height and width, image tokens and windows; None if there is no image."""
    try:
        return encoder.processor.read_sizes(height, width)
    except (ImageError, ZeroDivisionError):
        return None


class Relabelling(NamedTuple):
    """Rows of one label of the data.

    Attributes:
      own: the label as the data has it, "" where a row has none.
      label: the label of the set that stands for it; "" where none does and its rows are left out.
      rows: how many there are.
    """

    own: str
    label: str
    rows: int


def relabelling(
    own: Iterable[Texts], mapped: Iterable[Texts], labels: Sequence[str]
) -> list[Relabelling]:
    """Returns what each label of the data is called in a label set, with its rows.

    Args:
      own: the rows as the data has them.
      mapped: the same rows in the labels of the set.
      labels: the label set.

    Returns:
      In the order of the set, then by rows; those that are left out last.
    """
    names = {normalize(label): label for label in labels}
    counts = collections.Counter(
        (a.answer or "", names.get(normalize(b.answer or ""), ""))
        for a, b in zip(own, mapped, strict=True)
    )
    order = [*labels, ""]
    found = [Relabelling(*pair, rows) for pair, rows in counts.items()]
    return sorted(found, key=lambda x: (order.index(x.label), -x.rows, x.own))


def mapped_counts(
    published: Iterable[tuple[str, int]], found: Iterable[Relabelling]
) -> dict[str, int]:
    """Returns label of the set → published rows, of labels of the data that stand for it.

    Args:
      published: label of the data → rows.
      found: as `relabelling` returns it.
    """
    label_of = {normalize(each.own): each.label for each in found}
    counts: collections.Counter[str] = collections.Counter()
    for own, rows in published:
        if label := label_of.get(normalize(own)):
            counts[label] += rows
    return dict(counts)


def imbalance(counts: Iterable[int]) -> float | None:
    """Returns rows of the most frequent label over those of the rarest, None if one has none."""
    counts = list(counts)
    return max(counts) / min(counts) if counts and min(counts) else None


class Padding(NamedTuple):
    """Padded batch shapes and the share of padding in them.

    Attributes:
      shapes: (P, W) → batches.
      token_waste: share of padded prompt tokens that are padding, in [0, 1].
      window_waste: share of padded image windows that are padding, in [0, 1].
    """

    shapes: dict[tuple[int, int], int]
    token_waste: float
    window_waste: float


def measure_padding(
    found: Survey,
    batches: Iterable[Sequence[int]],
    prompt_lengths: Sequence[int],
    image_windows: Sequence[int],
) -> Padding:
    """Pads batches as the pipeline does and counts the padding.

    Args:
      found: the rows' sizes.
      batches: rows of each batch; rows that the survey left out are skipped.
      prompt_lengths, image_windows: rising choices.
    """
    at = {int(row): i for i, row in enumerate(found.index)}
    shapes: collections.Counter[tuple[int, int]] = collections.Counter()
    real, padded = np.zeros(2), np.zeros(2)
    for batch in batches:
        rows = [at[row] for row in batch if row in at]
        if not rows:
            continue
        tokens, windows = found.prompt_tokens[rows], found.windows[rows]
        p = min(size for size in prompt_lengths if size >= tokens.max())
        w = min(size for size in image_windows if size >= windows.max())
        shapes[p, w] += 1
        real += (tokens.sum(), windows.sum())
        padded += (p * len(rows), w * len(rows))
    waste = 1 - real / np.maximum(padded, 1) if padded.any() else np.zeros(2)
    return Padding(dict(sorted(shapes.items())), float(waste[0]), float(waste[1]))


def histogram(values: np.ndarray, bars: int = BARS) -> list[tuple[int, int, int]]:
    """Returns (from, to, count) of equal steps between the smallest and the largest value."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bars, high - low + 1) + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    return [
        (int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def to_dict(found: Survey, padding: Padding) -> dict[str, Any]:
    """Returns a survey as plain data for JSON."""
    pixels = found.sizes.astype(np.int64).prod(axis=1)
    return {
        "rows": found.rows,
        "usable": len(found.index),
        "left_out": found.left_out,
        "most_windows": found.most_windows,
        "most_tokens": found.most_tokens,
        "labels": found.labels,
        "questions": found.questions,
        "pixels": histogram(pixels),
        "image_tokens": histogram(found.image_tokens),
        "image_tokens_total": int(found.image_tokens.sum()),
        "prompt_tokens": histogram(found.prompt_tokens),
        "shapes": {f"{p} tokens, {w} windows": n for (p, w), n in padding.shapes.items()},
        "token_waste": padding.token_waste,
        "window_waste": padding.window_waste,
    }


def thumbnail(encoded: bytes, resized: tuple[int, int], side: int = 336) -> bytes:
    """Returns an image upright and in the policy's aspect ratio, as a small JPEG.

    Args:
      encoded: the image.
      resized: height and width in pixels.
      side: of the result, at most.
    """
    with open_image(encoded, MOST_DECODED_PIXELS) as image:
        height, width = resized
        scale = min(1.0, side / max(height, width))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        small = upright.resize((round(width * scale), round(height * scale)))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()
