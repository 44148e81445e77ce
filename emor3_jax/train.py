"""EMO-R3 training: reflective reinforcement learning of a vision-language policy, step by step.

    python -m emor3_jax.train --config=configs/cpu_demo.py --workdir=DIR [--config.key=value …]

The loop in `train` is the algorithm, in the order of the paper:

    batch → rollout → reflect → reward → advantage → reference → update → log, evaluate, checkpoint

`workdir` then holds config.json, metrics.jsonl, TensorBoard events, checkpoints/<step>, samples/,
report.html and policy/ (the trained policy as a Hugging Face folder). A run that ended at any
moment goes on from its last checkpoint when it is started again with the same workdir.
"""

import dataclasses
import json
import signal
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emor3_jax import account, cli, prepare
from emor3_jax.config import validate
from emor3_jax.data.batch import Batch, part_of, take_part
from emor3_jax.episode import Actor, Judgement, Replies, Scores
from emor3_jax.evaluate import evaluate, read_sample
from emor3_jax.io import report
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console, duration
from emor3_jax.io.evaluation import Evaluation, Sample, from_json, to_json
from emor3_jax.io.metrics import Lap, MetricWriter, PhaseClock, memory
from emor3_jax.learner import response_logprobs, sampler_gap, trim, update
from emor3_jax.models import Policy, save
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.parallel.mesh import check_batch, make_mesh, shard_batch
from emor3_jax.rl import advantages
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout.generate import Samples


