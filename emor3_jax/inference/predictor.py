"""A policy's predictions for images: response, label, probabilities, and what it says of its steps.

    predictor = Predictor(models.load("runs/demo/policy"))
    predictor.predict("photo.jpg").label

Deviations, numbered:
 1. Both reflections are read as probabilities (`rollout.reflect`), not as sampled replies, and
    coherence is that of the response's own answer: the true label of a new image is not known.
 2. The trust score, the mean of both, is this project's own; it is the reflections' part of the
    paper's reward (`rewards.combine`), and no calibrated probability of being right.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from emor3_jax.config import default
from emor3_jax.data.batch import Example, collate, size_of
from emor3_jax.data.encode import encode_row
from emor3_jax.data.errors import DataError
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.data.sources import Row, Texts
from emor3_jax.errors import UserError
from emor3_jax.inference.images import InputImage, expand, image_bytes
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.images import open_image
from emor3_jax.models.params import cast_for_decoding
from emor3_jax.prepare import with_attention
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rollout.label_likelihood import LabelLikelihood
from emor3_jax.rollout.reflect import Reflection, prompt_questions
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.tokens import stop_ids, suppressed_tokens
from emor3_jax.types import Experience

MAX_PIXELS = 28 * 28 * 1280
"""Of an image as the policy sees it, by default: 1,280 tokens of Qwen2.5-VL, 980 of Qwen3-VL."""

_STEP = re.compile(r"<step(\d)>(.*?)(?:</step\1>|(?=<step\d>)|(?=\\boxed\{)|$)", re.DOTALL)

ImageLike = str | Path | bytes | Image.Image


@dataclasses.dataclass(frozen=True)
class InferenceOptions:
    """How a policy is asked; what it is asked is `InferenceSettings`.

    Attributes:
      batch_size: images at a time, at most.
      temperature: of the responses; 0 is greedy.
      seed: of the sampling noise.
      dtype: of the arithmetic, "float32" or "bfloat16"; "" is float32 on a CPU, else bfloat16.
      max_pixels: larger images are scaled down to so many pixels; 0 is the limit of the policy's
        folder, which for Qwen2.5-VL is 16,384 tokens.
      reflect: ask both reflections.
      weigh_labels: read the probability of each label.

    Raises:
      DataError: if one of them cannot be used.
    """

    batch_size: int = 4
    temperature: float = 0.0
    seed: int = 0
    dtype: str = ""
    max_pixels: int = MAX_PIXELS
    reflect: bool = True
    weigh_labels: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= 4096:
            raise DataError(f"batch_size={self.batch_size}: must be 1 to 4096")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DataError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise DataError(f"dtype={self.dtype!r}: must be float32 or bfloat16, or '' to choose")
        if self.max_pixels < 0:
            raise DataError(
                f"max_pixels={self.max_pixels}: must be 0 (what the policy's folder says) or more"
            )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a policy says of one image.

    Attributes:
      image: name of the file or the address; "" of an image that was given without a name.
      label: the boxed label, "" where the response boxes none of the labels.
      response: the whole text.
      steps: texts of the steps that it holds, in order.
      complete: the response ended by itself, before the longest length.
      probabilities: label → share in the likelihood of all labels, behind the response's own
        reasoning; None where they were not asked for.
      coherence: probability in [0, 1] that the first two steps, read alone, speak of the label;
        None without label or steps.
      consistency: probability in [0, 1] that the first step describes the image; None without it.
      error: why the image could not be used; all else is then empty.
    """

    image: str = ""
    label: str = ""
    response: str = ""
    steps: tuple[str, ...] = ()
    complete: bool = False
    probabilities: dict[str, float] | None = None
    coherence: float | None = None
    consistency: float | None = None
    error: str = ""

    @property
    def trust(self) -> float | None:
        """Mean of both reflections, in [0, 1]; None where one of them is missing."""
        if self.coherence is None or self.consistency is None:
            return None
        return (self.coherence + self.consistency) / 2

    def to_json(self) -> dict[str, Any]:
        """Returns the fields and the trust score as plain data."""
        if self.error:
            return {"image": self.image, "error": self.error}
        data = dataclasses.asdict(self) | {"steps": list(self.steps), "trust": self.trust}
        del data["error"]
        return data


