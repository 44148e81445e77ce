"""Policies out of the checkpoints of runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.config import ConfigError
from emor3_jax.io.checkpoints import CheckpointError, Checkpoints, DamagedError, release
from emor3_jax.learner.learner import Learner
from emor3_jax.models import LoadedPolicy, load, read_config
from emor3_jax.parallel.mesh import param_shardings
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout.judge import Judge


def load_evaluated(config: ConfigDict, say: Callable[[str], None], mesh: Mesh) -> LoadedPolicy:
    """Loads `policy.path`, or its form in `evaluate.checkpoint`.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    place = config.evaluate.checkpoint
    if not place:
        return prepare.load_policy(config, say, mesh)
    folder, step = Path(place), None
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        folder, step = folder.parent.parent, int(folder.name)
    checkpoints = Checkpoints(folder, keep=None) if (folder / "checkpoints").is_dir() else None
    known = checkpoints.steps() if checkpoints else []
    if not known or step not in (None, *known):
        rule = (
            "must be the folder of a run, or one of its checkpoints; "
            f"{folder / 'checkpoints'} has {', '.join(map(str, known)) or 'none'}"
        )
        raise ConfigError("evaluate.checkpoint", place, rule)
    base = prepare.read_policy(config, say)
    params, step = read_checkpoint_params(
        config, prepare.ensure_policy(config, say), checkpoints, step, mesh
    )
    say(f"loaded the policy of step {step} of {folder}")
    checkpoints.close()
    policy = prepare.with_attention(base.policy, config, mesh.devices.flat[0].platform)
    return LoadedPolicy(policy, params, base.processor)


def load_judge_of_evaluation(
    config: ConfigDict, policy: LoadedPolicy, say: Callable[[str], None], mesh: Mesh
) -> Judge | None:
    """Returns who is asked about the responses of an evaluation; None for the policy itself.

    The reference is `policy.path`, which a checkpoint started from.

    Raises:
      ConfigError: as `prepare.load_judge`.
    """
    name = prepare.judge_names(config)[1]
    if name == "policy" or (name == "reference" and not config.evaluate.checkpoint):
        return None
    path = config.policy.path if name == "reference" else name
    say(f"loading the judge {path}")
    field = "evaluate.judge" if config.evaluate.judge else "reflect.judge"
    return prepare.load_judge(config, field, path, policy, say, mesh)


def restore_newest(
    checkpoints: Checkpoints, learner: Learner, state: TrainState, mesh: Mesh
) -> tuple[TrainState, int]:
    """Returns the state of the newest checkpoint that is what was written, and its step.

    Args:
      checkpoints: of the run.
      learner: of its config; gets back what it kept beside the state.
      state: as before the first step; let go of where there is a checkpoint.
      mesh: the arrays come back cut by this mesh's rules.

    Returns:
      As before the first step, and 0, where there is no checkpoint.
    """
    shapes = None
    while (step := checkpoints.latest()) is not None:
        shapes = release(learner.checkpoint(state)) if shapes is None else shapes
        try:
            arrays, progress = checkpoints.restore(step, shapes, mesh)
        except DamagedError as error:
            checkpoints.give_up(step, error)
        else:
            return learner.restore(arrays, progress), step
    return state, 0


def read_checkpoint_params(
    config: ConfigDict, base: Path, checkpoints: Checkpoints, step: int | None, mesh: Mesh
) -> tuple[dict, int]:
    """Returns the policy's parameters as a checkpoint has them, adapters merged, and its step.

    Args:
      config: of the run, as far as `policy` says what was trained.
      base: folder of the policy that the run started from.
      checkpoints: of the run.
      step: of the checkpoint; None takes the newest that is what was written.
      mesh: the arrays come back cut by this mesh's rules.

    Raises:
      CheckpointError: if there is none, or it holds another policy.
    """
    shapes = read_config(base).param_shapes()
    trained = jax.eval_shape(partial(prepare.trained_params, config), shapes)
    params, step = (
        _newest(checkpoints, trained, mesh)
        if step is None
        else (
            checkpoints.restore_params(step, trained, mesh),
            step,
        )
    )
    if not config.policy.lora_rank:
        return params, step
    whole = load(base, shardings=lambda x: param_shardings(x, mesh)).params
    return prepare.make_lora(config, whole).merge(params), step


def _newest(checkpoints: Checkpoints, shapes: Any, mesh: Mesh) -> tuple[dict, int]:
    """Returns the parameters of the newest checkpoint that is what was written, and its step."""
    while (step := checkpoints.latest()) is not None:
        try:
            return checkpoints.restore_params(step, shapes, mesh), step
        except DamagedError as error:
            checkpoints.give_up(step, error)
    raise CheckpointError("there is no checkpoint yet; train first")
