"""What the programs that train share: how a run opens, looks at held-out data, and ends.

run = Run.open("train", config, workdir)
state = run.resume(TrainState.create(...))
run.look_before(params)
...                                      # the program's own loop, from run.step on
run.finish(params)
"""

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.checks import validate
from emor3_jax.data.batch import Batch
from emor3_jax.episode import Actor
from emor3_jax.evaluate import evaluate
from emor3_jax.io import report
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console, duration
from emor3_jax.io.evaluation import Evaluation, from_json, prediction_file, to_json
from emor3_jax.io.metrics import MetricWriter
from emor3_jax.models import Policy, save
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import check_batch, make_mesh
from emor3_jax.prepare import CompileCounter, Data
from emor3_jax.reference import Reference


@dataclasses.dataclass
class Run:
    """A run of a program that trains, in its folder.

    Attributes:
      config, workdir: of the run.
      say: prints a line.
      compiles: counts compiled programs.
      mesh: of the devices.
      policy: what training starts from.
      data: of the run.
      actors: name of an evaluation set → actor for its labels.
      checkpoints: under `workdir/checkpoints`.
      step: steps done.
      progress: JSON that checkpoints hold beside the state; empty before the first one.
      writer: of metrics; opened by `resume`.
    """

    config: ConfigDict
    workdir: Path
    say: Console
    compiles: CompileCounter
    mesh: Mesh
    policy: Policy
    data: Data
    actors: dict[str, Actor]
    checkpoints: Checkpoints
    step: int = 0
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    writer: MetricWriter | None = None

    @classmethod
    def open(cls, program: str, config: ConfigDict, workdir: Path) -> "Run":
        """Checks the config, loads the policy onto the mesh and opens the data.

        Raises:
          ConfigError, DataError, MeshError: before any compile, for a config that cannot run.
        """
        validate(config)
        say = Console(program)
        compiles = prepare.start_jax(config.log.compile_cache)
        prepare.check_hosts(config)
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        # For attention kernels, which must be told what part of a batch is a device's.
        jax.set_mesh(mesh)
        for section in ("rollout", "policy_update", "evaluate"):
            check_batch(mesh, f"{section}.prompts", config[section].prompts)
        for field in ("slots", "refill"):
            check_batch(mesh, f"rollout.{field}", config.rollout[field])
        check_batch(mesh, "policy_update.micro_prompts", config.policy_update.micro_prompts)
        if hosts.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
        say(f"loading the policy {config.policy.path}")
        policy = prepare.load_policy(config, say, mesh)
        say("opening the data")
        data = prepare.open_data(config, policy, mesh)
        prepare.keep_config(config, workdir)
        say("building the reward tables")
        actors = {
            name: prepare.make_actor(config, policy, data.labels[name]) for name in data.evaluate
        }
        checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        return cls(config, workdir, say, compiles, mesh, policy, data, actors, checkpoints)

    def put(self, batch: Batch) -> Batch:
        """Places a batch of host arrays on the devices."""
        return prepare.place_batch(batch, self.mesh, self.config)

    def resume(self, state: Any, reference: Reference | None = None) -> Any:
        """Returns the state to begin with: this one, or that of the newest checkpoint.

        Args:
          state: pytree of arrays, as before the first step.
          reference: gets back its parameters too, if they follow the policy.
        """
        if (latest := self.checkpoints.latest()) is not None:
            self.say(f"going on from the checkpoint of step {latest}")
            held = _held(state, reference)
            held, self.progress = self.checkpoints.restore(latest, held, self.mesh)
            state = held
            if reference is not None and reference.follows:
                state, reference.params = held["state"], held["reference"]
            self.data.train.set_state(self.progress["data"])
            self.step = latest
        config, first = self.config, self.step + bool(self.progress)
        self.writer = MetricWriter(self.workdir, config.log.sinks, first_step=first)
        return state

    def save(
        self,
        step: int,
        state: Any,
        progress: dict[str, Any],
        reference: Reference | None = None,
    ) -> None:
        """Writes a checkpoint.

        Args:
          step: steps done.
          state: pytree of arrays.
          progress: JSON to hold beside the evaluations so far: the data's position, and more.
          reference: its parameters belong to the checkpoint if they follow the policy.
        """
        progress = self.progress | progress
        if reference is not None and reference.follows:
            progress["reference"] = True
        self.checkpoints.save(step, _held(state, reference), progress)

    def look(
        self, params: dict, names: tuple[str, ...], step: int, limit: int = 0
    ) -> dict[str, Evaluation]:
        """Evaluates a policy, and writes each response to `workdir/predictions/<step>`.

        Args:
          params: of the policy.
          names: of the evaluation sets.
          step: steps done.
          limit: at most so many rows of each; 0 is all.
        """
        found = {}
        for name in names:
            path = self.workdir / "predictions" / f"{step:06d}" / f"{name}.jsonl"
            with prediction_file(path) as record:
                found[name] = evaluate(
                    self.actors[name],
                    params,
                    self.data.evaluate[name].take(limit) if limit else self.data.evaluate[name],
                    self.config.seed,
                    rule=prepare.evaluation_rule(self.config, self.policy),
                    plan=prepare.evaluation_plan(self.config),
                    put=self.put,
                    keep=report.SAMPLES,
                    graded=self.config.evaluate.sets[name].graded,
                    votes=self.config.evaluate.votes,
                    record=record,
                )
        return found

    def look_before(self, params: dict) -> None:
        """Evaluates the policy before the first step, unless the run goes on from one."""
        if self.progress:
            return
        names = tuple(self.config.evaluate.sets)
        self.say(f"evaluating before training ({', '.join(names)}); the first batch compiles")
        before = self.look(params, names, 0)
        self.progress = {"before": to_json(before)}
        self.writer.write(0, evaluation_metrics(before))
        self.say(evaluation_line(before))

    def look_during(self, params: Callable[[], dict], step: int) -> dict[str, float]:
        """Evaluates on rows of the first set where a step is due; returns the metrics.

        Args:
          params: returns the policy's.
          step: steps done.
        """
        config = self.config
        names = tuple(config.evaluate.sets)[:1]
        if step % config.evaluate.every or step >= config.steps or not names:
            return {}
        now = self.look(params(), names, step, config.evaluate.during)
        self.say(evaluation_line(now))
        return evaluation_metrics(now)

    def stopped(self, step: int) -> dict[str, dict[str, Evaluation]]:
        """Ends a run that was asked to stop; returns what a program then returns."""
        self.checkpoints.close()
        self.writer.close()
        self.say(f"stopped after step {step} as asked; start again with this workdir to go on")
        return {}

    def finish(self, params: dict, step: int) -> dict[str, dict[str, Evaluation]]:
        """Evaluates, writes the report and the policy's folder, and closes what is open.

        Args:
          params: of the trained policy.
          step: the last one.

        Returns:
          {"before": {data set: Evaluation}, "after": {…}}.
        """
        self.checkpoints.close()
        names, workdir = tuple(self.config.evaluate.sets), self.workdir
        self.say("evaluating after training")
        before, after = from_json(self.progress["before"]), self.look(params, names, step)
        self.writer.add_events(step, evaluation_metrics(after))
        self.writer.close()
        metrics = [{name: e.metrics for name, e in each.items()} for each in (before, after)]
        if hosts.is_first():
            (workdir / "evaluations.json").write_text(json.dumps(metrics, indent=2) + "\n")
            images = {name: self.data.image(name) for name in names}
            report.write_report(workdir, f"EMO-R3: {workdir.name}", before, after, images)
        save(Policy(self.policy.config, params, self.policy.processor), workdir / "policy")
        for line in report.before_after_table(before, after).splitlines():
            self.say(line)
        self.say(f"report: {workdir / 'report.html'}   trained policy: {workdir / 'policy'}")
        return {"before": before, "after": after}


