"""Compiles every program of a training step for TPUs or GPUs that need not be there.

    python -m emor3_jax.compile --config=configs/tpu_v4.py --topology=v4-32 [--search] \\
        [--only=decode,update | --only=help] [--json=FILE]

The TPU's own compiler (`pip install -e '.[compile]'`), or XLA's for GPUs (`'.[compile_gpu]'`,
`--topology=h100-1`), on any x86_64 Linux, compiles the programs that `train` runs, at the config's
real shapes, without weights, data or a device. Printed are, for each
program, the HBM of a device, the arithmetic of a step, what the collectives move and how long
compiling took; then whether the step fits and, if not, what to change. Exit status 1 says that it
does not fit. What is assumed stands in `emor3_jax/compiler/step.py`; docs/compile.md explains.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.compiler.record import Recorder, Report
from emor3_jax.compiler.search import search
from emor3_jax.compiler.step import step_programs
from emor3_jax.compiler.verdict import executed_flops, table, verdict
from emor3_jax.config import uses_reference
from emor3_jax.errors import RunError, UserError, os_error_text
from emor3_jax.files import is_file, is_folder
from emor3_jax.flops import Cost, phase_costs
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import topology
from emor3_jax.parallel.mesh import check_policy, make_mesh
from emor3_jax.parallel.topology import Topology
from emor3_jax.prepare.checks import check_batches, validate
from emor3_jax.prepare.shapes import (
    TemplateTokens,
    make_judge_shapes,
    make_step_shapes,
    read_policy_shapes,
)
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
      reports: of the programs that were compiled, in the order of a step.
      names: of all programs of the config.
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
        usable, total = self.topology.chip.usable, len(self.names)
        return verdict(self.reports, self.config, self.policy.shapes, self.parts, usable, total)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON; bytes and FLOPs are those of one device."""
        devices = self.topology.device_count
        return {
            "topology": self.topology.name,
            "devices": devices,
            "usable": self.topology.chip.usable,
            "policy": self.config.policy.path,
            "mesh": self.config.mesh.to_dict(),
            "rollout": {k: self.config.rollout[k] for k in ("prompts", "slots", "refill", "lanes")},
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
    config: ConfigDict,
    name: str,
    only: tuple[str, ...] = (),
    say: Callable[[Report], None] = lambda report: None,
    begin: Callable[[str], None] = lambda program: None,
) -> Compiled:
    """Compiles the programs of a step of a config.

    Args:
      config: of the run.
      name: of the topology.
      only: names or families of the programs to compile (`matches`); empty for all.
      say: told of each report.
      begin: told the name of each program before it is compiled.

    Raises:
      ConfigError, MeshError, TopologyError: before any compile, for what cannot be compiled.
    """
    place = find_place(config, name)
    slices, policy = place.topology, place.policy
    names: list[str] = []

    def wanted(program: str) -> bool:
        names.append(program)
        if only and not any(matches(x, program) for x in only):
            return False
        begin(program)
        return True

    reports = place.record(Recorder(place.mesh, wanted, say, slices.chip.usable))
    parts = place.mesh.shape["data"] * place.mesh.shape["fsdp"]
    costs = costs_of(config, policy, place.texts)
    return Compiled(slices, config, policy, parts, costs, reports, names)


class Place(NamedTuple):
    """A config on devices that need not be there.

    Attributes:
      topology: of the devices.
      config: of the run.
      policy: its shapes, with the attention of the platform.
      texts: tokens around judged texts.
      mesh: of the devices.
    """

    topology: Topology
    config: ConfigDict
    policy: Policy
    texts: TemplateTokens
    mesh: Mesh

    def record(self, recorder: Recorder) -> list[Report]:
        """Returns the reports of the programs that a recorder compiles."""
        with jax.set_mesh(self.mesh):
            recorder.run(step_programs(self.mesh, self.config, self.policy, self.texts.questions))
        return recorder.reports


def find_place(config: ConfigDict, name: str) -> Place:
    """Checks a config on a topology; arguments and errors as of `compile_config`."""
    slices = topology.parse(name)
    validate(config)
    policy, texts = read_policy_shapes(config)
    policy = prepare.with_attention(policy, config, slices.chip.platform)
    devices = slices.devices()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    check_policy(mesh, policy.shapes)
    check_batches(mesh, config)
    return Place(slices, config, policy, texts, mesh)


def program_names(place: Place) -> list[str]:
    """Returns the names of all programs of a run, in its order, without compiling any."""
    names: list[str] = []
    place.record(Recorder(place.mesh, lambda name: bool(names.append(name))))
    return names


