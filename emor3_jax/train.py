"""EMO-R3 training: reflective reinforcement learning of a vision-language policy, step by step.

    python -m emor3_jax.train --config=configs/cpu_demo.py --workdir=DIR [--config.key=value …]

The loop in `train` is the algorithm, in the order of the paper:

    prompts → rollout → reflect → reward → reference → advantage → update → log, evaluate, save

`workdir` then holds config.json, metrics.jsonl, TensorBoard events, checkpoints/<step>, samples/,
report.html and policy/ (the trained policy as a Hugging Face folder). A run that ended at any
moment goes on from its last checkpoint when it is started again with the same workdir.

On many hosts all run this program and take the same steps (docs/distributed.md).
"""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.rollout.resample import resample
from emor3_jax.runtime import cli
from emor3_jax.runtime.run import Results, Run
from emor3_jax.runtime.step_log import observe


def train(config: ConfigDict, workdir: str | Path) -> Results:
    """Runs training from its start, or from the last checkpoint, to `config.steps`.

    Args:
      config: see `emor3_jax.config.default`.
      workdir: folder of the run, made if it does not exist.

    Returns:
      {"before": {data set: Evaluation}, "after": {…}}; empty if a signal stopped the run.

    Raises:
      Stopped: if a signal ended it within a step or an evaluation; its last step is saved.
      ConfigError, DataError, MeshError: before any compile, for a config that cannot run.
    """
    with Run("train", config, workdir) as run:
        labels = run.data.labels["train"]
        rollout = prepare.make_rollout(config, run.policy, labels, run.mesh, run.judge_processor)
        learner, state = prepare.make_learner(config, run.policy, run.mesh)
        state = run.start(learner, state, rollout, learner.reference.counters)

        for step, prompts in run.steps():  # reads ahead; ends on a stop signal; traces; resumes
            key, params = run.key(step), learner.params(state)
            # Sample G responses to each of B prompts, ask about their steps, score all.
            experience = rollout(params, run.put(prompts.batch), key, run.clock, run.judge)
            info = {}
            if tries := config.rollout.resample:  # DAPO: replace groups with nothing to compare
                again = partial(rollout, params, clock=run.clock, judge=run.judge)
                prompts, experience, info = resample(
                    prompts, experience, again, run.data.train, key, tries, run.put, learner.compare
                )
            # Prompts of like length go through the policy together.
            experience, plan, padding = learner.plan(experience)
            # Score them under the reference; compare each response with its group.
            experience, scored = learner.score(params, prompts, experience, plan, run.clock)
            observed = observe(prompts.ids, prompts.batch, experience)
            # Free merged weights before the update.
            parts = learner.split(experience, plan, key)
            del params, experience
            updates = []
            while parts:
                state, metrics = learner.update(state, parts.pop(0))
                updates.append(metrics)
            # Adapt the KL coefficient; let a reference follow the policy.
            learner.after_step(state, step, scored, updates)
            info |= scored | padding
            run.record(step, observed, updates, info)  # written while the device works on
            run.evaluate(step, learner, state)
            run.save(step, learner, state)
        return run.finish(partial(learner.params, state))


if __name__ == "__main__":
    cli.run(train, may_stop=True)
