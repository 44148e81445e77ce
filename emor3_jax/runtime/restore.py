"""Policies out of the checkpoints of runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.config import ConfigError
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.models import LoadedPolicy, load, read_config
from emor3_jax.parallel.mesh import param_shardings


def load_evaluated(config: ConfigDict, say: Callable[[str], None], mesh: Mesh) -> LoadedPolicy:
    """Loads `policy.path`, or its form in `evaluate.checkpoint`.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    place = config.evaluate.checkpoint
    if not place:
        return prepare.load_policy(config, say, mesh)
    folder, step = Path(place), None
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    checkpoints = Checkpoints(folder, keep=None) if (folder / "checkpoints").is_dir() else None
    known = checkpoints.steps() if checkpoints else []
    if not known or step not in (None, *known):
        rule = (
            "must be the folder of a run, or one of its checkpoints; "
            f"{folder / 'checkpoints'} has {', '.join(map(str, known)) or 'none'}"
        )
        raise ConfigError("evaluate.checkpoint", place, rule)
    step = known[-1] if step is None else step
    say(f"loading the policy of step {step} of {folder}")
    base = prepare.read_policy(config, say)
    params = read_checkpoint_params(
        config, prepare.ensure_policy(config, say), checkpoints, step, mesh
    )
    checkpoints.close()
    policy = prepare.with_attention(base.policy, config, mesh.devices.flat[0].platform)
    return LoadedPolicy(policy, params, base.processor)


def read_checkpoint_params(
    config: ConfigDict, base: Path, checkpoints: Checkpoints, step: int, mesh: Mesh
) -> dict:
    """Returns the policy's parameters as a checkpoint has them, adapters merged into their base.

    Args:
      config: of the run, as far as `policy` says what was trained.
      base: folder of the policy that the run started from.
      checkpoints: of the run.
      step: of the checkpoint.
      mesh: the arrays come back cut by this mesh's rules.
    """
    shapes = read_config(base).param_shapes()
    trained = jax.eval_shape(partial(prepare.trained_params, config), shapes)
    params = checkpoints.restore_params(step, trained, mesh)
    if not config.policy.lora_rank:
        return params
    whole = load(base, shardings=lambda x: param_shardings(x, mesh)).params
    return prepare.make_lora(config, whole).merge(params)
