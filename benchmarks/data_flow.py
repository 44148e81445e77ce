"""Cost of a training step beside the data flow of the authors' release, counted from shapes.

    python -m benchmarks.data_flow --config=configs/qwen_vl.py \\
        --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct --prompt_tokens=1024 --response_tokens=256

Prints what `emor3_jax.account` prints, then the release's step and how many times as much it costs.

The release's data flow was read in its published code (EasyR1 with vLLM 0.8 or later): G samples by
one request per prompt; the responses then spread over the engines by length; both reflections as
new requests, one per response, with the image attached again to each of the second; old, reference
and update passes over `[prompt | response]` of each response with an image of its own, layers
checkpointed, logits of every token. Four layouts differ in how much the engines share:

    release           An engine reads a prompt once for its G samples. Questions share nothing.
    release_spread    A prefix cache besides, as vLLM has by default: questions share their common
                      prefix if they meet in one of the 8 engines, each equally likely.
    release_cached    All questions about an image meet in one engine, as on a single GPU: system
                      turn and image are read once, the head of the coherence question once a
                      batch. Bounds the count from below.
    release_uncached  The engines share nothing, as if G copies of each prompt were generated from.

Assumptions, numbered, beside those of `emor3_jax.flops.step`:
 1. The release rematerialises each layer with its attention.
 2. The questions are of equal length in all layouts. The release opens its coherence question with
    the text; here it has this program's head before it.
 3. The release samples its replies, also where this program scores candidates.
"""

from absl import flags
from ml_collections import ConfigDict

from emor3_jax import account
from emor3_jax.config import uses_reference
from emor3_jax.flops import Cost, ShapeError, StepShapes, phase_costs, total
from emor3_jax.flops.cost import (
    decoder_flops,
    decoder_linear_flops,
    vision_flops,
)
from emor3_jax.flops.step import check_shapes, question_cost, training_cost
from emor3_jax.models.family import Shapes
from emor3_jax.runtime import cli

LAYOUTS = ("grouped", "release", "release_spread", "release_cached", "release_uncached")
"""This program, and the release's data flow under four assumptions about its engines."""

_ENGINES = 8
"""Of the release: one on each GPU of its machine."""


def layout_costs(
    policy: Shapes,
    step: StepShapes,
    layout: str,
    *,
    reference: bool = True,
    kept: bool = False,
    remat: bool = True,
) -> dict[str, Cost]:
    """Returns the cost of each phase in one step of a layout.

    Args:
      policy: its shapes.
      step: its shapes.
      layout: one of `LAYOUTS`.
      reference, kept, remat: as of `phase_costs`; the release never keeps vision features.

    Raises:
      ShapeError: for an unknown layout, or shapes that no step can have.
    """
    if layout not in LAYOUTS:
        raise ShapeError("layout", layout, f"must be one of {', '.join(LAYOUTS)}")
    if layout == "grouped":
        return phase_costs(policy, step, reference=reference, kept=kept, remat=remat)
    check_shapes(policy, step)
    costs = _release(policy, step, layout, remat)
    return costs if reference else costs | {"reference": Cost()}


def _release(policy: Shapes, s: StepShapes, layout: str, remat: bool) -> dict[str, Cost]:
    b, rows = s.prompts, s.prompts * s.responses
    p, t = s.prompt_tokens, s.response_tokens
    image = vision_flops(policy, s.patches)
    # Number of times that a prompt, the common prefix of the questions about its image, and the
    # head of the coherence question are read. Of G questions, those in the same one of E engines
    # read it once: the expected number of engines that see one is E (1 - (1 - 1 / E) ** G).
    prompts = rows if layout == "release_uncached" else b
    shared, heads = {
        "release_spread": (b * _ENGINES * (1 - (1 - 1 / _ENGINES) ** s.responses), _ENGINES),
        "release_cached": (b, 1),
    }.get(layout, (rows, rows))
    questions = {}
    if "coherence" in s.questions:
        q = s.questions["coherence"]._replace(replies=1)
        each = question_cost(policy, q, head=0, before=q.head)
        head = decoder_flops(policy, q.head).times(min(heads, rows))
        questions["coherence"] = head + each.times(rows)
    if "consistency" in s.questions:
        q = s.questions["consistency"]._replace(replies=1)
        each = question_cost(policy, q, head=q.head, before=s.shared_tokens)
        prefix = image + decoder_flops(policy, s.shared_tokens)
        questions["consistency"] = prefix.times(shared) + each.times(rows)
    # All of prompt and response, with logits of every token.
    score = (image + decoder_flops(policy, p + t, logits=p + t)).times(rows)
    recomputed = 0
    if remat:
        layers = decoder_linear_flops(policy, p + t) + policy.vision.layer_flops(s.patches)
        recomputed = rows * layers + score.attention
    return {
        "vision": image.times(prompts),
        # Logits of a prompt's last token only.
        "prefill": decoder_flops(policy, p, logits=1).times(prompts),
        # The last token of a response is never read.
        "decode": decoder_flops(policy, t - 1, before=p, logits=t - 1).times(rows),
        **questions,
        "old": score,
        "reference": score,
        "update": training_cost(score, recomputed),
    }


def ratio_table(costs: dict[str, dict[str, Cost]]) -> str:
    """Returns a markdown table of the cost of each layout as a multiple of that of "grouped".

    Args:
      costs: layout → phase → cost; "grouped" and others.
    """
    lines = [
        "| beside grouped | decoder tokens | vision passes | images | model FLOPs "
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


def report(config: ConfigDict, prompt_tokens: int | None, response_tokens: int | None) -> str:
    """Returns the comparison for a config as markdown; arguments and errors of `step_costs`."""
    policy, step, grouped = account.step_costs(config, prompt_tokens, response_tokens)
    options = {
        "reference": uses_reference(config),
        "remat": config.policy_update.remat == "layers",
    }
    release = {x: layout_costs(policy, step, x, **options) for x in LAYOUTS if x != "grouped"}
    return "\n".join(
        [
            account.report(policy, step, grouped),
            "",
            "release: the data flow of the release, whose engines read a prompt once for G samples",
            "",
            account.phase_table(release["release"]),
            "",
            "How many times as much as grouped, under four assumptions about the engines:",
            "",
            ratio_table({"grouped": grouped, **release}),
        ]
    )


def main(config: ConfigDict) -> None:
    """Prints the comparison."""
    print(report(config, flags.FLAGS.prompt_tokens, flags.FLAGS.response_tokens))


if __name__ == "__main__":
    account.define_flags()
    cli.run_without_workdir(main)
