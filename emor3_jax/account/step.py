"""One training step in numbers: for this program, and for the data flow of the authors' release.

What the release does was read in its published code (EasyR1 with vLLM 0.8 or later): G samples by
one request a prompt; the responses then spread over the engines by length; both reflections as new
requests, one a response, with the picture attached again to each of the second; old, reference and
update passes over `[prompt | response]` of each response with a picture of its own, layers
checkpointed, logits of every token. How much its engines share makes four layouts:

    release           An engine reads a prompt once for its G samples. Questions share nothing.
    release_spread    A cache of prefixes besides, as vLLM has by default: questions share what
                      they begin with if they meet in one of the 8 engines, each equally likely.
    release_cached    All questions about a picture meet in one engine, as on a single GPU: system
                      turn and picture are read once, the head of the coherence question once a
                      batch. Bounds the count from below.
    release_uncached  The engines share nothing, as if G copies of each prompt were generated from.

Assumptions, numbered:
 1. A FLOP is an addition or a multiplication within a product of matrices. Norms, activations,
    rope, softmax, sampling, rewards (a table lookup a token), optimizer and collectives are left
    out.
 2. A backward pass costs two forward passes, also in the patch embedding, where no gradient by the
    pixels is computed, and also with a frozen tower, whose gradient is computed nevertheless.
 3. Only real tokens and patches count, and only visible pairs of query and key: padding, and the
    masked half of a causal product, are no work, whatever a back end computes.
 4. Each patch of a windowed layer sees a full window: exact where windows tile the picture.
 5. Where lengths vary, their means are given. Attention grows with the square of a length, so its
    count is then a little low; everything else is exact.
 6. Rematerialisation is counted apart. Here: logits, and the attention of the tower; with `remat`
    all of each layer but its last product, which no gradient needs. The release: each layer with
    its attention. What attention kernels repeat inside themselves, and the attention of prompts
    over 1024 tokens that XLA repeats once more, are left out.
 7. The questions are of equal length in all layouts. The release opens its coherence question with
    the text; here it has this program's head before it.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from emor3_jax.account.cost import (
    Cost,
    Number,
    decoder_flops,
    logits_flops,
    look,
    read,
    tower_attention_flops,
    tower_flops,
)
from emor3_jax.errors import UserError
from emor3_jax.models.family import Shapes as Config
from emor3_jax.types import Batch

LAYOUTS = ("grouped", "release", "release_spread", "release_cached", "release_uncached")
"""This program, and the release's data flow under four assumptions about its engines."""

_ENGINES = 8
"""Of the release: one on each GPU of its machine."""

PHASES = (
    "vision",
    "prefill",
    "decode",
    "coherence",
    "consistency",
    "old",
    "reference",
    "update",
)
"""The rollout (three of them), the reflections with their replies, and the scoring passes."""


