"""Prints the cost of one training step of a config: tokens, vision passes and FLOPs by phase.

    python -m emor3_jax.account --config=configs/qwen2_5_vl_3b.py \\
        --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct --prompt_tokens=1024 --response_tokens=256

Counted from shapes: no weights and no data are read, and no device is needed. The policy's folder
gives its shapes and its tokenizer; published policies are known by their id on the hub, and nothing
is downloaded. Without `--prompt_tokens` and `--response_tokens` it is the longest step that the
config allows. The assumptions stand in `emor3_jax.flops.step` and `emor3_jax.prepare.shapes`.
"""

from absl import flags
from ml_collections import ConfigDict

from emor3_jax.config import uses_reference
from emor3_jax.flops import Cost, QuestionTokens, StepShapes, phase_costs, total
from emor3_jax.models.family import Shapes
from emor3_jax.prepare.checks import validate
from emor3_jax.prepare.shapes import make_step_shapes, read_policy_shapes
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.runtime import cli


def phase_table(costs: dict[str, Cost]) -> str:
    """Returns a markdown table of the phases, with their sum."""
    everything = total(costs)
    lines = [
        "| phase | decoder tokens | vision passes | images | linear TFLOP | attention TFLOP "
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


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


def step_costs(
    config: ConfigDict, prompt_tokens: int | None, response_tokens: int | None
) -> tuple[Shapes, StepShapes, dict[str, Cost]]:
    """Returns the policy's shapes, those of a step of a config, and its cost by phase.

    Args:
      config: of the run.
      prompt_tokens, response_tokens: as of `make_step_shapes`.

    Raises:
      ConfigError: if the config is wrong or its policy unknown.
      ShapeError: for lengths that no step can have.
    """
    validate(config)
    policy, texts = read_policy_shapes(config)
    step = make_step_shapes(config, policy.shapes, texts, prompt_tokens, response_tokens)
    costs = phase_costs(
        policy.shapes,
        step,
        reference=uses_reference(config),
        kept=config.reference.image_cache > 0,
        old=config.policy_update.old_logprobs == "recompute",
        remat=config.policy_update.remat == "layers",
        frozen_tower=config.policy.freeze_vision_tower,
    )
    return policy.shapes, step, costs


def report(policy: Shapes, step: StepShapes, costs: dict[str, Cost]) -> str:
    """Returns the shapes and costs of `step_costs` as markdown."""
    return "\n".join(
        [
            f"{step.prompts} prompts of {step.prompt_tokens} tokens, "
            f"{step.patches // policy.merge_unit} of them an image of {step.patches} "
            f"patches; {step.responses} responses to each of {step.response_tokens} tokens.",
            *(_question_line(name, step.questions.get(name)) for name in QUESTIONS),
            "",
            "grouped: this program",
            "",
            phase_table(costs),
        ]
    )


def _question_line(name: str, q: QuestionTokens | None) -> str:
    if q is None:
        return f"No {name} question."
    candidates = f", {q.replies} candidates" if q.replies > 1 else ""
    return f"{name}: {q.head} + {q.text} + {q.tail} tokens, reply {q.reply}{candidates}."


def define_flags() -> None:
    """Defines the flags of the lengths: `--prompt_tokens` and `--response_tokens`."""
    flags.DEFINE_integer("prompt_tokens", None, "P, those of the image included.")
    flags.DEFINE_integer("response_tokens", None, "T, of every response.")


def main(config: ConfigDict) -> None:
    """Prints the cost of a step of a config."""
    print(report(*step_costs(config, flags.FLAGS.prompt_tokens, flags.FLAGS.response_tokens)))


if __name__ == "__main__":
    define_flags()
    cli.run_without_workdir(main)
