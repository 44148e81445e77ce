"""Looks into the step by which a guard ended a run: what was answered, and what is not finite.

    python -m emor3_jax.replay RUN [--step=N]

RUN is the folder of a run, or RUN/replay/<step>. Prints each response with its rewards, and takes
the updates of the step once more, from the newest checkpoint: loss, KL, norm of the gradient, and
the rows and responses of which something is not finite. Nothing is written.

Log-probabilities under the policy that sampled are computed once more, by the checkpoint's policy;
where updates were skipped since then, as a gradient that is not finite is, it is the same.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.data.batch import Prompts
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console
from emor3_jax.learner.learner import Learner
from emor3_jax.learner.micro_batches import MicroBatch, Shape, StepPlan
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import make_mesh, num_parts, shard_batch, shard_whole
from emor3_jax.rl.update import TrainState
from emor3_jax.runtime import cli, job, replays
from emor3_jax.runtime.replays import Replay
from emor3_jax.runtime.restore import restore_newest
from emor3_jax.types import Experience

FLAGS = flags.FLAGS


def replay(folder: str | Path) -> Iterator[str]:
    """Yields lines about a step, as they are found out.

    Args:
      folder: of its batch, `workdir/replay/<step>`.

    Raises:
      UserError: if the batch, the run's config, its data or its checkpoints cannot be used.
    """
    folder = Path(folder)
    kept, workdir = replays.read(folder), folder.absolute().parents[1]
    config = job.read_config(workdir)
    say = Console("replay")
    job.start_jax(config.log.compile_cache)
    job.check_hosts(config)
    yield from describe(kept)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    yield from _under(mesh, _replay(kept, workdir, config, mesh, say))


def _under(mesh: jax.sharding.Mesh, lines: Iterator[str]) -> Iterator[str]:
    """Yields lines that are found out under a mesh, which is not set where they are used."""
    while True:
        with jax.set_mesh(mesh):
            line = next(lines, None)
        if line is None:
            return
        yield line


def _replay(
    kept: Replay, workdir: Path, config: ConfigDict, mesh: jax.sharding.Mesh, say: Console
) -> Iterator[str]:
    """Yields what the updates of a step are, from the newest checkpoint."""
    imitate = kept.origin.program == "sft"
    policy = prepare.load_policy(config, say, mesh)
    data = prepare.open_data(config, policy, mesh, imitate=imitate)
    prompts = data.train.of_rows(kept.ids)
    learner, state = prepare.make_learner(config, policy, mesh, imitate=imitate)
    del policy
    step = 0
    if (workdir / "checkpoints").is_dir():
        checkpoints = Checkpoints(workdir, keep=None)
        state, step = restore_newest(checkpoints, learner, state, mesh)
        checkpoints.close()
    yield f"from the checkpoint of step {step}" if step else "from the policy before the first step"
    yield from updates(kept, prompts, learner, state, mesh)


def describe(kept: Replay) -> Iterator[str]:
    """Yields each response with its rewards."""
    yield f"step {kept.step}, ended by {kept.origin.reason}"
    for i, row_id in enumerate(kept.ids):
        yield f"{row_id}  ({kept.origin.labels[int(kept.answers[i])]})"
        for g, text in enumerate(kept.responses[i]):
            shown = {name: x[i, g] for name, x in kept.scores.items()}
            shown |= {} if kept.advantages is None else {"advantage": kept.advantages[i, g]}
            yield f"  {g + 1}: {text!r}"
            yield "     " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items())


def updates(
    kept: Replay, prompts: Prompts, learner: Learner, state: TrainState, mesh: jax.sharding.Mesh
) -> Iterator[str]:
    """Yields what the updates of the step are, and what is not finite."""
    # Prompt by prompt, so that each has a gradient of its own. The advantages are those kept.
    parts, imitate = num_parts(mesh), kept.rewards is None
    step = dataclasses.replace(learner.step, micro_prompts=parts, pack=False)
    if not imitate:
        step = dataclasses.replace(step, recompute=True, advantage="dr_grpo")
    learner.step = step
    given = kept.samples, None if imitate else kept.as_scores(), kept.rewards, kept.advantages
    samples, scores, rewards, advantages = shard_whole(given, mesh)
    batch = shard_batch(prompts.batch, mesh)
    experience = Experience(batch, samples, None, scores, rewards)
    experience, plan, _ = learner.plan(experience)
    plan, info = _one_by_one(plan, experience, parts), {}
    if not imitate:
        params = learner.params(state)
        experience, info = learner.score(params, prompts, experience, plan)
        experience = experience._replace(advantages=advantages)
        del params
    bad = _not_finite(kept, experience)
    found = []
    key = jax.random.wrap_key_data(np.asarray(kept.key, np.uint32))
    for number, part in enumerate(learner.split(experience, plan, key), 1):
        for micro, norm in learner.contributions(state, part):
            if not np.isfinite(float(norm)):
                size = len(kept.ids) // parts
                rows = [size * i + int(row) for i, row in enumerate(micro.rows)]
                found += [f"{', '.join(kept.ids[row] for row in rows)}: its gradient"]
        state, metrics = learner.update(state, part)
        shown = {**{k.removeprefix("policy/"): v for k, v in info.items() if "kl" in k}, **metrics}
        names = [name for name in ("loss", "kl", "grad_norm", "skipped") if name in shown]
        values = "  ".join(f"{name} {float(shown[name]):.6g}" for name in names)
        yield f"update {number} of {len(plan.updates)}: {values}"
    for line in (*bad, *found):
        yield f"not finite: {line}"
    if not bad and not found:
        yield "rewards, log-probabilities and gradients are finite"


def _one_by_one(plan: StepPlan, experience: Experience, parts: int) -> StepPlan:
    """Returns a plan of the same updates, with one prompt of each part in a micro-batch."""
    batch = experience.batch
    shape = Shape(batch.prompt.tokens.shape[1], batch.images.mask.shape[2], plan.length)
    rows = [update.reshape(parts, -1).T for update in plan.rows(parts)]
    return StepPlan(
        plan.length,
        tuple(tuple(MicroBatch(row.copy(), shape, None) for row in update) for update in rows),
    )


def _not_finite(kept: Replay, experience: Experience) -> list[str]:
    """Returns a line for each response of which a number is none."""
    arrays: dict[str, Any] = dict(kept.scores)
    arrays |= {"reward": kept.rewards, "advantage": kept.advantages}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    mask = hosts.fetch(experience.samples.mask)
    for name in ("old_logprobs", "ref_logprobs"):
        if (value := getattr(experience, name)) is not None:
            who = "policy" if name == "old_logprobs" else "reference"
            value = np.where(mask, hosts.fetch(value), 0.0)
            arrays[f"log-probability under the {who}"] = value.sum(axis=-1)
    lines = []
    for i, row_id in enumerate(kept.ids):
        for g in range(mask.shape[1]):
            bad = [f"{k}={x[i, g]}" for k, x in arrays.items() if not np.isfinite(x[i, g])]
            if bad:
                lines.append(f"{row_id}, response {g + 1}: {', '.join(bad)}")
    return lines


def main(arguments: list[str]) -> None:
    """Runs the program."""
    if len(arguments) != 2:
        raise app.UsageError("give the folder of one run, or of one of its steps in replay/")
    with cli.errors_told():
        for line in replay(replays.find(Path(arguments[1]), FLAGS.step)):
            print(line, flush=True)


if __name__ == "__main__":
    flags.DEFINE_integer(
        "step", None, "Which of the steps that are kept; the last one if not given."
    )
    app.run(main)
