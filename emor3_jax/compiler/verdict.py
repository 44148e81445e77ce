"""The summary of reports: a table, a verdict on the step, and advice if it does not fit."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from emor3_jax.compiler import hlo
from emor3_jax.compiler.record import KINDS, Report
from emor3_jax.flops import Cost
from emor3_jax.models.family import Shapes
from emor3_jax.rewards.questions import QUESTIONS

_PHASES = {
    "prefill": ("vision", "prefill"),
    "decode": ("decode",),
    **{name: (name,) for name in QUESTIONS},
    "reference": ("reference",),
    "old": ("old",),
    "update": ("update",),
}
"""Program → the phases of `flops.phase_costs` that it executes."""

LEARNING = ("reference", "old", "update")
"""Programs whose temporaries grow with the micro-batch; those of the rollout, with the slots."""


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
    reports: Sequence[Report], config: ConfigDict, policy: Shapes, parts: int, usable: int
) -> str:
    """Returns whether all programs fit and, if not, what to change.

    Args:
      reports: of the programs.
      config: of the run.
      policy: its shapes.
      parts: into how many parts the mesh cuts a batch.
      usable: bytes of HBM of a device.
    """
    worst = max(reports, key=lambda report: report.needed)
    if all(report.fits(usable) for report in reports):
        return (
            f"fits: at most {_gib(worst.needed)} of {_gib(usable)} GiB a device are needed "
            f"({worst.name})"
        )
    lines = [
        f"does not fit: {report.name} needs {'at least ' if report.made is None else ''}"
        f"{_gib(report.needed)} of {_gib(usable)} GiB a device"
        for report in reports
        if not report.fits(usable)
    ]
    names = {report.name for report in reports if not report.fits(usable)}
    return "\n".join([*lines, *_advice(names, reports, config, policy, parts, usable)])


def _advice(
    names: set[str],
    reports: Sequence[Report],
    config: ConfigDict,
    policy: Shapes,
    parts: int,
    usable: int,
) -> list[str]:
    lines = []
    update, rollout = config.policy_update, config.rollout
    # What lies there without any cache, in the rollout and in the update.
    least = max(sum(r.resident.values()) - r.resident["cache"] for r in reports)
    if names & set(LEARNING):
        if update.micro_prompts > parts:
            lines.append(
                f"policy_update.micro_prompts={update.micro_prompts}: fewer prompts at once, "
                f"down to {parts}, the parts that the mesh cuts a batch into"
            )
        if update.remat != "layers":
            lines.append(f"policy_update.remat={update.remat!r}: 'layers' keeps the least")
        if update.logprob_chunk > 256:
            chunk = update.logprob_chunk
            lines.append(f"policy_update.logprob_chunk={chunk}: logits of fewer tokens at once")
    if names - set(LEARNING) and least <= usable:
        slots = min(rollout.slots or rollout.prompts, rollout.prompts)
        refill = min(rollout.refill or slots, slots)
        if slots > parts:
            lines.append(f"rollout.slots={slots}: fewer, down to {parts}")
        if refill > parts:
            lines.append(
                f"rollout.refill={refill}: fewer prompts prefilled and judged at once, down to "
                f"{parts}"
            )
    tensor = config.mesh.tensor
    if tensor < policy.num_kv_heads:
        lines.append(
            f"mesh.tensor={tensor}: {2 * tensor} halves the weights that decode, which are not cut "
            "over fsdp"
        )
    lines.append("or a larger slice: policy, optimizer and reference are cut over mesh.fsdp")
    return [f"  change {line}" if "mesh." in line or "=" in line else f"  {line}" for line in lines]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