def matches(name: str, program: str) -> bool:
    """Matches a program by its own name or by its family's, such as "evaluate" or "merge"."""
    return program == name or program.startswith(f"{name}.")


def listed(names: Sequence[str]) -> str:
    """Returns the names of programs and of their families, for people."""
    families = sorted({name.split(".")[0] for name in names if "." in name})
    said = f"Programs: {', '.join(dict.fromkeys(names))}."
    return f"{said} Whole families: {', '.join(families)}." if families else said


def costs_of(config: ConfigDict, policy: Policy, texts: TemplateTokens) -> dict[str, Cost]:
    """Returns what the longest step of a config costs, by phase."""
    update = config.policy_update
    step = make_step_shapes(config, policy.shapes, texts)
    return phase_costs(
        policy.shapes,
        make_judge_shapes(config, policy, step),
        reference=uses_reference(config),
        old=update.old_logprobs == "recompute",
        remat=update.remat == "layers",
        frozen_tower=config.policy.freeze_vision_tower,
    )


def check_output(file: Path) -> None:
    """Raises UserError, before minutes of compiling, for a file that cannot be written."""
    if is_folder(file):
        raise UserError(f"json={str(file)!r}: is a folder; name a file")
    if not is_folder(file.absolute().parent):
        raise UserError(f"json={str(file)!r}: the folder is not there; make it first")
    # A pipe or a device is opened once, when there is something to write.
    if is_file(file) or not os.path.lexists(file):
        there = is_file(file)
        try:
            file.open("a").close()
        except OSError as error:
            raise UserError(f"json={str(file)!r}: {os_error_text(error.errno)}") from error
        if not there:
            file.unlink()


def write_output(file: Path, text: str) -> None:
    """Writes a file.

    Raises:
      RunError: naming the file and the reason, such as a full disk.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise RunError(f"json={str(file)!r}: {os_error_text(error.errno)}") from error


def main(config: ConfigDict) -> None:
    """Compiles, prints, and ends with status 1 if the step does not fit."""
    given = flags.FLAGS
    if given.json:
        check_output(Path(given.json))
    if given.search:
        if wrong := [name for name in ("only", "json") if given[name].value]:
            rule = "--search compiles what it needs and prints what fits; leave this out"
            raise UserError(f"{wrong[0]}={given[wrong[0]].value!r}: {rule}")
        for line in search(config, given.topology, compile_config):
            print(line, flush=True)
        return
    only = tuple(name.strip() for name in given.only.split(",") if name.strip())
    if given.only and not only:
        raise UserError(f"only={given.only!r}: names no program; leave it out to compile all")
    if "help" in only and (len(only) > 1 or given.json):
        rule = "help lists the names and compiles nothing; leave other names and --json out"
        raise UserError(f"only={given.only!r}: {rule}")
    if only:
        # Names alone, in seconds: a wrong one is told before minutes of compiling.
        names = program_names(find_place(config, given.topology))
        if only == ("help",):
            print(listed(names))
            return
        if unknown := [x for x in only if not any(matches(x, program) for program in names)]:
            raise UserError(f"only={unknown[0]!r}: no program of this config. {listed(names)}")

    def say(report: Report) -> None:
        needed = f"{report.needed / 2**30:.2f} GiB"
        print(f"compiled {report.name}: {needed}", file=sys.stderr, flush=True)

    def begin(program: str) -> None:
        # A compiler that fails a check of its own ends the process: this names the program then.
        print(f"compiling {program}", file=sys.stderr, flush=True)

    found = compile_config(config, given.topology, only, say, begin)
    chip = found.topology.chip
    print(
        f"{found.topology.name}: {found.topology.device_count} devices, each with "
        f"{chip.usable / 2**30:.2f} GiB for programs ({chip.memory} GB a chip). GiB of a device; "
        "TFLOP of a step; collectives in GiB that a device receives in a call.\n"
    )
    print(found.table())
    print(f"\n{found.verdict()}")
    if given.json:
        write_output(Path(given.json), json.dumps(found.to_json(), indent=2) + "\n")
    if not found.fits:
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string(
        "topology", None, "TPU slice or GPUs, such as v4-32, 2xv5e-16 or h100-8.", required=True
    )
    flags.DEFINE_bool("search", False, "Find the largest micro-batch and slots that fit.")
    flags.DEFINE_string("only", "", "Programs or families, joined by commas; empty for all.")
    flags.DEFINE_string("json", "", "File for the same as JSON.")
    cli.run_without_workdir(main)