def train(config: ConfigDict, workdir: Path) -> dict[str, dict[str, Evaluation]]:
    """Runs training from its start, or from the last checkpoint, to `config.steps`.

    Args:
      config: see `emor3_jax.config.default`.
      workdir: folder of the run, made if it does not exist.

    Returns:
      {"before": {data set: Evaluation}, "after": {…}}; empty if a signal stopped the run.

    Raises:
      ConfigError, DataError, MeshError: before any compile, for a config that cannot run.
    """
    validate(config)
    say = Console("train")
    compiles = prepare.start_jax(config.log.compile_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    # For attention kernels, which must be told what part of a batch is a device's.
    jax.set_mesh(mesh)
    for section in ("rollout", "policy_update", "evaluate"):
        check_batch(mesh, f"{section}.prompts", config[section].prompts)
    for field in ("slots", "refill"):
        check_batch(mesh, f"rollout.{field}", config.rollout[field])
    workdir.mkdir(parents=True, exist_ok=True)
    say(f"loading the policy {config.policy.path}")
    policy = prepare.load_policy(config, say, mesh)
    say("opening the data")
    data = prepare.open_data(config, policy)
    prepare.keep_config(config, workdir)
    say("building the reward tables")
    actors = {name: prepare.make_actor(config, policy, data.labels[name]) for name in data.labels}
    actor = actors["train"]

    optimizer, loss = prepare.make_update(config)
    # Rounded as each use of it would be; the state, which each update gives up, takes the rest.
    reference = model.cast_matrices(policy.params, jnp.dtype(config.policy.dtype))
    state = TrainState.create(policy.params, optimizer)
    policy = dataclasses.replace(policy, params={})
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    step, progress = 0, {}
    if (latest := checkpoints.latest()) is not None:
        say(f"going on from the checkpoint of step {latest}")
        state, progress = checkpoints.restore(latest, state, mesh)
        data.train.set_state(progress["data"])
        step = latest
    writer = MetricWriter(workdir, first_step=step + bool(progress))
    rule, plan = prepare.rollout_rule(config, policy), prepare.rollout_plan(config)
    scoring, std = prepare.score_options(config), prepare.group_std(config)
    meter = prepare.make_meter(config, policy, actor)
    devices = mesh.devices.flat[0].device_kind, mesh.devices.size
    parts = config.rollout.prompts // config.policy_update.prompts
    micro = config.policy_update.prompts // config.policy_update.micro_prompts

    def look(names: tuple[str, ...], limit: int = 0) -> dict[str, Evaluation]:
        return {
            name: evaluate(
                actors[name],
                state.params,
                data.evaluate[name].take(limit) if limit else data.evaluate[name],
                config.seed,
                rule=prepare.evaluation_rule(config, policy),
                plan=prepare.evaluation_plan(config),
                put=lambda batch: prepare.place_batch(batch, mesh, config),
                keep=report.SAMPLES,
                graded=config.evaluate.sets[name].graded,
            )
            for name in names
        }

    names = tuple(config.evaluate.sets)
    if not progress:
        say(f"evaluating before training ({', '.join(names)}); the first batch compiles")
        before = look(names)
        progress = {"before": to_json(before)}
        writer.write(0, _evaluation_metrics(before))
        say(_evaluation_line(before))

    say(f"training to step {config.steps}; the first step compiles")
    stop, clock, started, first = _StopSignal(), PhaseClock(), time.perf_counter(), step
    traced = range(first + 3, first + 3 + config.log.profile_steps)
    pending: _Step | None = None

    def log(done: _Step, extra: dict[str, float] | None = None) -> None:
        """Logs a step; waits for what of it the device is still computing."""
        values = done.metrics() | memory() | data.counters() | (extra or {})
        flops = meter(done.batch, done.lengths, done.replies)
        values |= account.throughput(flops, values["time/step_s"], *devices)
        values["compile/count"] = float(compiles.count)
        writer.write(done.step, values)
        if done.step % config.log.every == 0 or done.step == config.steps:
            pace = (time.perf_counter() - started) / (done.step - first)
            say(_progress_line(done.step, config.steps, values, pace))
        if done.step % config.log.samples_every == 0 or done.step == 1:
            sheet = workdir / "samples" / f"{done.step:06d}.html"
            report.write_samples(sheet, done.step, done.read(actor), data.image("train"))

    last = step >= config.steps
    upcoming = None if last else next(data.train)
    while not last:
        if step + 1 in traced[:1]:
            jax.profiler.start_trace(str(workdir / "profile"))
        host_batch, ids = upcoming
        batch = prepare.place_batch(host_batch, mesh, config)

        samples, replies = actor.run(
            state.params,
            batch,
            jax.random.fold_in(jax.random.key(config.seed), step),
            responses=config.rollout.responses,
            rule=rule,
            plan=plan,
            parts=mesh.shape["data"] * mesh.shape["fsdp"],
            mark=clock.mark,
        )
        scores = actor.score(batch, samples, replies)
        advantage = advantages.grpo(scores.overall, std=std)
        clock.mark("reward", advantage)

        lengths = np.asarray(samples.lengths)
        scored = trim(samples, int(lengths.max()), config.policy_update.response_lengths)
        rows = shard_batch(prepare.plan_packing(config, policy, lengths, scored), mesh)
        logprobs = partial(
            response_logprobs,
            batch=batch,
            samples=scored,
            packing=rows,
            banned=actor.banned,
            config=policy.config,
            options=scoring,
            count=parts * micro,
        )
        ref_logprobs = gap = None
        if loss.kl_coef:
            ref_logprobs = logprobs(reference)
            clock.mark("reference", ref_logprobs)
        if config.policy_update.old_logprobs == "recompute":
            old = logprobs(state.params)
            gap, scored = sampler_gap(old, scored), scored._replace(logprobs=old)
            clock.mark("old", old)
        learned, merge = [], policy.config.vision.merge_unit
        cut = [take_part(batch, part, parts, merge) for part in range(parts)]
        # From here on only the parts: with the whole, pictures would lie in memory twice.
        del batch, logprobs
        for part in range(parts):
            state, metrics = update(
                state,
                cut[part],
                *part_of((scored, rows, advantage, ref_logprobs), part, parts),
                actor.banned,
                config=policy.config,
                optimizer=optimizer,
                loss=loss,
                options=scoring,
                count=micro,
            )
            learned.append(metrics)
        clock.mark("update", learned)
        step += 1

        # The device is busy now: meanwhile the host logs the step before and reads on.
        if pending is not None:
            log(pending)
        position, before_data = data.train.get_state(), time.perf_counter()
        upcoming = next(data.train) if step < config.steps else None
        waited = time.perf_counter() - before_data
        pending = _Step(
            step,
            ids,
            host_batch,
            samples,
            replies,
            scores,
            learned,
            gap,
            waited,
            clock.lap(),
        )
        # Asked once a step, so that what ends the loop also saves.
        last = step == config.steps or stop.asked
        if step in traced and (last or step == traced[-1]):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            say(f"profile of steps {traced[0]} to {step}: {workdir / 'profile'}")

        evaluations: dict[str, float] = {}
        if step % config.evaluate.every == 0 and step < config.steps and names:
            now = look(names[:1], config.evaluate.during)
            evaluations = _evaluation_metrics(now)
            say(_evaluation_line(now))
        if evaluations or last or step % config.checkpoint.every == 0:
            log(pending, evaluations)
            pending = None
            if last or step % config.checkpoint.every == 0:
                checkpoints.save(step, state, progress | {"data": position})
            clock.restart()

    clock.close()
    stop.restore()
    checkpoints.close()
    if step < config.steps:
        writer.close()
        say(f"stopped after step {step} as asked; start again with this workdir to go on")
        return {}
    say("evaluating after training")
    before, after = from_json(progress["before"]), look(names)
    writer.add_events(step, _evaluation_metrics(after))
    writer.close()
    metrics = [{name: e.metrics for name, e in each.items()} for each in (before, after)]
    (workdir / "evaluations.json").write_text(json.dumps(metrics, indent=2) + "\n")
    images = {name: data.image(name) for name in names}
    report.write_report(workdir, f"EMO-R3: {workdir.name}", before, after, images)
    save(Policy(policy.config, state.params, policy.processor), workdir / "policy")
    for line in report.before_after_table(before, after).splitlines():
        say(line)
    say(f"report: {workdir / 'report.html'}   trained policy: {workdir / 'policy'}")
    return {"before": before, "after": after}


class _StopSignal:
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


class _Step(NamedTuple):
    """What is logged of a step; its arrays may still be computed."""

    step: int
    ids: tuple[str, ...]
    batch: Batch
    samples: Samples
    replies: Replies | Judgement | None
    scores: Scores
    learned: list[dict[str, jax.Array]]
    sampler_gap: jax.Array | None
    data_seconds: float
    phases: Lap

    @property
    def lengths(self) -> np.ndarray:
        """int[B, G], of the responses."""
        return jax.device_get(self.samples.lengths)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics by name; waits for the arrays."""
        seconds = self.phases.read()
        step_seconds = sum(seconds.values())
        scores, learned, gap = jax.device_get((self.scores, self.learned, self.sampler_gap))
        lengths, ended = self.lengths, jax.device_get(self.samples.ended)
        values = {f"reward/{k}": float(np.mean(value)) for k, value in scores.named().items()}
        # Before the first update of a step, the policy is the one that sampled.
        values["policy/sampler_gap"] = float(learned[0]["moved"] if gap is None else gap)
        for name in learned[0].keys() - {"moved"}:
            values[f"policy/{name}"] = float(np.mean([metrics[name] for metrics in learned]))
        values |= {f"time/{phase}_s": value for phase, value in seconds.items()}
        return values | {
            "group/zero_std_fraction": float(advantages.zero_std_fraction(scores.overall)),
            "response/length_mean": float(lengths.mean()),
            "response/truncated_fraction": float(1 - ended.mean()),
            "time/data_s": self.data_seconds,
            "time/step_s": step_seconds,
            "throughput/responses_per_s": lengths.size / step_seconds,
            "throughput/tokens_per_s": float(lengths.sum()) / step_seconds,
        }

    def read(self, actor: Actor) -> list[Sample]:
        """Decodes the first response to each of a few prompts."""
        host = jax.device_get((self.samples, self.replies, self.scores))
        shown = range(min(report.SAMPLES, len(self.ids)))
        return [read_sample(actor, self.ids[i], self.batch.answers[i], i, 0, *host) for i in shown]


def _progress_line(step: int, steps: int, values: dict[str, float], pace: float) -> str:
    reward = "  ".join(
        f"{name} {values[f'reward/{name}']:.2f}"
        for name in ("format", "accuracy", "coherence", "consistency")
    )
    split = "  ".join(
        f"{name} {values[f'time/{name}_s']:.2f}"
        for name in ("rollout", "reflect", "reward", "reference", "update")
        if f"time/{name}_s" in values
    )
    return (
        f"step {step}/{steps}  reward {values['reward/overall']:.3f} ({reward})  "
        f"kl {values['policy/kl']:.3f}  {values['time/step_s']:.2f} s ({split})  "
        f"left {duration(pace * (steps - step))}"
    )


def _evaluation_metrics(results: dict[str, Evaluation]) -> dict[str, float]:
    return {
        f"eval/{name}/{metric}": value
        for name, result in results.items()
        for metric, value in result.metrics.items()
    }


def _evaluation_line(results: dict[str, Evaluation]) -> str:
    shown = ("accuracy", "format", "coherence", "consistency", "decoupling")
    return "; ".join(
        f"{name}: " + "  ".join(f"{m} {r.metrics[m]:.3f}" for m in shown if m in r.metrics)
        for name, r in results.items()
    )


if __name__ == "__main__":
    cli.run(train)