class ShapeError(UserError):
    """Shapes that no step can have: names the field, its value, the rule and the way out."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field}={value!r}: {rule}")


class Question(NamedTuple):
    """A reflection about one response, in tokens.

    Attributes:
      head: before the judged text, without what the consistency question shares with the prompt.
      text: the judged text.
      tail: after it, at least 1.
      reply: of the reply, the end of the turn included, at least 1.
      replies: candidates read at once behind the question where it is scored by likelihood
        (`reflect.soft`); 1 for a sampled reply. The release samples.
    """

    head: Number
    text: Number
    tail: Number
    reply: Number
    replies: int = 1


class Shapes(NamedTuple):
    """The shapes of one step; tokens and patches are those of each prompt and response, or means.

    Attributes:
      prompts: B, rolled out in the step.
      responses: G, at least 1.
      prompt_tokens: P, those of the picture included.
      response_tokens: T, the end of the turn included, at least 1.
      patches: N, of the picture.
      shared_tokens: leading tokens of the prompt, system turn and picture, that the consistency
        question has in common with it; less than P.
      coherence, consistency: the reflections; None where none is asked.
    """

    prompts: int
    responses: int
    prompt_tokens: Number
    response_tokens: Number
    patches: Number
    shared_tokens: Number
    coherence: Question | None = None
    consistency: Question | None = None


def shapes_of(
    batch: Batch,
    lengths: np.ndarray,
    coherence: Question | None = None,
    consistency: Question | None = None,
) -> Shapes:
    """Returns the shapes of a step that was taken: means over its prompts and responses.

    Args:
      batch: the prompts, or some of them, as arrays on the host.
      lengths: int32[B, G], of the responses.
      coherence, consistency: the reflections, None where none was asked.
    """
    prompts, responses = lengths.shape
    return Shapes(
        prompts,
        responses,
        prompt_tokens=float(np.sum(batch.prompt.mask)) / len(batch.prompt.mask) + 1,
        response_tokens=float(np.mean(lengths)),
        patches=float(np.sum(batch.images.mask)) / len(batch.prompt.mask),
        shared_tokens=float(np.mean(batch.shared_length)),
        coherence=coherence,
        consistency=consistency,
    )


def count(
    config: Config,
    shapes: Shapes,
    layout: str = "grouped",
    *,
    reference: bool = True,
    kept: bool = False,
    old: bool = False,
    remat: bool = True,
) -> dict[str, Cost]:
    """Returns what each of `PHASES` costs in one step.

    Args:
      config: of the policy.
      shapes: of the step.
      layout: one of `LAYOUTS`.
      reference: whether the reference scores the responses (a KL is asked for).
      kept: whether this program finds the reference's pictures kept from an earlier epoch
        (`reference.image_cache`); the release never does.
      old: whether this program computes old log-probabilities instead of taking the sampler's;
        the release always does.
      remat: whether layers are recomputed in the backward pass (`policy_update.remat="layers"`).

    Raises:
      ShapeError: for an unknown layout, or shapes that no step can have.
    """
    if layout not in LAYOUTS:
        raise ShapeError("layout", layout, f"must be one of {', '.join(LAYOUTS)}")
    _check(config, shapes)
    if layout == "grouped":
        costs = _grouped(config, shapes, remat, kept)
        skipped = ("old",) * (not old)
    else:
        costs = _release(config, shapes, layout, remat)
        skipped = ()
    skipped += ("reference",) * (not reference)
    return {phase: Cost() if phase in skipped else costs[phase] for phase in PHASES}


def total(costs: Mapping[str, Cost]) -> Cost:
    """Returns the cost of all phases together."""
    return sum(costs.values(), Cost())


def step_flops(
    config: Config,
    shapes: Shapes,
    *,
    reference: bool = True,
    kept: bool = False,
    old: bool = False,
) -> Number:
    """Returns the FLOPs that the model needs for one step of this program; arguments of `count`."""
    return total(count(config, shapes, reference=reference, kept=kept, old=old)).flops


def _check(config: Config, shapes: Shapes) -> None:
    for field in ("prompts", "responses", "response_tokens"):
        value = getattr(shapes, field)
        if value < 1:
            raise ShapeError(field, value, "must be at least 1")
    if shapes.patches < 0:
        raise ShapeError("patches", shapes.patches, "must be 0 or more")
    picture = shapes.patches / config.vision.merge_unit
    if not picture <= shapes.shared_tokens < shapes.prompt_tokens:
        raise ShapeError(
            "shared_tokens",
            shapes.shared_tokens,
            f"must hold the {picture:g} tokens of {shapes.patches:g} patches and be less than "
            f"prompt_tokens={shapes.prompt_tokens:g}; a smaller picture or a longer prompt fits",
        )
    for field in ("coherence", "consistency"):
        question = getattr(shapes, field)
        if question is not None and (min(question) < 0 or min(question[2:]) < 1):
            rule = "tail, reply and replies must be at least 1, head and text 0 or more"
            raise ShapeError(field, question, rule)


def _grouped(config: Config, s: Shapes, remat: bool, kept: bool) -> dict[str, Cost]:
    """This program: rollout/generate.py, rollout/reflect.py, rollout/score.py."""
    b, rows = s.prompts, s.prompts * s.responses
    p, t = s.prompt_tokens - 1, s.response_tokens
    vision = look(config, s.patches).times(b)
    # All of a prompt but its last token, which opens each response: what a response reads is that
    # token and its own but the last.
    prefill = read(config, p).times(b)
    decode = read(config, t, before=p, logits=t).times(rows)
    score = vision + prefill + decode
    coherence = consistency = Cost()
    if (q := s.coherence) is not None:
        # The head is read once, for the whole batch.
        each = _ask(config, q, head=0, before=q.head)
        coherence = read(config, q.head) + each.times(rows)
    if (q := s.consistency) is not None:
        consistency = _ask(config, q, head=q.head, before=s.shared_tokens).times(rows)
    tower = config.vision
    again = rows * logits_flops(config, t) + b * tower_attention_flops(tower, s.patches)
    if remat:
        again += b * tower_flops(tower, s.patches, last_product=False)
        again += decoder_flops(config, b * p + rows * t, last_product=False)
        again += score.attention
    return {
        "vision": vision,
        "prefill": prefill,
        "decode": decode,
        "coherence": coherence,
        "consistency": consistency,
        "old": score,
        "reference": prefill + decode if kept else score,
        "update": _trained(score, again),
    }


def _release(config: Config, s: Shapes, layout: str, remat: bool) -> dict[str, Cost]:
    """The data flow of the release."""
    b, rows = s.prompts, s.prompts * s.responses
    p, t = s.prompt_tokens, s.response_tokens
    picture = look(config, s.patches)
    # How often a prompt is read, what the questions about its picture begin with, and the head of
    # the coherence question. Of G questions, those in the same one of E engines read it once: the
    # expected number of engines that see one is E (1 - (1 - 1 / E) ** G).
    prompts = rows if layout == "release_uncached" else b
    shared, heads = {
        "release_spread": (b * _ENGINES * (1 - (1 - 1 / _ENGINES) ** s.responses), _ENGINES),
        "release_cached": (b, 1),
    }.get(layout, (rows, rows))
    coherence = consistency = Cost()
    if s.coherence is not None:
        q = s.coherence._replace(replies=1)
        each = _ask(config, q, head=0, before=q.head)
        coherence = read(config, q.head).times(min(heads, rows)) + each.times(rows)
    if s.consistency is not None:
        q = s.consistency._replace(replies=1)
        each = _ask(config, q, head=q.head, before=s.shared_tokens)
        consistency = (picture + read(config, s.shared_tokens)).times(shared) + each.times(rows)
    # The whole of prompt and response, with logits of all of it.
    text = read(config, p + t, logits=p + t)
    score = (picture + text).times(rows)
    again = 0
    if remat:
        again = rows * (decoder_flops(config, p + t) + tower_flops(config.vision, s.patches))
        again += score.attention
    return {
        "vision": picture.times(prompts),
        # Logits of a prompt's last token only.
        "prefill": read(config, p, logits=1).times(prompts),
        # The last token of a response is never read.
        "decode": read(config, t - 1, before=p, logits=t - 1).times(rows),
        "coherence": coherence,
        "consistency": consistency,
        "old": score,
        "reference": score,
        "update": _trained(score, again),
    }


def _trained(forward: Cost, recomputed: Number) -> Cost:
    """A forward and a backward pass; the pictures are the same."""
    return dataclasses.replace(forward.times(3), images=forward.images, recomputed=recomputed)


def _ask(config: Config, q: Question, *, head: Number, before: Number) -> Cost:
    """One question after `before` tokens that are there already, and its reply or candidates.

    The first token of a reply comes from the question's last state, and its last one is not read.
    """
    asked = head + q.text + q.tail
    reply = read(config, q.reply - 1, before=before + asked, logits=q.reply)
    return read(config, asked, before=before) + reply.times(q.replies)
