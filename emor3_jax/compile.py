"""Compiles every program of a training step for a TPU slice that need not be there.

    python -m emor3_jax.compile --config=configs/tpu_v4.py --topology=v4-32 [--search] \\
        [--only=decode,update] [--json=FILE]

The TPU's own compiler (`pip install -e '.[compile]'`, any x86_64 Linux) compiles the programs that
`train` runs, at the config's real shapes, without weights, data or a TPU. Printed are, for each
program, the HBM of a device, the arithmetic of a step, what the collectives move and how long
compiling took; then whether the step fits and, if not, what to change. Exit status 1 says that it
does not fit. What is assumed stands in `emor3_jax/compiler/step.py`; docs/compile.md explains.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.compiler.record import Recorder, Report
from emor3_jax.compiler.search import search
from emor3_jax.compiler.step import step_programs
from emor3_jax.compiler.verdict import executed_flops, table, verdict
from emor3_jax.config import uses_reference
from emor3_jax.errors import UserError
from emor3_jax.flops import Cost, phase_costs
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import topology
from emor3_jax.parallel.mesh import check_batch, check_policy, make_mesh
from emor3_jax.parallel.topology import Topology
from emor3_jax.prepare.checks import validate
from emor3_jax.prepare.shapes import TemplateTokens, make_step_shapes, read_policy_shapes
from emor3_jax.runtime import cli


@dataclasses.dataclass
class Compiled:
    """The compiler's findings for a config on a topology.

    Attributes:
      topology: the slices.
      config: of the run.
      policy: its shapes.
      parts: into how many parts the mesh cuts a batch.
      costs: phase → what a step costs, at the longest shapes.
      reports: of the programs, in the order of a step.
      names: of all programs of the config, compiled or not.
    """

    topology: Topology
    config: ConfigDict
    policy: Policy
    parts: int
    costs: dict[str, Cost]
    reports: list[Report]
    names: list[str]

    @property
    def fits(self) -> bool:
        """True if all programs that were compiled fit."""
        return all(report.fits(self.topology.chip.usable) for report in self.reports)

    def table(self) -> str:
        """Returns the programs as a markdown table; sizes in GiB of a device."""
        return table(
            self.reports, self.costs, self.topology.device_count, self.topology.chip.usable
        )

    def verdict(self) -> str:
        """Returns whether the step fits, and what to change if not."""
        usable = self.topology.chip.usable
        return verdict(self.reports, self.config, self.policy.shapes, self.parts, usable)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON; bytes and FLOPs are those of one device."""
        devices = self.topology.device_count
        return {
            "topology": self.topology.name,
            "devices": devices,
            "usable": self.topology.chip.usable,
            "policy": self.config.policy.path,
            "mesh": self.config.mesh.to_dict(),
            "rollout": {k: self.config.rollout[k] for k in ("prompts", "slots", "refill")},
            "micro_prompts": self.config.policy_update.micro_prompts,
            "fits": self.fits,
            "programs": [
                {
                    "name": report.name,
                    "calls": report.calls,
                    "resident": report.resident,
                    "made": report.made,
                    "needed": report.needed,
                    "fits": report.fits(self.topology.chip.usable),
                    "flops_a_step": executed_flops(report.name, self.costs) / devices,
                    "moved": report.moved,
                    "seconds": round(report.lowering + report.compiling, 1),
                }
                for report in self.reports
            ],
        }


def compile_config(
    config: ConfigDict, name: str, only: tuple[str, ...] = (), say: Any = lambda report: None
) -> Compiled:
    """Compiles the programs of a step of a config.

    Args:
      config: of the run.
      name: of the topology.
      only: the programs to compile; empty for all.
      say: told of each report.

    Raises:
      ConfigError, MeshError, TopologyError: before any compile, for what cannot be compiled.
    """
    slices = topology.parse(name)
    validate(config)
    policy, texts = read_policy_shapes(config)
    policy = prepare.with_attention(policy, config, "tpu")
    devices = slices.devices()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    check_policy(mesh, policy.shapes)
    for field in ("prompts", "slots", "refill"):
        check_batch(mesh, f"rollout.{field}", config.rollout[field])
    for field in ("prompts", "micro_prompts"):
        check_batch(mesh, f"policy_update.{field}", config.policy_update[field])
    check_batch(mesh, "evaluate.prompts", config.evaluate.prompts)

    names: list[str] = []

    def wanted(program: str) -> bool:
        names.append(program)
        return not only or program in only

    record = Recorder(mesh, wanted, say, slices.chip.usable)
    with jax.set_mesh(mesh):
        record.run(step_programs(mesh, config, policy, texts.questions))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    costs = costs_of(config, policy, texts)
    return Compiled(slices, config, policy, parts, costs, record.reports, names)


def costs_of(config: ConfigDict, policy: Policy, texts: TemplateTokens) -> dict[str, Cost]:
    """Returns what the longest step of a config costs, by phase."""
    update = config.policy_update
    return phase_costs(
        policy.shapes,
        make_step_shapes(config, policy.shapes, texts),
        reference=uses_reference(config),
        old=update.old_logprobs == "recompute",
        remat=update.remat == "layers",
    )


def main(config: ConfigDict) -> None:
    """Compiles, prints, and ends with status 1 if the step does not fit."""
    given = flags.FLAGS
    if given.search:
        for line in search(config, given.topology, compile_config):
            print(line, flush=True)
        return
    only = tuple(name.strip() for name in given.only.split(",") if name.strip())

    def say(report: Report) -> None:
        needed = f"{report.needed / 2**30:.2f} GiB"
        print(f"compiled {report.name}: {needed}", file=sys.stderr, flush=True)

    found = compile_config(config, given.topology, only, say)
    if unknown := sorted(set(only) - set(found.names)):
        rule = f"no program of this config; choose among {', '.join(sorted(set(found.names)))}"
        raise UserError(f"only={unknown[0]!r}: {rule}")
    chip = found.topology.chip
    print(
        f"{found.topology.name}: {found.topology.device_count} devices, each with "
        f"{chip.usable / 2**30:.2f} GiB for programs ({chip.memory} GB a chip). GiB of a device; "
        "TFLOP of a step; collectives in GiB that a device receives in a call.\n"
    )
    print(found.table())
    print(f"\n{found.verdict()}")
    if given.json:
        Path(given.json).write_text(json.dumps(found.to_json(), indent=2) + "\n")
    if not found.fits:
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "TPU slice, such as v4-32 or 2xv5e-16.", required=True)
    flags.DEFINE_bool("search", False, "Find the largest micro-batch and slots that fit.")
    flags.DEFINE_string("only", "", "Programs to compile, joined by commas; empty for all.")
    flags.DEFINE_string("json", "", "File for the same as JSON.")
    cli.run_without_workdir(main)
