"""The summary of reports: a table, a verdict on the step, and advice if it does not fit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from emor3_jax.compiler import hlo
from emor3_jax.compiler.record import KINDS, Report
from emor3_jax.flops import Cost
from emor3_jax.models.family import Shapes
from emor3_jax.rewards.questions import QUESTIONS

_PHASES = {
    "prefill": ("vision", "prefill"),
    "decode": ("decode",),
    "judge.prefill": ("judge",),
    **{name: (name,) for name in QUESTIONS},
    "reference": ("reference",),
    "old": ("old",),
    "update": ("update",),
}
"""Program → the phases of `flops.phase_costs` that it executes."""

LEARNING = ("reference", "old", "update", "update_packed")
"""Programs whose temporaries grow with the micro-batch; those of the rollout, with the slots."""

BY_REFILL = ("prefill", "take_part", "open_flight", "admit", "take_out", "spans", *QUESTIONS)
"""Programs whose temporaries grow with `rollout.refill`."""


def table(reports: Sequence[Report], costs: Mapping[str, Cost], devices: int, usable: int) -> str:
    """Returns a markdown table of the programs.

    Args:
      reports: of the programs.
      costs: phase → what a step costs on all devices.
      devices: that share it.
      usable: bytes of HBM of a device.
    """
    header = ["program", "calls", *KINDS, "temporaries", "in all", "TFLOP", *hlo.KINDS, "compiled"]
    lines = [
        f"| {' | '.join(header)} |",
        f"|---|{'---:|' * (len(header) - 1)}",
        *(_row(report, costs, devices, usable) for report in reports),
    ]
    return "\n".join(lines)


def executed_flops(name: str, costs: Mapping[str, Cost]) -> float:
    """Returns the FLOPs that all calls of a program execute in a step, 0 where none are counted."""
    return sum(costs[phase].executed for phase in _PHASES.get(name, ()) if phase in costs)


def _row(report: Report, costs: Mapping[str, Cost], devices: int, usable: int) -> str:
    flops = executed_flops(report.name, costs) / devices / 1e12
    cells = [
        report.name,
        str(report.calls),
        *(_gib(report.resident[kind]) for kind in KINDS),
        "?" if report.made is None else _gib(report.made),
        f"{_gib(report.needed)}{'' if report.fits(usable) else ' **no**'}",
        f"{flops:,.1f}" if flops else "",
        *(f"{report.moved[k] / 2**30:.3g}" if k in report.moved else "" for k in hlo.KINDS),
        f"{report.lowering + report.compiling:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def verdict(
    reports: Sequence[Report],
    config: ConfigDict,
    policy: Shapes,
    parts: int,
    usable: int,
    programs: int,
) -> str:
    """Returns whether all programs fit and, if not, what to change for each that does not.

    Args:
      reports: of the programs that were compiled.
      config: of the run.
      policy: its shapes.
      parts: into how many parts the mesh cuts a batch.
      usable: bytes of HBM of a device.
      programs: of the config, compiled or not.
    """
    over = [report for report in reports if not report.fits(usable)]
    if not over:
        worst = max(reports, key=lambda report: report.needed)
        some = f", as far as compiled ({len(reports)} of {programs} programs)"
        return (
            f"fits{some if len(reports) < programs else ''}: at most {_gib(worst.needed)} of "
            f"{_gib(usable)} GiB a device are needed ({worst.name})"
        )
    lines = []
    for report in over:
        lines.append(
            f"does not fit: {report.name} needs {'at least ' if report.made is None else ''}"
            f"{_gib(report.needed)} of {_gib(usable)} GiB a device"
        )
        changes = _changes(report, config, policy, parts)
        lines += [f"  change {field}={value!r}: {rule}" for field, value, rule in changes]
    lines.append("or more devices: policy, optimizer and reference are cut over mesh.fsdp")
    return "\n".join(lines)


def _changes(
    report: Report, config: ConfigDict, policy: Shapes, parts: int
) -> Iterator[tuple[str, Any, str]]:
    """Yields field, value and rule of what makes a program smaller."""
    update, rollout = config.policy_update, config.rollout
    family, _, name = report.name.rpartition(".")
    slots = min(rollout.slots or rollout.prompts, rollout.prompts)
    refill = min(rollout.refill or slots, slots)
    held = {kind: size for kind, size in report.resident.items() if size}
    if family == "evaluate" and config.evaluate.prompts > parts:
        yield "evaluate.prompts", config.evaluate.prompts, f"fewer at once, down to {parts}"
    if name in LEARNING:
        if update.micro_prompts > parts:
            rule = f"fewer prompts at once, down to {parts}, the parts of the mesh"
            yield "policy_update.micro_prompts", update.micro_prompts, rule
        if update.remat != "layers":
            yield "policy_update.remat", update.remat, "'layers' keeps the least"
        if update.logprob_chunk > 256:
            yield "policy_update.logprob_chunk", update.logprob_chunk, "logits of fewer tokens"
    elif family != "evaluate" and name != "weight_sync":
        lanes = min(rollout.lanes or slots * rollout.responses, slots * rollout.responses)
        if held.get("cache") and lanes > parts:
            yield "rollout.lanes", lanes, f"fewer responses in flight, down to {parts}"
        if held.get("cache") and slots > parts:
            yield "rollout.slots", slots, f"fewer prompts in flight, down to {parts}"
        if name in BY_REFILL and refill > parts:
            rule = f"fewer prompts prefilled and judged at once, down to {parts}"
            yield "rollout.refill", refill, rule
    # What is a small share of the whole is no way out.
    quarter = report.needed / 4
    if not config.policy.lora_rank and held.get("optimizer", 0) > quarter:
        rule = f"adapters, such as 64, spare most of {_gib(held['optimizer'])} GiB of the optimizer"
        yield "policy.lora_rank", 0, rule
    if held.get("data", 0) > quarter:
        rule = f"fewer images at once: {_gib(held['data'])} GiB are data"
        yield "rollout.prompts", rollout.prompts, rule
    tensor = config.mesh.tensor
    whole = name not in LEARNING and held.get("parameters", 0) > quarter
    # One device has none to share a matrix with.
    if whole and parts > 1 and tensor < policy.num_kv_heads:
        rule = f"{2 * tensor} halves the weights that decode, which are not cut over fsdp"
        yield "mesh.tensor", tensor, rule


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
