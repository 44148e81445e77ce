"""Asks a policy about one image: its three steps and the emotion.

python -m emor3_jax.infer --policy=runs/cpu_demo/policy --image=photo.jpg [--labels=mikels8]
"""

import logging
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from emor3_jax.data.batch import collate
from emor3_jax.data.encode import encode_row
from emor3_jax.data.labels import label_set
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.data.sources import Row, Texts
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.errors import UserError
from emor3_jax.models import LoadedPolicy, load
from emor3_jax.parallel.devices import expected_platform, find_devices
from emor3_jax.parallel.flags import set_flags
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.tokens import stop_ids, suppressed_tokens


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
      DataError: if the image cannot be decoded.
    """
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


def main(_: list[str]) -> None:
    """Runs the program."""
    # The parameter overview is of no interest to who asks about an image.
    logging.getLogger("emor3_jax").setLevel(logging.WARNING)
    set_flags(expected_platform())
    try:
        print(find_devices(), file=sys.stderr, flush=True)
        policy = load(FLAGS.policy, dtype=FLAGS.dtype)
        text, label = answer(
            policy,
            Path(FLAGS.image).read_bytes(),
            question=FLAGS.question,
            labels=label_set(FLAGS.labels),
            templates=FLAGS.templates,
            max_tokens=FLAGS.max_tokens,
            temperature=FLAGS.temperature,
            dtype=FLAGS.dtype,
        )
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
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
    flags.DEFINE_integer("max_tokens", 128, "Length of the response.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and arithmetic.")
    app.run(main)
