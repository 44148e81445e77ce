"""Prints the cost of one training step of a config: tokens, vision passes and FLOPs by phase.

    python -m emor3_jax.account --config=configs/qwen_vl.py \\
        --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct --prompt_tokens=1024 --response_tokens=256

Counted from shapes: no weights and no data are read, and no device is needed. The policy's folder
gives its shapes and its tokenizer; published policies are known by their id on the hub, and nothing
is downloaded. Without `--prompt_tokens` and `--response_tokens` it is the longest step that the
config allows. The assumptions stand in `emor3_jax.flops.step` and `emor3_jax.prepare.shapes`.

    python -m emor3_jax.account --config=configs/tpu_v5e.py:3b,chips=64 --on=v5e-64

estimates the seconds of a step by phase on these devices, at mean lengths instead of the longest
(`emor3_jax.flops.seconds`); `--assume=padding=0.5,lanes=0.6` changes what is assumed, and
`--compiled=FILE`, of `emor3_jax.compile --json`, takes the collectives of compiled programs.
"""

import dataclasses
from pathlib import Path

import jax
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from emor3_jax.config import uses_reference
from emor3_jax.errors import UserError
from emor3_jax.files import is_file, read_json
from emor3_jax.flops import (
    Cost,
    JudgeShapes,
    QuestionTokens,
    StepShapes,
    phase_costs,
    total,
)
from emor3_jax.flops.seconds import (
    CHIPS,
    REASONS,
    AssumptionError,
    Assumptions,
    Machine,
    Moved,
    Phase,
    phase_seconds,
)
from emor3_jax.models.family import Shapes
from emor3_jax.parallel import topology
from emor3_jax.parallel.mesh import axis_sizes, check_policy
from emor3_jax.prepare.checks import check_batches, validate
from emor3_jax.prepare.shapes import make_judge_shapes, make_step_shapes, read_policy_shapes
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
    step = make_judge_shapes(config, policy, step)
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
            *_judge_line(step.judge),
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