class Predictor:
    """Asks a policy about images.

    Attributes:
      policy: with its arithmetic, its parameters in that type, and its images scaled.
      settings: what is asked.
      options: how.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        settings: InferenceSettings | None = None,
        options: InferenceOptions | None = None,
    ) -> None:
        """Builds the tables of the labels; computes nothing.

        Args:
          policy: as `models.load` returns it.
          settings: None takes those of the policy's folder, or, if it has none, the defaults.
          options: None takes the defaults.

        Raises:
          DataError: if settings or options cannot be used with this policy.
        """
        if policy.processor is None:
            raise DataError("the policy has no processor; load it from a folder")
        if settings is None:
            settings = policy.source and InferenceSettings.read(policy.source)
        self.settings = settings or InferenceSettings()
        self.options = options or InferenceOptions()
        _room(policy, self.settings)
        self.policy = _prepared(policy, self.options, self.settings)
        self._batches = itertools.count()
        tokenizer, labels = policy.processor.tokenizer, self.settings.labels
        templates = self.settings.templates
        reflection = None
        if self.options.reflect:
            questions = prompt_questions(tokenizer, templates, labels, self.settings.listed)
            sampling = Sampling(8, 0.0, 1.0, stop_ids(tokenizer))
            lengths = tuple(2**i for i in range(5, self.settings.max_tokens.bit_length()))
            reflection = Reflection(questions, sampling, lengths, soft=True)
        self.rollout = Rollout(
            self.policy.policy,
            Scorer(tokenizer, labels, coherence_target="answer"),
            suppressed_tokens(policy.shapes.vocab_size, tokenizer),
            Sampling(self.settings.max_tokens, self.options.temperature, 1.0, stop_ids(tokenizer)),
            reflection=reflection,
        )
        weigh = self.options.weigh_labels
        self._likelihood = LabelLikelihood.of_rollout(self.rollout) if weigh else None

    def predict(self, image: ImageLike, question: str | None = None) -> Prediction:
        """Asks about one image.

        Args:
          image: a file, an address (http or https), the bytes of an encoded image, or an image of
            PIL.
          question: asked instead of that of the settings.

        Raises:
          UserError: if the image cannot be used.
        """
        settings = self.settings
        if question is not None:
            settings = dataclasses.replace(settings, question=question)
        example = encode_image(image_bytes(image), self.policy, settings)
        (found,) = self._predict([example])
        return dataclasses.replace(found, image=str(image) if isinstance(image, str | Path) else "")

    def predict_all(self, images: ImageLike | Iterable[ImageLike]) -> list[Prediction]:
        """Asks about images; as `predict_each`."""
        return list(self.predict_each(images))

    def predict_each(self, images: ImageLike | Iterable[ImageLike]) -> Iterator[Prediction]:
        """Asks about images, a batch at a time.

        Args:
          images: one or several of what `predict` takes, or folders, whose images are taken in
            order.

        Yields:
          A prediction for each image, in order; one with an `error` for what cannot be used.
        """
        given = [images] if isinstance(images, ImageLike) else images
        for batch in _batched(expand(given), self.options.batch_size):
            yield from self._predict_batch(batch)

    def _predict_batch(self, batch: Sequence[InputImage]) -> list[Prediction]:
        examples: list[Example | UserError] = []
        for each in batch:
            try:
                examples.append(encode_image(each.read(), self.policy, self.settings))
            except UserError as error:
                examples.append(error)
        usable = [x for x in examples if isinstance(x, Example)]
        found = iter(self._predict(usable) if usable else ())
        return [
            Prediction(image=each.name, error=str(example))
            if isinstance(example, UserError)
            else dataclasses.replace(next(found), image=each.name)
            for each, example in zip(batch, examples, strict=True)
        ]

    def _predict(self, examples: Sequence[Example]) -> list[Prediction]:
        length, windows = size_of(examples)
        batch, _ = collate(
            examples,
            self.policy.processor.layout,
            batch_size=1 << (len(examples) - 1).bit_length(),
            prompt_lengths=(round_up(length),),
            image_windows=(round_up(windows),),
        )
        key = jax.random.fold_in(jax.random.key(self.options.seed), next(self._batches))
        params = self.policy.params
        experience = self.rollout(params, batch, key)
        shares = None
        if self._likelihood is not None:
            shares = np.asarray(self._likelihood(params, batch, experience.samples))
        experience = jax.device_get(experience._replace(batch=None))
        return [self._read(row, experience, shares) for row in range(len(examples))]

    def _read(self, row: int, experience: Experience, shares: np.ndarray | None) -> Prediction:
        samples, scores, replies = experience.samples, experience.scores, experience.replies
        at = (row, 0)
        text = self.policy.processor.tokenizer.decode(
            samples.tokens[at][: samples.lengths[at]], skip_special_tokens=True
        )
        labels, answer = self.settings.labels, int(scores.answer[at])
        asked = {
            name: float(scores.reflections[name][at])
            for name, found in (replies.found if replies is not None else {}).items()
            if found[at]
        }
        return Prediction(
            label=labels[answer] if answer >= 0 else "",
            response=text,
            steps=find_steps(text),
            complete=bool(samples.ended[at]),
            probabilities=None
            if shares is None
            else dict(zip(labels, map(float, shares[at]), strict=True)),
            coherence=asked.get("coherence") if answer >= 0 else None,
            consistency=asked.get("consistency"),
        )


def encode_image(image: bytes, policy: LoadedPolicy, settings: InferenceSettings) -> Example:
    """Returns an encoded image, and what is asked of it, as a policy reads them.

    Args:
      image: an encoded image.
      policy: whose processor reads it.
      settings: what is asked.

    Raises:
      UserError: if the image or the question cannot be used, or both leave no room for a response.
    """
    # Says more of an image that cannot be used than the reason for which a row is left out.
    open_image(image, policy.processor.images.max_decoded_pixels)
    row = Row([image], Texts(settings.question, settings.labels[0], "image"))
    example = encode_row(row, policy.processor, settings.templates.set, settings.labels)
    room = _room(policy, settings)
    if len(example.tokens) > room:
        raise DataError(
            f"the prompt has {len(example.tokens)} tokens, over the {room} that leave room for a "
            "response; ask a shorter question, or allow fewer max_pixels or max_tokens"
        )
    return example


def _room(policy: LoadedPolicy, settings: InferenceSettings) -> int:
    """Returns the tokens that a prompt may have; raises DataError if a response leaves none."""
    most = policy.shapes.max_position_embeddings
    if settings.max_tokens > most:
        raise DataError(
            f"max_tokens={settings.max_tokens}: must be 1 to {most}, the positions that the policy "
            "has"
        )
    return most - settings.max_tokens


def find_steps(response: str) -> tuple[str, ...]:
    """Returns the texts of `<step1> … </step1>` and so on; a step may lack its end."""
    return tuple(match[2].strip() for match in _STEP.finditer(response))


def round_up(size: int) -> int:
    """Returns a size that few others are rounded up to, at most a quarter larger; 0 is 1."""
    unit = 1 << max((max(size, 1) - 1).bit_length() - 3, 0)
    return -(-max(size, 1) // unit) * unit


def with_pixel_cap(policy: LoadedPolicy, most: int) -> LoadedPolicy:
    """Returns a policy that sees images with at most so many pixels; 0 changes nothing."""
    images = policy.processor.images
    if not most or images.max_pixels <= most:
        return policy
    processor = policy.processor.with_pixels(min(images.min_pixels, most), most)
    return dataclasses.replace(policy, processor=processor)


def default_dtype() -> str:
    """Returns the type of arithmetic that this machine is good at."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _prepared(
    policy: LoadedPolicy, options: InferenceOptions, settings: InferenceSettings
) -> LoadedPolicy:
    config = default()
    config.policy.dtype = dtype = options.dtype or default_dtype()
    policy = with_pixel_cap(policy, options.max_pixels)
    processor = policy.processor.with_dtype(jnp.dtype(dtype))
    if settings.first_resize is not None:
        processor = processor.with_first_resize(*settings.first_resize)
    return dataclasses.replace(
        policy,
        policy=with_attention(policy.policy, config, jax.default_backend()),
        params=cast_for_decoding(policy.params, jnp.dtype(dtype)),
        processor=processor,
    )


def _batched(items: Iterable[InputImage], size: int) -> Iterator[list[InputImage]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
