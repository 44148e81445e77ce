"""Asks a policy about one image: its three steps and the emotion.

python -m emor3_jax.infer --policy=runs/cpu_demo/policy --image=photo.jpg [--labels=mikels8]

A wrong flag or file is one line on stderr and exit status 2.
"""

import dataclasses
import logging
import math
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from emor3_jax.data.batch import collate
from emor3_jax.data.encode import encode_row
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import label_set
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.data.sources import Row, Texts
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.files import is_utf8, read_bytes
from emor3_jax.models import LoadedPolicy, load
from emor3_jax.models.images import MAX_IMAGE_BYTES, open_image
from emor3_jax.parallel.devices import expected_platform, find_devices
from emor3_jax.parallel.flags import set_flags
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.tokens import stop_ids, suppressed_tokens
from emor3_jax.runtime.cli import errors_told


def answer(
    policy: LoadedPolicy,
    image: bytes,
    *,
    question: str,
    labels: tuple[str, ...],
    templates: str = "qwen",
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[str, str]:
    """Returns the policy's response to one image, and its boxed label, "" where there is none.

    Args:
      policy: as `models.load` returns it.
      image: an encoded image file.
      question: what is asked of it.
      labels: the label set.
      templates: "qwen", or "tiny" for the embedded policy.
      max_tokens: length of the response.
      temperature: 0 is greedy.
      seed: of the sampling noise.
      dtype: of the arithmetic, "float32" or "bfloat16".

    Raises:
      DataError, ImageError: if the image cannot be decoded, or another argument is of no use.
    """
    _check(policy, question, max_tokens, temperature)
    # Says more of an image that cannot be used than the reason for which a row is left out.
    open_image(image, policy.processor.images.max_decoded_pixels)
    chosen = PromptTemplates.load(set=templates)
    row = Row([image], Texts(question, labels[0], "image"))
    processor, tokenizer = policy.processor, policy.processor.tokenizer
    example = encode_row(row, processor, chosen.set, labels)
    batch, _ = collate(
        [example],
        processor.layout,
        batch_size=1,
        prompt_lengths=(len(example.tokens),),
        image_windows=(example.image.bucket,),
    )
    rollout = Rollout(
        policy.policy.with_compute(dtype=jnp.dtype(dtype)),
        Scorer(tokenizer, labels),
        suppressed_tokens(policy.shapes.vocab_size, tokenizer),
        Sampling(max_tokens, temperature, 1.0, stop_ids(tokenizer)),
    )
    _, samples = rollout.respond(policy.params, batch, jax.random.key(seed))
    scores = rollout.scorer.score(batch, samples, None)
    text = tokenizer.decode(
        samples.tokens[0, 0, : int(samples.lengths[0, 0])], skip_special_tokens=True
    )
    index = int(scores.answer[0, 0])
    return text, labels[index] if index >= 0 else ""


def _check(policy: LoadedPolicy, question: str, max_tokens: int, temperature: float) -> None:
    most = policy.shapes.max_position_embeddings
    if not 1 <= max_tokens <= most:
        raise DataError(
            f"max_tokens={max_tokens}: must be 1 to {most}, the positions that the policy has"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise DataError(f"temperature={temperature}: must be 0 (greedy) or more")
    if not is_utf8(question):
        raise DataError(f"question={question!r}: is no text in UTF-8; write it in UTF-8")
    if not question.strip():
        raise DataError("question='': is empty; ask something of the image")


MAX_PIXELS = 28 * 28 * 1280
"""Of an image as the policy sees it, by default: some 1,280 tokens."""


def with_pixel_cap(policy: LoadedPolicy, most: int) -> LoadedPolicy:
    """Returns a policy that sees images with at most so many pixels.

    Args:
      policy: as `models.load` returns it.
      most: pixels after scaling; 0 is what the policy's folder says, which for Qwen2.5-VL is
        16,384 tokens.

    Raises:
      DataError: if it is negative.
    """
    if most < 0:
        raise DataError(f"max_pixels={most}: must be 0 (what the policy's folder says) or more")
    images = policy.processor.images
    if not most or images.max_pixels <= most:
        return policy
    processor = policy.processor.with_pixels(min(images.min_pixels, most), most)
    return dataclasses.replace(policy, processor=processor)


def main(_: list[str]) -> None:
    """Runs the program."""
    # The parameter overview is of no interest to who asks about an image.
    logging.getLogger("emor3_jax").setLevel(logging.WARNING)
    set_flags(expected_platform())
    with errors_told():
        print(find_devices(), file=sys.stderr, flush=True)
        # Before the weights, which take long.
        image = read_bytes(FLAGS.image, MAX_IMAGE_BYTES)
        policy = with_pixel_cap(load(FLAGS.policy, dtype=FLAGS.dtype), FLAGS.max_pixels)
        text, label = answer(
            policy,
            image,
            question=FLAGS.question,
            labels=label_set(FLAGS.labels),
            templates=FLAGS.templates,
            max_tokens=FLAGS.max_tokens,
            temperature=FLAGS.temperature,
            dtype=FLAGS.dtype,
        )
        print(text)
        print(f"\nemotion: {label or 'none of the labels'}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string(
        "policy", None, "Folder of the policy, or its id on the hub.", required=True
    )
    flags.DEFINE_string("image", None, "Image file.", required=True)
    flags.DEFINE_string("labels", "mikels8", "Label set by name, or labels joined by commas.")
    flags.DEFINE_string("question", QUESTION, "What is asked of the image.")
    flags.DEFINE_string("templates", "tiny", "As data.templates.set of a config, or a file.")
    flags.DEFINE_integer("max_tokens", 128, "Length of the response.")
    flags.DEFINE_integer(
        "max_pixels", MAX_PIXELS, "Larger images are scaled down; 0 is the policy's own limit."
    )
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and arithmetic.")
    app.run(main)
