"""A run of a program that trains: everything around the algorithm.

with Run("train", config, workdir) as run:       # an error lets go of signals and files
    learner, state = …
    state = run.start(learner, state)            # resumes; evaluates before the first step
    for step, prompts in run.steps():            # ends on a stop signal
        …
        run.record(step, observed, updates, info)
        run.evaluate(step, learner, state)
        run.save(step, learner, state)
    return run.finish(params)

Asked to stop, `steps` ends after a step, or `Stopped` is raised between the phases of a step or the
batches of an evaluation; either way the last step that was finished is saved.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from ml_collections import ConfigDict

from emor3_jax import flops, prepare
from emor3_jax.config import ConfigError
from emor3_jax.data.batch import Prompts
from emor3_jax.data.inference_settings import FILE
from emor3_jax.evaluation.records import Evaluation, from_json, to_json
from emor3_jax.io import report
from emor3_jax.io.card import CARD_FILE
from emor3_jax.io.checkpoints import Checkpoints, DamagedError, release
from emor3_jax.io.console import Console
from emor3_jax.io.metrics import MetricWriter, memory
from emor3_jax.learner.learner import Learner
from emor3_jax.models.processor import Processor
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.prepare.checks import check_batches, validate
from emor3_jax.prepare.inference import inference_settings
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout.judge import Judge
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.runtime import job, replays
from emor3_jax.runtime.card import card_of_run
from emor3_jax.runtime.evaluator import Evaluator
from emor3_jax.runtime.failures import close_all, raise_failure
from emor3_jax.runtime.guards import GuardError, Watch
from emor3_jax.runtime.policy_folder import save_whole
from emor3_jax.runtime.progress import (
    Pace,
    StepClock,
    evaluation_lines,
    evaluation_metrics,
    start_trace,
)
from emor3_jax.runtime.step_log import StepRecord, progress_line
from emor3_jax.runtime.stopping import MaintenanceWatch, Stopped, StopSignal
from emor3_jax.types import Batch, Observed

Results = dict[str, dict[str, Evaluation]]


class FinishedStep(NamedTuple):
    """The last step that was finished, as long as its state is there.

    Attributes:
      step: its number.
      learner, state: after its updates; the state is donated to those of the next step.
      position: in the data, where the next step begins.
    """

    step: int
    learner: Learner
    state: TrainState
    position: Any


class Run:
    """A run in its folder, from its start or from its last checkpoint to `config.steps`.

    Attributes:
      config, workdir: of the run.
      say: prints a line.
      mesh: of the devices.
      policy: loaded; its parameters are gone once `start` was called.
      data: of the run.
      clock: of the phases of a step.
    """

    _begun, _evaluated = False, 0

    def __init__(
        self, program: str, config: ConfigDict, workdir: str | Path, *, imitate: bool = False
    ) -> None:
        """Checks the config, loads the policy onto the mesh and opens the data.

        Args:
          program: name in front of printed lines.
          config: see `emor3_jax.config.default`.
          workdir: folder of the run, made if it does not exist.
          imitate: supervised fine-tuning.

        Raises:
          ConfigError, DataError, MeshError: before any compile, for a config that cannot run.
          Stopped: if a signal came meanwhile.
          RunError: if the file system fails, as a full disk does; at any later point too.
        """
        validate(config, imitate=imitate)
        self._stop = StopSignal(config.checkpoint.stop_seconds)
        self._lock: job.WorkdirLock | None = None
        self._scope = contextlib.ExitStack()
        self._step = 0
        workdir = Path(workdir)
        self.config, self.workdir, self.say = config, workdir, Console(program)
        self._program = program
        try:
            self._open(config, workdir, imitate)
        except BaseException as error:
            if isinstance(error, Stopped):
                self.say("stopped as asked, before the first step of this start")
            self._stop.restore()
            self._unlock()
            self._scope.close()
            raise_failure(error, self.workdir, self._step, begun=self._begun)
            raise

    def _open(self, config: ConfigDict, workdir: Path, imitate: bool) -> None:
        self._compiles = job.start_jax(config.log.compile_cache)
        job.check_hosts(config)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        # For attention kernels, which must be told the part of a batch that is a device's.
        self._scope.enter_context(jax.set_mesh(self.mesh))
        # The devices' own library may have taken the signals.
        self._stop.listen()
        check_batches(self.mesh, config)
        if hosts.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            job.check_names(workdir)
            self._lock = job.WorkdirLock(workdir)
        self._checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        latest = self._checkpoints.latest()
        if latest is not None:
            job.check_settings(config, workdir)
            if latest > config.steps:
                rule = f"the run in {workdir} has done {latest}; give as many or more"
                raise ConfigError("steps", config.steps, rule)
        self.say(f"loading the policy {config.policy.path}")
        self.policy = prepare.load_policy(config, self.say, self.mesh)
        self._judges = prepare.Judges(config, self.policy, self.say, self.mesh, imitate=imitate)
        judges = self._judges.processors
        self._learner: Learner | None = None
        self._stop.check()
        self.say("opening the data")
        self.data = prepare.open_data(
            config, self.policy, self.mesh, imitate=imitate, judges=judges
        )
        self._stop.check()
        job.keep_config(config, workdir)
        self._settings = inference_settings(
            config, self.data.labels["train"], self.data.sources["train"]
        )
        if hosts.is_first():
            self._settings.write(workdir)
        self.say("building the reward tables")
        self._evaluator = Evaluator(config, self.policy, self.data, self.mesh, judges.evaluation)
        self._stop.check()
        self._begin_at(latest)
        self.clock = StepClock(self._stop.check, lambda phase: self._task.note(phase))
        self._finished: FinishedStep | None = None
        self._due, self._told_stopped, self._saved_at = False, False, time.monotonic()
        self._pending: StepRecord | None = None
        self._guards = Watch(config)
        # A thread that ends the process logs too, and may find the main one at it.
        self._logging = threading.RLock()
        self._meter: Callable[[Observed], float] | None = None
        self._rollout: Rollout | None = None
        self._counters: Callable[[], dict[str, float]] = dict
        self._upcoming: Prompts | None = None
        self._placed: Batch | None = None
        self._position: Any = None
        # Behind all that it reads, as its thread may call it at once.
        self._stop.rescue = self._rescue
        self._maintenance = MaintenanceWatch(self._stop.request)

    def _begin_at(self, latest: int | None) -> None:
        """Begins behind a checkpoint, or anew; what was logged after it is dropped."""
        config = self.config
        self._progress: dict[str, Any] = {}
        if latest is not None:
            self._progress = self._checkpoints.progress(latest)
        self._step = latest or 0
        first = self._step + (latest is not None)
        self._writer = MetricWriter(self.workdir, config.log.sinks, first_step=first)
        self._pace = Pace(config.steps)
        self._task = self.say.task(self._program, config.steps, "steps", self._step)
        self._last = self._step >= config.steps
        self._traced = range(self._step + 3, self._step + 3 + config.log.profile_steps)

    def __enter__(self) -> Self:
        """Returns the run."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Lets go of signals, threads and files where an error ends the run.

        Where it was asked to stop, the last step that was finished is saved first.
        """
        if kind is None:
            return
        told = error
        try:
            if issubclass(kind, Stopped):
                self._save_finished()
                self._say_stopped()
                # As all hosts do now; after an error they may not.
                self.data.train.close()
            raise_failure(error, self.workdir, self._step, begun=self._begun)
        except BaseException as raised:
            told = raised
            raise
        finally:
            self.close(told)

    def close(self, error: BaseException | None = None) -> None:
        """Lets go of signals, threads and files, and of the mesh; see `close_all` for `error`."""
        first = self.clock.close, self._maintenance.close, self._task.close, self._checkpoints.close
        last = self._writer.close, self._stop.restore, self._unlock, self._scope.close
        close_all((*first, *last), error)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _say_stopped(self) -> None:
        """Says once which step the run goes on from; waits until it is written."""
        with self._logging:
            if self._told_stopped:
                return
            self._told_stopped = True
            latest = self._checkpoints.latest()
            saved = (
                "before the first checkpoint" if latest is None else f"saved after step {latest}"
            )
            self.say(f"stopped as asked, {saved}; start again with this workdir to go on")

    def _save_finished(self) -> bool:
        """Saves the last step that was finished, if any; returns False if its state is gone."""
        if self._finished is None:
            return True
        step, learner, state, position = self._finished
        arrays = learner.checkpoint(state)
        progress = self._progress | {"data": position} | learner.progress()
        if self._evaluation_is_due(step) and self._evaluated != step:
            progress["evaluation_is_owed"] = True
        try:
            self._checkpoints.save(step, arrays, progress)
        except Exception:
            if any(x.is_deleted() for x in jax.tree.leaves(arrays)):
                return False
            raise
        # A run that goes on keeps what was logged up to its checkpoint.
        self._flush()
        return True

    def _rescue(self) -> None:
        """Saves the last finished step from another thread; with several hosts, what is begun.

        An update that has taken its state is waited for: it ends with a step that can be saved.
        """
        while jax.process_count() == 1 and not self._save_finished():
            time.sleep(0.1)
        self._say_stopped()

    @property
    def judge(self) -> Judge | None:
        """Who is asked about the responses of a step; None for the policy itself."""
        return self._judges.of_training(self._learner)

    def _judged_by(self) -> str:
        """Returns who is asked, as behind the title of the report."""
        return report.judged_by(self._judges.evaluation, self._judges.training)

    @property
    def judge_processor(self) -> Processor | None:
        """That of a judge which shares nothing but the text with the policy; else None."""
        return self._judges.processors.training

    def put(self, batch: Batch) -> Batch:
        """Puts a batch of host arrays on the devices; that of the next step is there already."""
        if self._placed is not None and self._upcoming and batch is self._upcoming.batch:
            placed, self._placed = self._placed, None
            return placed
        with jax.profiler.TraceAnnotation("put"):
            return shard_batch(batch, self.mesh)

    def start(
        self,
        learner: Learner,
        state: TrainState,
        rollout: Rollout | None = None,
        counters: Callable[[], dict[str, float]] = dict,
    ) -> TrainState:
        """Returns the state to begin with: this one, or that of the newest checkpoint.

        Without a checkpoint, the policy is evaluated first, once the first batch is there: data
        without any row that can be used ends the run before an evaluation that may take hours.

        Args:
          learner: gets back what it kept beside the state.
          state: as before the first step.
          rollout: of the steps, whose FLOPs are counted and whose samples are shown.
          counters: returns counts at the time of logging.

        Raises:
          ConfigError, LabelError: for labels that no response could earn.
          DataError: for data without any row that can be used.
        """
        self._counters, self._rollout, self._learner = counters, rollout, learner
        if rollout is not None:
            prepare.check_reachable(rollout)
            judge = self._judges.policy_of_training()
            self._meter = prepare.make_meter(self.config, rollout, judge)
        if asked := self._judged_by():
            self.say(asked.removeprefix(", "))
        # State and reference alone hold parameters from here on.
        self.policy = dataclasses.replace(self.policy, params={})
        if self._step or self._progress:
            # What was initialised gives up its place first.
            arrays = self._restore(release(learner.checkpoint(state)))
            state = learner.restore(arrays, self._progress)
            del arrays
            self.data.train.set_state(self._progress["data"])
            self._stop.check()
            if self._progress.pop("evaluation_is_owed", False) and self._step < self.config.steps:
                self.say(f"evaluating after step {self._step}, which a stop had left out")
                owed = self._evaluate_during(self._step, learner, state)
                self._writer.amend(self._step, owed)
                self._evaluated = self._step
        else:
            if not self._last:
                self._upcoming = next(self.data.train)
            before = self._evaluate_before(learner.params(state))
            self._progress = {"before": to_json(before)}
            self._writer.write(0, evaluation_metrics(before))
            self._checkpoints.compile(learner.checkpoint(state))
        self.say(f"training to step {self.config.steps}; the first step compiles")
        self._saved_at = time.monotonic()
        self.clock.restart()
        return state

    def _restore(self, shapes: Any) -> Any:
        """Returns the arrays of the newest checkpoint that is what was written.

        Damaged ones are set aside, so that their steps can be saved again.
        """
        while True:
            self.say(f"going on from the checkpoint of step {self._step}")
            try:
                arrays, _ = self._checkpoints.restore(self._step, shapes, self.mesh)
            except DamagedError as error:
                self._checkpoints.give_up(self._step, error)
                self._writer.close()
                self._task.close()
                self._begin_at(self._checkpoints.latest())
            else:
                self._checkpoints.set_aside()
                return arrays

    def key(self, step: int) -> jax.Array:
        """Returns the PRNG key of a step."""
        return jax.random.fold_in(jax.random.key(self.config.seed), step - 1)

    def steps(self) -> Iterator[tuple[int, Prompts]]:
        """Yields the number of each step and its prompts, to the last step or a stop signal."""
        if not self._last and self._upcoming is None:
            self._upcoming = next(self.data.train)
        self._begun = True
        while not self._last:
            if self._step + 1 in self._traced[:1]:
                start_trace(self.workdir / "profile")
            with jax.profiler.StepTraceAnnotation("step", step_num=self._step + 1):
                yield self._step + 1, self._upcoming

    def record(
        self,
        step: int,
        observed: Observed,
        updates: list[dict[str, jax.Array]],
        info: dict[str, jax.Array | float],
    ) -> None:
        """Records a step whose updates are on their way; puts the next one, logs the one before.

        Args:
          step: its number.
          observed: arrays of the rollout.
          updates: metrics of each update.
          info: further metrics.
        """
        self.clock.mark("update", updates)
        self._step = step
        # As of this step, whenever it is logged: the next batch may leave out further rows.
        info = info | self.data.counters() | self._counters()
        info |= self._rollout.counters() if self._rollout else {}
        # The device is busy now: meanwhile the host sends the next batch and logs the step before.
        self._position, started = self.data.train.get_state(), time.perf_counter()
        self._upcoming = next(self.data.train) if step < self.config.steps else None
        waited = time.perf_counter() - started
        self._placed = None if self._upcoming is None else self.put(self._upcoming.batch)
        self._flush()
        updates, info = hosts.start_fetch((updates, info))
        self._pending = StepRecord(step, observed, updates, info, waited, self.clock.lap())
        # Agreed upon once a step, so that what ends the loop also saves, on all hosts. Their clocks
        # differ: the first one's says whether a checkpoint is due.
        stop = self._stop.requested or hosts.reached_sync_point(step)
        said = hosts.exchange([stop, self._minutes_are_over()])
        self._last = any(each[0] for each in said) or step == self.config.steps
        self._due = said[0][1]
        if step in self._traced and (self._last or step == self._traced[-1]):
            jax.block_until_ready(updates)
            jax.profiler.stop_trace()
            place = self.workdir / "profile"
            self.say(f"profile of steps {self._traced[0]} to {step}: {place}")

    def _minutes_are_over(self) -> bool:
        """Returns whether `checkpoint.minutes` have passed since the last checkpoint."""
        config = self.config
        minutes = config.checkpoint.minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def evaluate(self, step: int, learner: Learner, state: TrainState) -> None:
        """Evaluates on rows of the first set where a step is due and the run goes on.

        Args:
          step: steps done.
          learner: of the run.
          state: after the step.

        Raises:
          Stopped: if a signal came; a start that goes on makes up for the evaluation.
        """
        self._finished = FinishedStep(step, learner, state, self._position)
        if self._last or not self._evaluation_is_due(step):
            return
        self._flush(self._evaluate_during(step, learner, state))
        self._evaluated = step
        self.clock.restart()

    def _evaluation_is_due(self, step: int) -> bool:
        config = self.config
        due = step % config.evaluate.every == 0 and step < config.steps
        return due and len(config.evaluate.sets) > 0

    def _evaluate_before(self, params: dict) -> dict[str, Evaluation]:
        """Evaluates on `evaluate.before` rows of each set; {} where that is none."""
        config = self.config
        rows, names = config.evaluate.before, tuple(config.evaluate.sets)
        if not rows or not names:
            return {}
        self.say(f"evaluating before training ({', '.join(names)}); the first batch compiles")
        before = self._evaluate(params, names, 0, max(rows, 0))
        self._say_evaluated(before)
        return before

    def _evaluate_during(self, step: int, learner: Learner, state: TrainState) -> dict[str, float]:
        """Evaluates on rows of the first set; returns the metrics."""
        config = self.config
        names = tuple(config.evaluate.sets)[:1]
        now = self._evaluate(learner.params(state), names, step, config.evaluate.during)
        self._say_evaluated(now)
        return evaluation_metrics(now)

    def _say_evaluated(self, found: dict[str, Evaluation]) -> None:
        for line in evaluation_lines(found, self.say.width):
            self.say(line)

    def save(self, step: int, learner: Learner, state: TrainState) -> None:
        """Begins to write a checkpoint where a step is due, and after the last one.

        It is due by `checkpoint.every` and by `checkpoint.minutes`. The host waits for the arrays,
        not for the disk.
        """
        config = self.config
        self._finished = FinishedStep(step, learner, state, self._position)
        if not (self._last or self._due or step % config.checkpoint.every == 0):
            return
        self._saved_at = time.monotonic()
        self._flush()
        self._save_finished()
        self.clock.restart()

    def finish(self, params: Callable[[], dict]) -> Results:
        """Ends the run: evaluates, writes the report and the policy's folder, closes what is open.

        Args:
          params: returns those of the trained policy.

        Returns:
          {"before": {data set: Evaluation}, "after": {…}}; empty if the run was asked to stop.
        """
        self.data.train.close()
        if self._step != self.config.steps:
            self._say_stopped()
            self.close()
            return {}
        names, workdir, trained = tuple(self.config.evaluate.sets), self.workdir, params()
        self.say("evaluating after training")
        before = from_json(self._progress["before"])
        after = self._evaluate(trained, names, self._step)
        self._task.note("report and policy")
        self._writer.add_events(self._step, evaluation_metrics(after))
        metrics = [{name: e.metrics for name, e in each.items()} for each in (before, after)]
        if hosts.is_first():
            (workdir / "evaluations.json").write_text(json.dumps(metrics, indent=2) + "\n")
            images = {name: self.data.image(name) for name in names}
            title = f"EMO-R3: {workdir.name}{self._judged_by()}"
            report.write_report(workdir, title, before, after, images)
        trained_policy = dataclasses.replace(self.policy, params=trained)
        card = card_of_run(
            workdir.name,
            self._program,
            self.config,
            self.policy.policy.family.model_type,
            self._step,
            self._settings,
            {name: len(source) for name, source in self.data.sources.items()},
            (before, after),
        )
        texts = {FILE: self._settings.to_json(), CARD_FILE: card}
        save_whole(trained_policy, workdir / "policy", texts)
        self.say.block(report.before_after_table(before, after))
        self.say(f"report: {workdir / 'report.html'}   trained policy: {workdir / 'policy'}")
        self.close()
        return {"before": before, "after": after}

    def _flush(self, evaluations: dict[str, float] | None = None) -> None:
        """Logs the step that is still to be logged; waits for its arrays."""
        with self._logging, jax.profiler.TraceAnnotation("log"):
            if self._pending is not None:
                self._log(self._pending.fetched(), evaluations or {})
            self._pending = None

    def _log(self, done: StepRecord, evaluations: dict[str, float]) -> None:
        config = self.config
        values = done.metrics() | memory()
        if self._meter is not None:
            device = self.mesh.devices.flat[0].device_kind
            needed, seconds = self._meter(done.observed), values["time/step_s"]
            values |= flops.throughput(needed, seconds, device, self.mesh.devices.size)
        values["compile/count"] = float(self._compiles.count)
        values |= evaluations
        self._writer.write(done.step, values)
        try:
            warnings = self._guards.see(done.step, values)
        except GuardError as error:
            if hosts.is_first():
                origin = replays.Origin(self._program, str(error), self.data.labels["train"])
                key, tokenizer = self.key(done.step), self.policy.processor.tokenizer
                error = replays.with_batch(error, self.workdir, done, origin, key, tokenizer)
            raise error from None
        for warning in warnings:
            self.say(warning)
        left = self._pace.left(done.step)
        self._task.advance()
        if done.step % config.log.every == 0 or done.step == config.steps:
            self.say(progress_line(done.step, config.steps, values, left, self.say.width))
        due = done.step % config.log.samples_every == 0 or done.step == 1
        if self._rollout is not None and hosts.is_first() and due:
            shown = done.read(self._rollout.scorer, report.SAMPLES)
            page = self.workdir / "samples" / f"{done.step:06d}.html"
            image, judge = self.data.image("train"), self._judges.training
            report.write_samples(page, done.step, shown, image, judge)

    def _evaluate(
        self, params: dict, names: tuple[str, ...], step: int, limit: int = 0
    ) -> dict[str, Evaluation]:
        """Evaluates a policy, and writes each response to `workdir/predictions/<step>`.

        Args:
          params: of the policy.
          names: of the evaluation sets.
          step: steps done.
          limit: at most so many rows of each; 0 is all. After the first step they are watched
            without the labels' likelihood.
        """
        folder = self.workdir / "predictions" / f"{step:06d}"
        self._task.note("evaluation")
        return self._evaluator(
            params,
            names,
            folder,
            self.say,
            judge=self._judges.of_evaluation(self._learner),
            limit=limit,
            likelihood=not (limit and step),
            look=self._stop.check,
        )
