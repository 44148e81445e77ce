"""FLOPs, decoder tokens and vision passes of one training step, by phase, from its shapes.

Assumptions, numbered:
 1. A FLOP is an addition or a multiplication within a matrix product. Norms, activations, RoPE,
    softmax, sampling, rewards (a table lookup per token), the optimizer and collectives are left
    out.
 2. A backward pass costs two forward passes, also in the patch embedding, where no gradient by the
    pixels is computed. A frozen vision tower has none.
 3. Only real tokens and patches count, and only visible query-key pairs: padding and the masked
    half of a causal product are no work, whatever a back end computes.
 4. Each patch of a windowed layer attends to a full window: exact where windows tile the image.
 5. Where lengths vary, their means are given. Attention grows with the square of a length, so its
    count is then slightly low; everything else is exact.
 6. Rematerialisation is counted apart: logits, and the attention of the vision tower; with `remat`
    all of each layer but its last product, which no gradient needs. Not counted are recomputation
    inside attention kernels, and the attention of prompts over 1024 tokens that XLA repeats once
    more.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from emor3_jax.errors import UserError
from emor3_jax.flops.cost import (
    Cost,
    Number,
    decoder_flops,
    decoder_linear_flops,
    logits_flops,
    vision_flops,
)
from emor3_jax.models.family import Shapes
from emor3_jax.types import Batch

PHASES = ("vision", "prefill", "decode", "old", "reference", "update")
"""The rollout (the first three), and the scoring passes; the reflections are between them."""


class ShapeError(UserError):
    """Impossible shapes of a step: names the field, its value, the rule and the way out."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field}={value!r}: {rule}")


class QuestionTokens(NamedTuple):
    """Token counts of a reflection question about one response.

    Attributes:
      head: before the judged text, without the prefix that a question with the image
        shares with the prompt.
      text: the judged text.
      tail: after it, at least 1.
      reply: of the reply, the end of the turn included, at least 1.
      replies: candidates scored in parallel behind the question with `reflect.soft`; 1 for a
        sampled reply.
      with_image: the question shares the prompt's leading tokens; without, its head is read once
        for the whole batch.
    """

    head: Number
    text: Number
    tail: Number
    reply: Number
    replies: int = 1
    with_image: bool = False


class JudgeShapes(NamedTuple):
    """A judge, and what it reads of a prompt before it is asked, or the mean of that.

    Attributes:
      name: as the config has it.
      policy: its shapes.
      tokens: those of a prompt that it reads, image tokens included.
      patches: N, of the image.
      shared_tokens: leading tokens that a question with the image goes on from, at most `tokens`.
      parameters: number of them; 0 where no seconds are asked for.
    """

    name: str
    policy: Shapes
    tokens: Number
    patches: Number
    shared_tokens: Number
    parameters: int = 0


class StepShapes(NamedTuple):
    """The shapes of one step; tokens and patches are per prompt and response, or means of these.

    Attributes:
      prompts: B, rolled out in the step.
      responses: G, at least 1.
      prompt_tokens: P, image tokens included.
      response_tokens: T, the end of the turn included, at least 1.
      patches: N, of the image.
      shared_tokens: leading tokens of the prompt, system turn and image, that a question
        with the image has in common with it; less than P.
      questions: name → reflection; empty where none is asked.
      judge: who is asked; None is the policy, which has read the prompts already.
    """

    prompts: int
    responses: int
    prompt_tokens: Number
    response_tokens: Number
    patches: Number
    shared_tokens: Number
    questions: Mapping[str, QuestionTokens] = MappingProxyType({})
    judge: JudgeShapes | None = None


def mean_shapes(
    batch: Batch,
    lengths: np.ndarray,
    questions: Mapping[str, QuestionTokens] = MappingProxyType({}),
) -> StepShapes:
    """Returns the shapes of a step that was taken: means over its prompts and responses.

    Args:
      batch: the prompts, or some of them, as arrays on the host.
      lengths: int32[B, G], of the responses.
      questions: name → reflection; empty where none was asked.
    """
    prompts, responses = lengths.shape
    return StepShapes(
        prompts,
        responses,
        prompt_tokens=float(np.sum(batch.prompt.mask)) / len(batch.prompt.mask) + 1,
        response_tokens=float(np.mean(lengths)),
        patches=float(np.sum(batch.images.mask)) / len(batch.prompt.mask),
        shared_tokens=float(np.mean(batch.shared_length)),
        questions=questions,
    )


def mean_judge_shapes(name: str, judge: Shapes, batch: Batch) -> JudgeShapes:
    """Returns a judge's shapes and the mean sizes of its prompts in a step that was taken.

    Args:
      name: as the config has it.
      judge: its shapes.
      batch: as of `mean_shapes`.
    """
    seen = batch.seen_by_judge
    return JudgeShapes(
        name,
        judge,
        tokens=float(np.sum(seen.prompt.mask)) / len(seen.prompt.mask),
        patches=float(np.sum(seen.images.mask)) / len(seen.prompt.mask),
        shared_tokens=float(np.mean(seen.shared_length)),
    )