class StopSignal:
    """Turns SIGTERM and SIGINT into a wish to stop after the step, once; a second one stops now."""

    def __init__(self) -> None:
        self.asked = False
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._hear) for number in numbers}

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def restore(self) -> None:
        """Puts back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Pace:
    """Tells how long the rest takes, from the mean of the steps so far."""

    def __init__(self, first: int, last: int) -> None:
        """Starts now.

        Args:
          first: steps done before.
          last: the step that it ends with.
        """
        self._first, self._last, self._started = first, last, time.perf_counter()

    def left(self, step: int) -> str:
        """Returns the time that is left after a step, for people to read."""
        spent = time.perf_counter() - self._started
        return duration(spent / (step - self._first) * (self._last - step))


def _held(state: Any, reference: Reference | None) -> Any:
    """Returns what a checkpoint holds: the state, with a reference that follows the policy both."""
    if reference is None or not reference.follows:
        return state
    return {"state": state, "reference": reference.params}


def evaluation_metrics(results: dict[str, Evaluation]) -> dict[str, float]:
    """Returns `eval/<data set>/<metric>` → value."""
    return {
        f"eval/{name}/{metric}": value
        for name, result in results.items()
        for metric, value in result.metrics.items()
    }


def evaluation_line(results: dict[str, Evaluation]) -> str:
    """Returns the main metrics of each data set in one line."""
    shown = ("accuracy", "format", "coherence", "consistency", "decoupling")
    return "; ".join(
        f"{name}: " + "  ".join(f"{m} {r.metrics[m]:.3f}" for m in shown if m in r.metrics)
        for name, r in results.items()
    )
