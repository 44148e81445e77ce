"""Asks a policy about images: its steps, the emotion, probabilities, and what it says of its steps.

    emor3 infer POLICY IMAGE… [--format=text|jsonl|html] [--out=FILE] [--labels=mikels8]

POLICY is a folder in Hugging Face's format, the workdir of a run, one of its checkpoints, or an id
on the hub; an IMAGE is a file, a folder or an address. Labels, question and template are those that
the policy was trained on, from `emor3.json` in its folder; the flags change them. From Python:

    from emor3_jax import infer
    predictor = infer.load("runs/demo")
    print(predictor.predict("photo.jpg").label)

An image that cannot be used is named, in its place in the output; the exit status is 2 if none can,
as for a wrong flag or policy, which is one line on stderr.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags

from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.errors import UserError
from emor3_jax.files import is_folder, show
from emor3_jax.inference.images import image_bytes, is_address
from emor3_jax.inference.loading import find_policy
from emor3_jax.inference.output import FORMATS
from emor3_jax.inference.predictor import (
    MAX_PIXELS,
    ImageLike,
    InferenceOptions,
    Prediction,
    Predictor,
    default_dtype,
    encode_image,
    with_pixel_cap,
)
from emor3_jax.io.console import tell
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.images import open_image
from emor3_jax.parallel.devices import expected_platform, find_devices
from emor3_jax.parallel.flags import set_flags
from emor3_jax.runtime import cli

__all__ = ["InferenceOptions", "InferenceSettings", "Prediction", "Predictor", "answer", "load"]


def load(
    name: str | Path,
    *,
    labels: str | Sequence[str] | None = None,
    question: str | None = None,
    template: str | Path | None = None,
    max_tokens: int | None = None,
    options: InferenceOptions | None = None,
) -> Predictor:
    """Loads a policy to ask it about images.

    Args:
      name: a folder, a run, a checkpoint or an id on the hub, see `inference.loading.find_policy`.
      labels: a label set by name, labels joined by commas, or a list; None and the next three: as
        the policy was trained (`emor3.json`), else those of `InferenceSettings`.
      question: what is asked of the image.
      template: name or file of the `set` template.
      max_tokens: longest response.
      options: how it is asked.

    Raises:
      UserError, FileNotFoundError: if there is no such policy, or something given is of no use.
    """
    options = options or InferenceOptions()
    changes = {
        "labels": labels,
        "question": question,
        "template": template,
        "max_tokens": max_tokens,
    }
    # A wrong one is told before the weights are read, which takes long.
    InferenceSettings().changed(**changes)
    found = find_policy(name, options.dtype or default_dtype())
    settings = (found.settings or InferenceSettings()).changed(**changes)
    return Predictor(found.policy, settings, options)


def answer(
    policy: LoadedPolicy,
    image: ImageLike,
    *,
    question: str | None = None,
    labels: str | Sequence[str] | None = None,
    templates: str | Path | None = None,
    max_tokens: int | None = None,
    options: InferenceOptions | None = None,
) -> Prediction:
    """Asks about one image; `Predictor` asks about many without building its tables anew.

    Args:
      policy: as `models.load` returns it.
      image: a file, an address, the bytes of an encoded image, or an image of PIL.
      question, labels, max_tokens: as of `load`.
      templates: as `template` of `load`.
      options: how it is asked.

    Raises:
      UserError: if the image, or another argument, is of no use.
    """
    stored = policy.source and InferenceSettings.read(policy.source)
    settings = (stored or InferenceSettings()).changed(
        labels=labels, question=question, template=templates, max_tokens=max_tokens
    )
    options = options or InferenceOptions()
    # An image that cannot be used is told before the tables are built, which takes seconds.
    encode_image(image_bytes(image), with_pixel_cap(policy, options.max_pixels), settings)
    return Predictor(policy, settings, options).predict(image)


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    # The parameter overview and checkpoints are of no interest to who asks about an image.
    for name in ("emor3_jax", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    set_flags(expected_platform())
    with cli.errors_told():
        names = [name for name in (FLAGS.policy, *arguments[1:]) if name]
        if not names:
            raise UserError("give a policy and images: emor3 infer POLICY IMAGE…")
        policy, *images = names
        images += FLAGS.image or []
        if not images:
            raise UserError(f"give images to ask {show(policy)} about: emor3 infer POLICY IMAGE…")
        tell(find_devices())
        if len(images) == 1 and not is_address(images[0]) and not is_folder(images[0]):
            # What is wrong with a single file is told before the weights, which take long.
            open_image(image_bytes(images[0]))
        predictor = load(policy, **asked_changes(FLAGS), options=options_of(FLAGS))
        counts = {"asked": 0, "failed": 0}
        predictions = _counted(predictor.predict_each(images), counts)
        with _open_out(FLAGS.out) as file:
            for piece in FORMATS[FLAGS.format](predictions):
                file.write(piece)
                file.flush()
        if counts["failed"]:
            tell(f"{counts['failed']} of {counts['asked']} images could not be used")
        if counts["failed"] == counts["asked"]:
            sys.exit(2)


def _counted(predictions: Iterator[Prediction], counts: dict[str, int]) -> Iterator[Prediction]:
    # A terminal that shows the predictions shows what is wrong with an image among them.
    seen = not FLAGS.out and sys.stdout.isatty() and sys.stderr.isatty()
    for each in predictions:
        counts["asked"] += 1
        counts["failed"] += bool(each.error)
        if each.error and not seen:
            tell(f"{show(each.image)}: {each.error}")
        yield each


@contextlib.contextmanager
def _open_out(path: str) -> Iterator[TextIO]:
    if not path:
        yield sys.stdout
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # A name of an image may hold bytes that are no UTF-8.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        yield file


def define_flags() -> None:
    """Defines the flags of what a policy is asked, and how."""
    flags.DEFINE_string("policy", None, "The policy, instead of the first argument.")
    flags.DEFINE_string("labels", None, "Label set by name, or labels joined by commas.")
    flags.DEFINE_string("question", None, "What is asked of the image.")
    flags.DEFINE_string("template", None, "As data.templates.set of a config: a name or a file.")
    flags.DEFINE_alias("templates", "template")
    flags.DEFINE_integer("max_tokens", None, "Longest response.")
    flags.DEFINE_integer(
        "max_pixels", MAX_PIXELS, "Larger images are scaled down; 0 is the policy's own limit."
    )
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
    flags.DEFINE_integer("seed", 0, "Of the sampling noise.")
    flags.DEFINE_enum(
        "dtype", "", ["", "float32", "bfloat16"], "Of weights and arithmetic; '' chooses."
    )
    flags.DEFINE_integer("batch", 4, "Images at a time.")
    flags.DEFINE_boolean("reflect", True, "Ask both reflections.")
    flags.DEFINE_boolean("probabilities", True, "Read the probability of each label.")


def asked_changes(given: Any) -> dict[str, Any]:
    """Returns the arguments of `load` that flags of `define_flags` say."""
    names = ("labels", "question", "template", "max_tokens")
    return {name: getattr(given, name) for name in names}


def options_of(given: Any) -> InferenceOptions:
    """Returns the options that flags of `define_flags` say; raises DataError."""
    return InferenceOptions(
        given.batch,
        given.temperature,
        given.seed,
        given.dtype,
        given.max_pixels,
        given.reflect,
        given.probabilities,
    )


FLAGS = flags.FLAGS

if __name__ == "__main__":
    define_flags()
    flags.DEFINE_multi_string("image", None, "An image, beside those given without a flag.")
    flags.DEFINE_enum("format", "text", sorted(FORMATS), "Of the output.")
    flags.DEFINE_string("out", "", "File of the output; '' is standard output.")
    app.run(main, flags_parser=cli.parse_flags)