def _judge_line(judge: JudgeShapes | None) -> tuple[str, ...]:
    if judge is None:
        return ()
    return (
        f"Asked of {judge.name}, which reads {judge.tokens:g} tokens of each prompt, "
        f"{judge.patches / judge.policy.merge_unit:g} of them the image.",
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step on devices that need not be there.

    Attributes:
      topology: of the devices.
      assumed: the assumptions.
      phases: phase → its seconds by each bound.
      moved: program → collectives that are taken of a compiled program.
      limited: assumptions that the config's own sizes replace.
    """

    topology: topology.Topology
    assumed: Assumptions
    phases: dict[str, Phase]
    moved: dict[str, Moved]
    limited: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of the step: its phases one after the other."""
        return sum(phase.seconds for phase in self.phases.values())

    def table(self) -> str:
        """Returns the phases and what is assumed as markdown."""
        lines = [
            f"An estimate, no measurement: {shown_seconds(self.seconds)} s a step on "
            f"{self.topology.name}.",
            "",
            "| phase | products s | memory s | links s | sums s | seconds | bound by |",
            "|---|---:|---:|---:|---:|---:|---|",
            *(
                f"| {name} | {x.flops:.2f} | {x.memory:.2f} | {x.links:.2f} | {x.sums:.2f} "
                f"| {x.seconds:.2f} | {x.bound} |"
                for name, x in self.phases.items()
            ),
            f"| sum | | | | | {self.seconds:.2f} | |",
            "",
            "| assumed | value | why |",
            "|---|---:|---|",
        ]
        for field, value in self.assumed._asdict().items():
            shown, reason = value, REASONS[field]
            if field == "lengths":
                shown = (
                    f"log-normal, mean {value.mean:g}, {value.cut:.1%} over {value.most}: "
                    f"{value.average:.0f} once cut at {value.longest}"
                )
                value = value._replace(limit=0)
            if field in self.limited:
                reason = "the longest that the config allows"
            elif value != Assumptions._field_defaults[field]:
                reason = "as given"
            lines.append(f"| {field} | {shown} | {reason} |")
        if self.moved:
            shown = ", ".join(self.moved)
            lines.append(f"| compiled collectives | {shown} | as given; others are counted |")
        chip = CHIPS[self.topology.kind]
        lines.append(
            f"| a device | {chip.flops / 1e12:.0f} TFLOP/s, {chip.memory / 1e9:.0f} GB/s, "
            f"{chip.links / 1e9:.0f} GB/s received | its makers' pages |"
        )
        return "\n".join(lines)


def shown_seconds(seconds: float) -> str:
    """Returns seconds with two digits at least, so that a tiny step does not take 0."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def estimate(
    config: ConfigDict, name: str, assumed: Assumptions, compiled: Path | None = None
) -> Estimate:
    """Estimates the seconds of a step of a config.

    Args:
      config: of the run.
      name: of a topology.
      assumed: the assumptions.
      compiled: file of `emor3_jax.compile --json`, whose collectives are taken.

    Raises:
      ConfigError, MeshError, TopologyError: if the config or the topology is wrong.
      UserError: if the file is not there, of something else, or of other devices.
    """
    slices = topology.parse(name)
    asked, assumed = assumed, within(assumed, config)
    limited = ("prompt_tokens",) if assumed.prompt_tokens < asked.prompt_tokens else ()
    mean = max(1, round(assumed.lengths.average))
    shapes, step, costs = step_costs(config, assumed.prompt_tokens, mean)
    found = f"are {slices.device_count} devices in {name}"
    sizes = axis_sizes(config.mesh.to_dict(), slices.device_count, slices.slices, found)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_policy(mesh, shapes)
    check_batches(mesh, config)
    slots = min(config.rollout.slots or step.prompts, step.prompts)
    machine = Machine(
        CHIPS[slices.kind],
        slices.device_count,
        sizes["tensor"],
        sizes["fsdp"],
        slots,
        min(config.rollout.lanes or slots * step.responses, slots * step.responses),
        min(config.rollout.refill or slots, slots),
        step.prompts // config.policy_update.micro_prompts,
        step.prompts // config.policy_update.prompts,
        config.rollout.weight_dtype == "int8",
    )
    policy, _ = read_policy_shapes(config)
    parameters = sum(x.size for x in jax.tree.leaves(policy.param_shapes()))
    moved = {} if compiled is None else _moved(compiled, name, config)
    phases = phase_seconds(shapes, step, costs, machine, assumed, parameters, moved)
    return Estimate(slices, assumed, phases, moved, limited)


def within(assumed: Assumptions, config: ConfigDict) -> Assumptions:
    """Returns assumptions whose prompts and responses are no longer than those of a config.

    Raises:
      AssumptionError: for other prompts than the default's that are longer.
    """
    lengths = assumed.lengths._replace(limit=config.rollout.max_tokens)
    longest = max(config.data.prompt_lengths)
    if longest < assumed.prompt_tokens != Assumptions().prompt_tokens:
        raise AssumptionError(
            f"assume=prompt_tokens={assumed.prompt_tokens}: no prompt of this config is over the "
            f"largest of data.prompt_lengths, {longest}; lower it, or raise those"
        )
    return assumed._replace(lengths=lengths, prompt_tokens=min(assumed.prompt_tokens, longest))


def _moved(file: Path, name: str, config: ConfigDict) -> dict[str, Moved]:
    """Returns program → its collectives, of those in a file whose text the compiler gave."""
    if not is_file(file):
        raise UserError(
            f"compiled={str(file)!r}: no such file; python -m emor3_jax.compile --json=FILE writes "
            "one"
        )
    found = read_json(file)
    try:
        # A program that does not fit has no compiled text to read them from.
        compiled = [x for x in found["programs"] if x["moved"] or x.get("fits", True)]
        moved = {x["name"]: _received(x["calls"], x["moved"]) for x in compiled}
        topology = found["topology"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "must be a file that python -m emor3_jax.compile --json wrote"
        raise UserError(f"compiled={str(file)!r}: {rule}") from error
    if topology != name:
        raise UserError(f"compiled={str(file)!r}: is of {topology}, not of on={name!r}")
    for field, today in {
        "policy": config.policy.path,
        "mesh": config.mesh.to_dict(),
        "micro_prompts": config.policy_update.micro_prompts,
        "rollout": {name: config.rollout[name] for name in ("prompts", "slots", "refill", "lanes")},
    }.items():
        if (then := found.get(field, today)) != today:
            raise UserError(
                f"compiled={str(file)!r}: is of {field}={then!r}, not of this config's {today!r}; "
                "compile it anew"
            )
    return moved


def _received(calls: int, kinds: dict[str, int]) -> Moved:
    received = {kind: int(calls) * float(size) for kind, size in kinds.items()}
    summed = received.get("all-reduce", 0.0)
    return Moved(sum(received.values()) - summed, summed)


def define_flags() -> None:
    """Defines the flags of the lengths, and of the estimate."""
    flags.DEFINE_integer("prompt_tokens", None, "P, those of the image included.")
    flags.DEFINE_integer("response_tokens", None, "T, of every response.")
    flags.DEFINE_string("on", "", "Devices to estimate seconds for, such as v5e-64 or h200-1.")
    flags.DEFINE_string("assume", "", "Other assumptions: padding=0.5,mean=400,…")
    flags.DEFINE_string("compiled", "", "File of emor3_jax.compile --json, for its collectives.")


def main(config: ConfigDict) -> None:
    """Prints the cost of a step of a config."""
    given = flags.FLAGS
    if not given.on:
        for flag in ("assume", "compiled"):
            if value := given[flag].value:
                raise UserError(f"{flag}={value!r}: is of an estimate; name devices, --on=v5e-64")
        print(report(*step_costs(config, given.prompt_tokens, given.response_tokens)))
        return
    for flag in ("prompt_tokens", "response_tokens"):
        if (value := given[flag].value) is not None:
            rule = "an estimate takes mean lengths; --assume=prompt_tokens=1024,mean=265"
            raise UserError(f"{flag}={value}: {rule}")
    assumed = Assumptions().changed(given.assume)
    compiled = Path(given.compiled) if given.compiled else None
    print(estimate(config, given.on, assumed, compiled).table())


if __name__ == "__main__":
    define_flags()
    cli.run_without_workdir(main)
