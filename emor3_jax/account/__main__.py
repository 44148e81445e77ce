"""Prints what one training step of a config costs, beside the data flow of the authors' release.

    python -m emor3_jax.account --config=configs/qwen2_5_vl_3b.py \\
        --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct --prompt_tokens=1024 --response_tokens=256

Counted from shapes: no weights and no data are read, and no device is needed. The policy's folder
gives its shapes and its tokenizer; published policies are known by their id on the hub, and nothing
is downloaded. Without `--prompt_tokens` and `--response_tokens` it is the longest step that the
config allows.

Assumptions, numbered, beside those of `emor3_jax.account.step`:
 1. Steps 1 to 3 of a response are of equal length and all of it: coherence judges two thirds,
    consistency one.
 2. What a prompt does not need for text is its picture (drawn scenes have their own size).
"""

import re
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.account import (
    LAYOUTS,
    Cost,
    Question,
    ShapeError,
    Shapes,
    count,
    total,
)
from emor3_jax.config import EMBEDDED, ConfigError, uses_reference
from emor3_jax.data.labels import label_set
from emor3_jax.data.prompts import reflection_parts, render_prompt, shared_length
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.models import read_config
from emor3_jax.models.family import Shapes as Config
from emor3_jax.models.qwen2_5_vl.processor import Processor
from emor3_jax.models.qwen2_5_vl.published import published
from emor3_jax.prepare.checks import validate
from emor3_jax.runtime import cli

_PUBLISHED = re.compile(r"Qwen/Qwen2\.5-VL-(\w+)-Instruct(@.*)?")


class Texts(NamedTuple):
    """Tokens of what surrounds pictures and judged texts.

    Attributes:
      before: of a prompt up to its picture, and what closes the picture.
      after: of a prompt behind its picture.
      coherence, consistency: head and tail of the questions.
      label, yes_no: of a reply, the end of the turn included.
    """

    before: int
    after: int
    coherence: tuple[int, int]
    consistency: tuple[int, int]
    label: int
    yes_no: int


QWEN_TEXTS = Texts(before=16, after=154, coherence=(26, 46), consistency=(8, 24), label=3, yes_no=2)
"""Qwen2.5-VL's tokenizer on the "qwen" templates, the labels of mikels8, and a short question."""


def find_texts(config: ConfigDict, folder: Path, labels: tuple[str, ...]) -> Texts:
    """Counts the tokens of the config's templates.

    Args:
      config: of the run.
      folder: of the policy, for its tokenizer.
      labels: the label set.
    """
    tokenizer = Processor.from_folder(folder).tokenizer
    templates = prepare.load_templates(config)
    prompt = render_prompt(tokenizer, templates.set, QUESTION, labels, 1)
    shared = shared_length(tokenizer, prompt)

    def parts(template: str, with_image: bool) -> tuple[int, int]:
        head, tail = reflection_parts(tokenizer, template, labels, with_image)
        return len(head), len(tail)

    spelled = [len(tokenizer.encode(label, add_special_tokens=False)) for label in labels]
    return Texts(
        before=shared - 1,
        after=len(prompt) - shared,
        coherence=parts(templates.coherence, False),
        consistency=parts(templates.consistency, True),
        label=round(sum(spelled) / len(labels)) + 1,
        yes_no=len(tokenizer.encode("yes", add_special_tokens=False)) + 1,
    )


