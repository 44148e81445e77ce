"""EMO-R3 training: reflective reinforcement learning of a vision-language policy, step by step.

    python -m emor3_jax.train --config=configs/cpu_demo.py --workdir=DIR [--config.key=value …]

The loop in `train` is the algorithm, in the order of the paper:

    batch → rollout → reflect → reward → advantage → reference → update → log, evaluate, checkpoint

`workdir` then holds config.json, metrics.jsonl, TensorBoard events, checkpoints/<step>, samples/,
report.html and policy/ (the trained policy as a Hugging Face folder). A run that ended at any
moment goes on from its last checkpoint when it is started again with the same workdir.
"""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emor3_jax import cli, prepare
from emor3_jax.config import validate
from emor3_jax.episode import Scores
from emor3_jax.evaluate import evaluate, read_sample
from emor3_jax.io import report
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console, duration
from emor3_jax.io.evaluation import Evaluation, Sample, from_json, to_json
from emor3_jax.io.metrics import MetricWriter, Timer, memory
from emor3_jax.learner import reference_logprobs, trim, update
from emor3_jax.models import Policy, save
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
    reference = policy.params
    # The state is given up to each update, so it starts as a copy of what the reference keeps.
    state = TrainState.create(jax.tree.map(jnp.copy, reference), optimizer)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    step, progress = 0, {}
    if (latest := checkpoints.latest()) is not None:
        say(f"going on from the checkpoint of step {latest}")
        state, progress = checkpoints.restore(latest, state, mesh)
        data.train.set_state(progress["data"])
        step = latest
    writer = MetricWriter(workdir, first_step=step + bool(progress))
    rule, scoring = prepare.rollout_rule(config, policy), prepare.score_options(config)
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
                put=lambda batch: shard_batch(batch, mesh),
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
    stop, timer, started, first = _StopSignal(), Timer(), time.perf_counter(), step
    while step < config.steps and not stop.asked:
        step_started = time.perf_counter()
        key_rollout, key_reflect = jax.random.split(
            jax.random.fold_in(jax.random.key(config.seed), step)
        )
        with timer("data"):
            host_batch, ids = next(data.train)
            batch = shard_batch(host_batch, mesh)

        with timer("rollout"):
            prefix, samples = actor.roll_out(
                state.params, batch, key_rollout, responses=config.rollout.responses, rule=rule
            )
            longest = int(samples.lengths.max())
        with timer("reflect"):
            replies = jax.block_until_ready(
                actor.reflect(state.params, batch, prefix, samples, key_reflect)
            )
            del prefix
        with timer("reward"):
            scores = actor.score(batch, samples, replies)
            std = "sample" if config.profile == "release" else "population"
            advantage = jax.block_until_ready(advantages.grpo(scores.overall, std=std))
        scored = trim(samples, longest, config.policy_update.response_lengths)
        with timer("reference"):
            ref_logprobs = None
            if loss.kl_coef:
                ref_logprobs = jax.block_until_ready(
                    reference_logprobs(
                        reference,
                        batch,
                        scored,
                        actor.banned,
                        config=policy.config,
                        options=scoring,
                        count=parts * micro,
                    )
                )
        with timer("update"):
            learned = []
            for part in range(parts):
                rows = prepare.part_of(host_batch, part, parts, policy.config.vision.merge_unit)
                state, metrics = update(
                    state,
                    shard_batch(rows, mesh),
                    *_rows((scored, advantage, ref_logprobs), part, parts),
                    actor.banned,
                    config=policy.config,
                    optimizer=optimizer,
                    loss=loss,
                    options=scoring,
                    count=micro,
                )
                learned.append(metrics)
            learned = jax.device_get(learned)
        step += 1

        values = _step_metrics(scores, samples, learned, time.perf_counter() - step_started)
        values |= timer.pop() | memory() | data.counters()
        values["compile/count"] = float(compiles.count)
        if step % config.evaluate.every == 0 and step < config.steps and names:
            now = look(names[:1], config.evaluate.during)
            values |= _evaluation_metrics(now)
            say(_evaluation_line(now))
        writer.write(step, values)
        if step % config.log.every == 0 or step == config.steps:
            pace = (time.perf_counter() - started) / (step - first)
            say(_progress_line(step, config.steps, values, pace))
        if step % config.log.samples_every == 0 or step == 1:
            shown = _read_samples(actor, ids, host_batch.answers, samples, replies, scores)
            sheet = workdir / "samples" / f"{step:06d}.html"
            report.write_samples(sheet, step, shown, data.image("train"))
        if step % config.checkpoint.every == 0 or step == config.steps or stop.asked:
            checkpoints.save(step, state, progress | {"data": data.train.get_state()})

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


def _rows(tree: Any, part: int, parts: int) -> Any:
    """Returns one of `parts` equal parts of the rows of each array."""
    return jax.tree.map(lambda x: x[part * len(x) // parts : (part + 1) * len(x) // parts], tree)


def _step_metrics(
    scores: Scores, samples: Samples, learned: list[dict[str, np.ndarray]], seconds: float
) -> dict[str, float]:
    host_scores, lengths, ended = jax.device_get((scores, samples.lengths, samples.ended))
    values = {f"reward/{k}": float(np.mean(value)) for k, value in host_scores.named().items()}
    for name in learned[0]:
        values[f"policy/{name}"] = float(np.mean([metrics[name] for metrics in learned]))
    return values | {
        "group/zero_std_fraction": float(advantages.zero_std_fraction(host_scores.overall)),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_fraction": float(1 - ended.mean()),
        "time/step_s": seconds,
        "throughput/responses_per_s": lengths.size / seconds,
        "throughput/tokens_per_s": float(lengths.sum()) / seconds,
    }


def _progress_line(step: int, steps: int, values: dict[str, float], pace: float) -> str:
    reward = "  ".join(
        f"{name} {values[f'reward/{name}']:.2f}"
        for name in ("format", "accuracy", "coherence", "consistency")
    )
    split = "  ".join(
        f"{name} {values[f'time/{name}_s']:.2f}"
        for name in ("data", "rollout", "reflect", "reward", "reference", "update")
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


def _read_samples(actor, ids, answers, samples, replies, scores) -> list[Sample]:
    host = jax.device_get((samples, replies, scores))
    shown = range(min(report.SAMPLES, len(ids)))
    return [read_sample(actor, ids[i], answers[i], i, 0, *host) for i in shown]


if __name__ == "__main__":
    cli.run(train)
