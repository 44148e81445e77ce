"""A row into what the policy reads of it, or the reason why it is left out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emor3_jax.data import prompts
from emor3_jax.data.batch import Example
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import check_labels, label_grades, normalize
from emor3_jax.data.prefix import PrefixEncoder
from emor3_jax.data.sources import Row, Texts
from emor3_jax.models.errors import ImageError
from emor3_jax.models.images import decode
from emor3_jax.models.processor import Processor

REASONS = {
    "missing_field": "a field is null, or the image is not there",
    "several_images": "more than one image",
    "video": "the question names a video (<video>); only still images are read",
    "empty_question": "nothing is asked",
    "special_token": "the question spells out a special token of the policy",
    "outside_file": "the image's path is absolute or leaves the data's folder (outside_files)",
    "unknown_answer": "the answer is no label of the label set",
    "unknown_candidate": "a candidate is no label of the label set, or the answer no candidate",
    "bad_distribution": "graded accuracy needs shares of the labels, none negative, not all 0",
    "unreadable_image": "the image cannot be decoded, is too thin, or over data.max_decoded_pixels",
    "large_image": "the image has more windows than the largest of data.image_windows; raise that, "
    "or lower data.max_pixels",
    "judge_image": "for the judge the image has more windows than the largest of "
    "reflect.judge_windows",
    "long_question": "the prompt has more tokens than the largest of data.prompt_lengths; raise "
    "that, lower data.max_pixels, or take data.long_prompts='cut'",
    "no_response": "there is no response that can be learned (sft.target='response')",
}
"""Why a row is left out."""


def fault_of_images(row: Row) -> str:
    """Returns why a row has no image to decode, one of `REASONS`; "" if it has."""
    if row.fault:
        return row.fault
    if len(row.images) > 1:
        return "several_images"
    return "" if row.images and row.images[0] is not None else "missing_field"


class Skip(NamedTuple):
    """Stands in the stream for a row that cannot be used."""

    reason: str
    id: str


class Encoder:
    """Turns a row into an `Example`, or says why not; runs in worker processes too.

    Attributes:
      processor: of the policy.
      labels: the label set.
      cuts: whether questions that are too long lose their end.
      prefixes: encodes the image for a judge too, or None.
    """

    def __init__(
        self,
        processor: Processor,
        template: str,
        labels: tuple[str, ...],
        max_tokens: int,
        max_windows: int,
        graded: bool = False,
        cut: bool = False,
        prefixes: PrefixEncoder | None = None,
    ) -> None:
        """Reads nothing.

        Args:
          processor: of the policy.
          template: the `set` template.
          labels: the label set.
          max_tokens: of a padded prompt, which is the prompt without its last token.
          max_windows: of an image.
          graded: accuracy by soft labels, the shares of raters.
          cut: whether questions that are too long lose their end, rather than their row be left
            out.
          prefixes: encodes the image for a judge too; None where all read the same prompts.
        """
        self.processor, self.cuts, self.prefixes = processor, cut, prefixes
        self._template, self.labels = template, labels
        self._index = {normalize(label): i for i, label in enumerate(labels)}
        self._max_tokens, self._max_windows, self._graded = max_tokens, max_windows, graded

    def fault_of_texts(self, texts: Texts) -> str | None:
        """Returns why a row cannot be used, as far as its texts show; None if it can."""
        if texts.question is None or texts.answer is None:
            return "missing_field"
        if texts.images_named > 1:
            return "several_images"
        if texts.names_video:
            return "video"
        if not texts.question:
            return "empty_question"
        if prompts.special_token_in(self.processor.tokenizer, texts.question):
            return "special_token"
        if normalize(texts.answer) not in self._index:
            return "unknown_answer"
        candidates = [normalize(label) for label in texts.candidates]
        if candidates and (
            normalize(texts.answer) not in candidates or not self._index.keys() >= set(candidates)
        ):
            return "unknown_candidate"
        if self._graded and self._grades(texts) is None:
            return "bad_distribution"
        return None

    def _grades(self, texts: Texts) -> np.ndarray | None:
        """Returns what each label is worth, float32[K]; None where the shares say nothing."""
        if not self._graded:
            return np.eye(len(self.labels), dtype=np.float32)[self._index[normalize(texts.answer)]]
        return label_grades(texts.distribution or (), self._index)

    def __call__(self, element: tuple[int, Row]) -> Example | Skip:
        """Encodes one row whose texts have no fault, given with its position."""
        position, row = element
        texts = row.texts
        if fault := fault_of_images(row):
            return Skip(fault, texts.id)
        layout, tokenizer = self.processor.layout, self.processor.tokenizer
        image, prefix = row.images[0], None
        try:
            if self.prefixes is not None:
                image = decode(image, self.processor.images.max_decoded_pixels)
                prefix = self.prefixes(image)
            patches, grid = self.processor.still_patches(image)
        except ImageError:
            return Skip("unreadable_image", texts.id)
        if layout.bucket(grid) > self._max_windows:
            return Skip("large_image", texts.id)
        if self.prefixes is not None and prefix is None:
            return Skip("judge_image", texts.id)
        n_image_tokens = len(patches) // layout.shapes.merge_unit
        tokens = self._render(texts, texts.question, n_image_tokens)
        # The last token is not part of the padded prompt.
        too_many = len(tokens) - 1 - self._max_tokens
        if cut := too_many > 0 and self.cuts:
            tokens = self._render_cut(texts, n_image_tokens, too_many)
        if tokens is None or len(tokens) - 1 > self._max_tokens:
            return Skip("long_question", texts.id)
        in_prompt = int(np.sum(tokens == layout.shapes.image_token_id))
        if in_prompt != n_image_tokens:
            # Ids of another policy's tokenizer are no fault of the template.
            check_fit(self.processor)
            raise DataError(
                f"{texts.id}: the prompt has {in_prompt} image tokens, but the image of "
                f"{grid[1]} x {grid[2]} patches has {n_image_tokens} features; the chat template "
                f"must show the image once, as one {prompts.IMAGE_TOKEN}"
            )
        positions, _ = layout.positions(tokens, [grid])
        return Example(
            tokens=tokens,
            positions=positions,
            image=layout.arrange(patches, grid),
            image_start=int(np.argmax(tokens == layout.shapes.image_token_id)),
            shared_length=prompts.shared_length(tokenizer, tokens),
            answer=self._index[normalize(texts.answer)],
            grades=self._grades(texts),
            id=texts.id,
            position=position,
            cut=cut,
            prefix=prefix,
        )

    def _render(self, texts: Texts, question: str, n_image_tokens: int) -> np.ndarray:
        tokenizer, labels = self.processor.tokenizer, texts.candidates or self.labels
        tokens = prompts.render_prompt(tokenizer, self._template, question, labels, n_image_tokens)
        return np.asarray(tokens, np.int32)

    def _render_cut(self, texts: Texts, n_image_tokens: int, too_many: int) -> np.ndarray | None:
        """Returns the prompt with the end of its question cut; None if no question would be left.

        Labels, template and image stay whole. Where the cut joins the text anew, one or two
        tokens more may have to go.
        """
        tokenizer = self.processor.tokenizer
        asked = tokenizer.encode(texts.question, add_special_tokens=False)
        keep = len(asked) - too_many
        while keep > 0:
            kept = tokenizer.decode(asked[:keep]).rstrip("\ufffd").rstrip()
            if not kept:
                return None
            tokens = self._render(texts, kept, n_image_tokens)
            if len(tokens) - 1 <= self._max_tokens:
                return tokens
            keep -= 1
        return None


def encode_row(row: Row, processor: Processor, template: str, labels: Sequence[str]) -> Example:
    """Returns one row as the policy reads it, of any length and size.

    Args:
      row: the row.
      processor: of the policy.
      template: the `set` template.
      labels: the label set.

    Raises:
      DataError: if the row cannot be used, with the reason.
    """
    unbounded = 2**30
    encoder = Encoder(processor, template, check_labels(tuple(labels)), unbounded, unbounded)
    fault = encoder.fault_of_texts(row.texts)
    example = Skip(fault, row.texts.id) if fault else encoder((0, row))
    if isinstance(example, Skip):
        raise DataError(f"{example.id}: {example.reason}: {REASONS[example.reason]}")
    return example


def check_fit(processor: Processor) -> None:
    """Raises DataError if the processor's patches or ids are not those of the policy."""
    shapes, images = processor.layout.shapes, processor.images
    vision = shapes.vision
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids(prompts.IMAGE_TOKEN)
    for field, ours, theirs in (
        ("patch_size", images.patch_size, vision.patch_size),
        ("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", images.merge_size, vision.spatial_merge_size),
        (f"id of {prompts.IMAGE_TOKEN}", image_token, shapes.image_token_id),
    ):
        if ours != theirs:
            raise DataError(
                f"{field}: the processor has {ours}, the policy's config.json {theirs}; take both "
                "from the same folder"
            )