def make_shapes(
    config: ConfigDict,
    policy: Config,
    texts: Texts,
    prompt_tokens: int | None,
    response_tokens: int | None,
) -> Shapes:
    """Returns the shapes of a step of the config.

    Args:
      config: of the run.
      policy: its shapes.
      texts: tokens of prompts and questions.
      prompt_tokens: P; None takes the longest prompt, or that of a drawn scene.
      response_tokens: T; None takes `rollout.max_tokens`.

    Raises:
      ShapeError: if no picture is left beside the text of a prompt.
    """
    around = texts.before + texts.after
    if prompt_tokens is None and config.data.train.kind == "emoscenes":
        vision = policy.vision
        side = config.data.scene_size // (vision.patch_size * vision.spatial_merge_size)
        prompt_tokens = around + side**2
    elif prompt_tokens is None:
        prompt_tokens = max(config.data.prompt_lengths)
    picture = prompt_tokens - around
    if picture < 1:
        rule = f"the text of a prompt takes {around} tokens, and the picture needs some; raise it"
        raise ShapeError("prompt_tokens", prompt_tokens, rule)
    t = config.rollout.max_tokens if response_tokens is None else response_tokens
    coherence = consistency = None
    if config.reflect.enabled:
        # Each label and yes and no in two spellings, see `episode.Actor`.
        labels = 2 * len(label_set(config.data.train.labels)) if config.reflect.soft else 1
        yes_no = 4 if config.reflect.soft else 1
        head, tail = texts.coherence
        coherence = Question(head, 2 * t // 3, tail, texts.label, labels)
        head, tail = texts.consistency
        consistency = Question(head, t // 3, tail, texts.yes_no, yes_no)
    return Shapes(
        config.rollout.prompts,
        config.rollout.responses,
        prompt_tokens,
        t,
        picture * policy.vision.merge_unit,
        texts.before + picture,
        coherence,
        consistency,
    )


def phase_table(costs: dict[str, Cost]) -> str:
    """Returns a markdown table of the phases, with their sum."""
    everything = total(costs)
    lines = [
        "| phase | decoder tokens | vision passes | pictures | linear TFLOP | attention TFLOP "
        "| share | recomputed TFLOP |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for phase, cost in (*costs.items(), ("sum", everything)):
        lines.append(
            f"| {phase} | {cost.tokens:,} | {cost.vision_passes:,} | {cost.images:,} "
            f"| {_tera(cost.linear)} | {_tera(cost.attention)} "
            f"| {cost.flops / everything.flops:.1%} | {_tera(cost.recomputed)} |"
        )
    return "\n".join(lines)


def ratio_table(costs: dict[str, dict[str, Cost]]) -> str:
    """Returns a markdown table of how many times as much as "grouped" each other layout costs.

    Args:
      costs: layout → phase → cost; "grouped" and others.
    """
    lines = [
        "| beside grouped | decoder tokens | vision passes | pictures | model FLOPs "
        "| executed FLOPs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    ours = total(costs["grouped"])
    for layout, phases in costs.items():
        theirs = total(phases)
        pairs = (
            (theirs.tokens, ours.tokens),
            (theirs.vision_passes, ours.vision_passes),
            (theirs.images, ours.images),
            (theirs.flops, ours.flops),
            (theirs.executed, ours.executed),
        )
        if layout != "grouped":
            cells = " | ".join(f"{a / b:.2f}" for a, b in pairs)
            lines.append(f"| {layout} | {cells} |")
    return "\n".join(lines)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


def find_policy(config: ConfigDict) -> tuple[Config, Texts]:
    """Returns the shapes of the config's policy, and the tokens of its texts.

    Args:
      config: of the run.

    Raises:
      ConfigError: if the policy is neither on this machine nor a published one.
    """
    path = config.policy.path
    if path == EMBEDDED:
        path = config.policy.embedded_folder
    folder = Path(path)
    if (folder / "config.json").is_file():
        labels = label_set(config.data.train.labels)
        return read_config(folder), find_texts(config, folder, labels)
    if match := _PUBLISHED.fullmatch(path):
        return published(match[1]), QWEN_TEXTS
    rule = (
        "is not on this machine; name a published policy, "
        "--config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct, or train the embedded one first"
    )
    raise ConfigError("policy.path", config.policy.path, rule)


def report(config: ConfigDict, prompt_tokens: int | None, response_tokens: int | None) -> str:
    """Returns the account of a config as markdown.

    Args:
      config: of the run.
      prompt_tokens, response_tokens: as of `make_shapes`.

    Raises:
      ConfigError: if the config is wrong or its policy unknown.
      ShapeError: for lengths that no step can have.
    """
    validate(config)
    policy, texts = find_policy(config)
    shapes = make_shapes(config, policy, texts, prompt_tokens, response_tokens)
    options = {
        "reference": uses_reference(config),
        "kept": config.reference.image_cache > 0,
        "remat": config.policy_update.remat == "layers",
    }
    costs = {layout: count(policy, shapes, layout, **options) for layout in LAYOUTS}
    return "\n".join(
        [
            f"{shapes.prompts} prompts of {shapes.prompt_tokens} tokens, "
            f"{shapes.patches // policy.vision.merge_unit} of them a picture of {shapes.patches} "
            f"patches; {shapes.responses} responses to each of {shapes.response_tokens} tokens.",
            *(_question_line(name, getattr(shapes, name)) for name in ("coherence", "consistency")),
            "",
            "grouped: this program",
            "",
            phase_table(costs["grouped"]),
            "",
            "release: the data flow of the release, whose engines read a prompt once for G samples",
            "",
            phase_table(costs["release"]),
            "",
            "How many times as much as grouped, under four assumptions about the engines:",
            "",
            ratio_table(costs),
        ]
    )


def _question_line(name: str, q: Question | None) -> str:
    if q is None:
        return f"No {name} question."
    candidates = f", {q.replies} candidates" if q.replies > 1 else ""
    return f"{name}: {q.head} + {q.text} + {q.tail} tokens, reply {q.reply}{candidates}."


if __name__ == "__main__":
    flags.DEFINE_integer("prompt_tokens", None, "P, those of the picture included.")
    flags.DEFINE_integer("response_tokens", None, "T, of every response.")

    def main(config: ConfigDict) -> None:
        """Prints the account."""
        print(report(config, flags.FLAGS.prompt_tokens, flags.FLAGS.response_tokens))

    cli.run_without_workdir(main)
