"""EMO-R3 training: reflective reinforcement learning of a vision-language policy, step by step.

    python -m emor3_jax.train --config=configs/cpu_demo.py --workdir=DIR [--config.key=value …]

The loop in `train` is the algorithm, in the order of the paper:

    batch → rollout → reflect → reward → advantage → reference → update → log, evaluate, checkpoint

`workdir` then holds config.json, metrics.jsonl, TensorBoard events, checkpoints/<step>, samples/,
report.html and policy/ (the trained policy as a Hugging Face folder). A run that ended at any
moment goes on from its last checkpoint when it is started again with the same workdir.

On many hosts all run this program and take the same steps (docs/distributed.md).
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emor3_jax import account, cli, prepare, rounds
from emor3_jax.config import uses_reference
from emor3_jax.data.batch import Batch, part_of, take_part
from emor3_jax.episode import Actor, Judgement, Replies, Scores
from emor3_jax.evaluate import read_sample
from emor3_jax.io import report
from emor3_jax.io.evaluation import Evaluation, Sample
from emor3_jax.io.metrics import Lap, PhaseClock, memory
from emor3_jax.learner import response_logprobs, sampler_gap, trim, update
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_whole
from emor3_jax.reference import Reference
from emor3_jax.rl import advantages
from emor3_jax.rl.kl import penalty
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout.generate import Samples
from emor3_jax.run import Pace, Run, StopSignal


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
    run = Run.open("train", config, workdir)
    say, mesh, policy, data = run.say, run.mesh, run.policy, run.data
    actor = prepare.make_actor(config, policy, data.labels["train"], training=True)

    optimizer, loss = prepare.make_update(config)
    lora = prepare.make_lora(config, policy.params)
    reference = Reference(config, policy.params)
    trained = prepare.trained_params(config, policy.params)
    if reference.params is trained:
        # The state is given up to each update, so it starts as a copy of what the reference keeps.
        trained = jax.tree.map(jnp.copy, trained)
    state = TrainState.create(trained, optimizer)
    # Nothing but state and reference holds parameters from here on.
    run.policy = policy = dataclasses.replace(policy, params={})
    del trained
    state = run.resume(state, reference)
    step = run.step

    def weights() -> dict:
        """Returns the parameters of the policy as it is now."""
        return lora.merge(state.params) if lora else state.params

    rule, plan = prepare.rollout_rule(config, policy), prepare.rollout_plan(config)
    scoring, std = prepare.score_options(config), prepare.group_std(config)
    learning = config.policy_update
    adapt_kl, kl_coef = prepare.make_kl_control(config), None
    if adapt_kl:
        kl_coef = jnp.float32(run.progress.get("kl_coef", learning.kl_coef))
    meter = prepare.make_meter(config, policy, actor)
    devices = mesh.devices.flat[0].device_kind, mesh.devices.size
    parts = config.rollout.prompts // config.policy_update.prompts
    micro = config.policy_update.prompts // config.policy_update.micro_prompts

    run.look_before(weights())
    say(f"training to step {config.steps}; the first step compiles")
    stop, clock, pace, first = StopSignal(), PhaseClock(), Pace(step, config.steps), step
    play = partial(
        rounds.play,
        actor,
        put=run.put,
        parts=mesh.shape["data"] * mesh.shape["fsdp"],
        responses=config.rollout.responses,
        rule=rule,
        plan=plan,
        shape=prepare.make_shaping(config),
        greedy=advantages.ESTIMATORS[learning.advantage].greedy,
        mark=clock.mark,
    )
    traced = range(first + 3, first + 3 + config.log.profile_steps)
    pending: _Step | None = None

    def log(done: _Step, extra: dict[str, float] | None = None) -> None:
        """Logs a step; waits for what of it the device is still computing."""
        values = done.metrics() | memory() | data.counters() | reference.counters() | (extra or {})
        flops = meter(done.batch, done.lengths, done.replies)
        values |= account.throughput(flops, values["time/step_s"], *devices)
        values["compile/count"] = float(run.compiles.count)
        run.writer.write(done.step, values)
        if done.step % config.log.every == 0 or done.step == config.steps:
            say(_progress_line(done.step, config.steps, values, pace.left(done.step)))
        if hosts.is_first() and (done.step % config.log.samples_every == 0 or done.step == 1):
            sheet = workdir / "samples" / f"{done.step:06d}.html"
            report.write_samples(sheet, done.step, done.read(actor), data.image("train"))

    last = step >= config.steps
    upcoming = None if last else next(data.train)
    while not last:
        if step + 1 in traced[:1]:
            jax.profiler.start_trace(str(workdir / "profile"))
        key, params = jax.random.fold_in(jax.random.key(config.seed), step), weights()
        played, extra = play(params, *upcoming, key), {}
        if config.rollout.resample:
            played, extra = rounds.fill(
                played,
                partial(play, params),
                data.train,
                key,
                tries=config.rollout.resample,
                merge=policy.config.vision.merge_unit,
                put=run.put,
            )
        batch, samples, rewards = played.batch, played.samples, played.rewards

        # What each host reads of a step, asked for before the device is busy with the update.
        seen = hosts.everywhere((samples, played.replies, played.scores, batch.answers))
        lengths = jax.device_get(seen[0].lengths)
        scored = trim(samples, int(lengths.max()), config.policy_update.response_lengths)
        rows = shard_whole(prepare.plan_packing(config, policy, lengths, scored), mesh)
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
        if uses_reference(config):
            features = shard_whole(reference.see(batch, played.ids, policy.config), mesh)
            ref_logprobs = logprobs(reference.params, features=features)
            clock.mark("reference", ref_logprobs)
        if config.policy_update.old_logprobs == "recompute":
            old = logprobs(params)
            gap, scored = sampler_gap(old, scored), scored._replace(logprobs=old)
            clock.mark("old", old)
        if ref_logprobs is not None and learning.kl_place == "reward":
            each, extra["policy/kl"] = penalty(
                learning.kl, scored.logprobs, ref_logprobs, scored.mask
            )
            rewards = rewards - (learning.kl_coef if kl_coef is None else kl_coef) * each
            ref_logprobs = None
        advantage = advantages.estimate(learning.advantage, rewards, std=std, greedy=played.greedy)
        learned, merge = [], policy.config.vision.merge_unit
        cut = [take_part(batch, part, parts, merge) for part in range(parts)]
        # From here on only the parts: with the whole, pictures would lie in memory twice.
        del batch, logprobs
        played = played._replace(batch=None)
        for part in range(parts):
            state, metrics = update(
                state,
                cut[part],
                *part_of((scored, rows, advantage, ref_logprobs), part, parts),
                actor.banned,
                kl_coef,
                lora,
                config=policy.config,
                optimizer=optimizer,
                loss=loss,
                options=scoring,
                count=micro,
            )
            learned.append(metrics)
        clock.mark("update", learned)
        # Merged weights must not outlive the step that they are of.
        del params
        if adapt_kl:
            extra["policy/kl_coef"] = kl_coef
            now = extra.get("policy/kl", sum(metrics["kl"] for metrics in learned) / parts)
            kl_coef = adapt_kl(kl_coef, now)
        step += 1
        reference.follow(step, state.params)

        # The device is busy now: meanwhile the host logs the step before and reads on.
        if pending is not None:
            log(pending)
        position, before_data = data.train.get_state(), time.perf_counter()
        upcoming = next(data.train) if step < config.steps else None
        waited = time.perf_counter() - before_data
        pending = _Step(
            step,
            played.ids,
            played.host,
            *seen,
            hosts.everywhere(rewards),
            learned,
            extra,
            gap,
            waited,
            clock.lap(),
        )
        # Agreed upon once a step, so that what ends the loop also saves, on all hosts.
        last = hosts.agree(stop.asked) or step == config.steps
        if step in traced and (last or step == traced[-1]):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            say(f"profile of steps {traced[0]} to {step}: {workdir / 'profile'}")

        evaluations = run.look_during(weights, step)
        if evaluations or last or step % config.checkpoint.every == 0:
            log(pending, evaluations)
            pending = None
            if last or step % config.checkpoint.every == 0:
                now = {"data": position} | ({"kl_coef": float(kl_coef)} if adapt_kl else {})
                run.save(step, state, now, reference)
            clock.restart()

    clock.close()
    stop.restore()
    return run.finish(weights(), step) if step == config.steps else run.stopped(step)


class _Step(NamedTuple):
    """What is logged of a step; its arrays may still be computed, and are of all hosts."""

    step: int
    ids: tuple[str, ...]
    batch: Batch  # this host's rows
    samples: Samples
    replies: Replies | Judgement | None
    scores: Scores
    answers: jax.Array
    rewards: jax.Array
    learned: list[dict[str, jax.Array]]
    extra: dict[str, jax.Array | float]
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
            "group/zero_std_fraction": float(advantages.zero_std_fraction(self.rewards)),
            "response/length_mean": float(lengths.mean()),
            "response/truncated_fraction": float(1 - ended.mean()),
            "time/data_s": self.data_seconds,
            "time/step_s": step_seconds,
            "throughput/responses_per_s": lengths.size / step_seconds,
            "throughput/tokens_per_s": float(lengths.sum()) / step_seconds,
            **{name: float(value) for name, value in self.extra.items()},
        }

    def read(self, actor: Actor) -> list[Sample]:
        """Decodes the first response to each of a few prompts."""
        answers, *host = jax.device_get((self.answers, self.samples, self.replies, self.scores))
        shown = range(min(report.SAMPLES, len(self.ids)))
        return [read_sample(actor, self.ids[i], answers[i], i, 0, *host) for i in shown]


def _progress_line(step: int, steps: int, values: dict[str, float], left: str) -> str:
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
        f"left {left}"
    )


if __name__ == "__main__":
    cli.run(train, may_stop=True)