def phase_costs(
    policy: Shapes,
    step: StepShapes,
    *,
    reference: bool = True,
    kept: bool = False,
    old: bool = False,
    remat: bool = True,
    frozen_tower: bool = False,
) -> dict[str, Cost]:
    """Returns the cost of each of `PHASES`, and of each question, in one step of this program.

    Where a judge is asked, "judge" is its pass over the prompts, and the questions are its own.

    Args:
      policy: its shapes.
      step: its shapes.
      reference: the reference scores the responses (a KL is asked for).
      kept: the reference's vision features are cached from an earlier epoch
        (`reference.image_cache`).
      old: old log-probabilities are recomputed instead of taken from the sampler.
      remat: layers are recomputed in the backward pass (`policy_update.remat="layers"`).
      frozen_tower: the vision tower is not trained (`policy.freeze_vision_tower`).

    Raises:
      ShapeError: for shapes that no step can have.
    """
    check_shapes(policy, step)
    s = step
    b, rows = s.prompts, s.prompts * s.responses
    p, t = s.prompt_tokens - 1, s.response_tokens
    vision = vision_flops(policy, s.patches).times(b)
    # The prefill leaves out the last token of a prompt, which opens each response: the decoder
    # reads that token and all tokens of the response but the last.
    prefill = decoder_flops(policy, p).times(b)
    decode = decoder_flops(policy, t, before=p, logits=t).times(rows)
    score = vision + prefill + decode
    asked, shared, questions = policy, s.shared_tokens, {}
    if s.questions and s.judge is not None:
        asked, shared = s.judge.policy, s.judge.shared_tokens
        prefix = decoder_flops(asked, s.judge.tokens)
        questions["judge"] = (vision_flops(asked, s.judge.patches) + prefix).times(b)
    for name, q in s.questions.items():
        if q.with_image:
            each = question_cost(asked, q, head=q.head, before=shared)
            questions[name] = each.times(rows)
        else:
            each = question_cost(asked, q, head=0, before=q.head)
            questions[name] = decoder_flops(asked, q.head) + each.times(rows)
    tower = policy.vision
    recomputed = rows * logits_flops(policy, t)
    if remat:
        recomputed += decoder_linear_flops(policy, b * p + rows * t, last_product=False)
        recomputed += (prefill + decode).attention
    if frozen_tower:
        update = vision + training_cost(prefill + decode, recomputed)
    else:
        recomputed += b * tower.attention_flops(s.patches)
        if remat:
            recomputed += b * tower.layer_flops(s.patches, last_product=False)
            recomputed += vision.attention
        update = training_cost(score, recomputed)
    return {
        "vision": vision,
        "prefill": prefill,
        "decode": decode,
        **questions,
        "old": score if old else Cost(),
        "reference": Cost() if not reference else prefill + decode if kept else score,
        "update": update,
    }


def total(costs: Mapping[str, Cost]) -> Cost:
    """Returns the cost of all phases together."""
    return sum(costs.values(), Cost())


def step_flops(
    policy: Shapes,
    step: StepShapes,
    *,
    reference: bool = True,
    kept: bool = False,
    old: bool = False,
    frozen_tower: bool = False,
) -> Number:
    """Returns the FLOPs that the model needs for one step; arguments as of `phase_costs`."""
    costs = phase_costs(
        policy, step, reference=reference, kept=kept, old=old, frozen_tower=frozen_tower
    )
    return total(costs).flops


def check_shapes(policy: Shapes, step: StepShapes) -> None:
    """Raises ShapeError for shapes that no step of the policy can have."""
    for field in ("prompts", "responses", "response_tokens"):
        value = getattr(step, field)
        if value < 1:
            raise ShapeError(field, value, "must be at least 1")
    if step.patches < 0:
        raise ShapeError("patches", step.patches, "must be 0 or more")
    image = step.patches / policy.merge_unit
    if not image <= step.shared_tokens < step.prompt_tokens:
        raise ShapeError(
            "shared_tokens",
            step.shared_tokens,
            f"must hold the {image:g} tokens of {step.patches:g} patches and be less than "
            f"prompt_tokens={step.prompt_tokens:g}; a smaller image or a longer prompt fits",
        )
    if (judge := step.judge) is not None:
        image = judge.patches / judge.policy.merge_unit
        if not 0 <= image <= judge.shared_tokens <= judge.tokens:
            rule = (
                f"must hold the {image:g} tokens of {judge.patches:g} patches and be at most "
                f"the {judge.tokens:g} tokens of the judge; a smaller image fits"
            )
            raise ShapeError("judge.shared_tokens", judge.shared_tokens, rule)
    for name, question in step.questions.items():
        if min(question.head, question.text) < 0 or min(question[2:5]) < 1:
            rule = "tail, reply and replies must be at least 1, head and text 0 or more"
            raise ShapeError(name, question, rule)


def training_cost(forward: Cost, recomputed: Number) -> Cost:
    """Returns the cost of a forward and a backward pass; both see the same images.

    Args:
      forward: the forward pass.
      recomputed: FLOPs that rematerialisation repeats in the backward pass.
    """
    return dataclasses.replace(forward.times(3), images=forward.images, recomputed=recomputed)


def question_cost(policy: Shapes, q: QuestionTokens, *, head: Number, before: Number) -> Cost:
    """Returns the cost of one question and its reply or candidates.

    The first token of a reply comes from the question's last state, and its last one is not read.

    Args:
      policy: its shapes.
      q: the question.
      head: tokens of its head that are not cached.
      before: tokens whose keys and values are cached already.
    """
    asked = head + q.text + q.tail
    reply = decoder_flops(policy, q.reply - 1, before=before + asked, logits=q.reply)
    return decoder_flops(policy, asked, before=before) + reply.times(q.replies)
