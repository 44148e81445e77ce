"""Writes the policy of a run's newest checkpoint as a Hugging Face folder.

    python -m emor3_jax.export --config=configs/cpu_demo.py --workdir=runs/cpu_demo

The folder is `workdir/policy`, which transformers loads as it is. A run that reaches its last step
writes it by itself; this is for one that was stopped earlier. The config must name the policy that
the run started from.
"""

from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import cli, prepare
from emor3_jax.config import ConfigError
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console
from emor3_jax.models import Policy, load, read_config, save
from emor3_jax.models.qwen2_5_vl.processor import Processor
from emor3_jax.models.qwen2_5_vl.weights import param_shapes
from emor3_jax.parallel.mesh import check_policy, make_mesh, param_shardings


def export(config: ConfigDict, workdir: Path) -> Path:
    """Writes `workdir/policy` from the newest checkpoint.

    Args:
      config: of the run.
      workdir: of the run.

    Returns:
      The folder.

    Raises:
      ConfigError: if the run has no checkpoint.
    """
    say = Console("export")
    prepare.start_jax(config.log.compile_cache)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    step = checkpoints.latest()
    if step is None:
        rule = f"there is no checkpoint yet under {workdir / 'checkpoints'}; train first"
        raise ConfigError("checkpoint.every", config.checkpoint.every, rule)
    base = prepare.find_policy(config, say)
    shapes = read_config(base)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_policy(mesh, shapes)
    params = read_checkpoint_params(config, base, checkpoints, step, mesh)
    checkpoints.close()
    folder = workdir / "policy"
    save(Policy(shapes, params, Processor.from_folder(base)), folder)
    say(f"wrote the policy of step {step} to {folder}")
    return folder


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
    shapes = param_shapes(read_config(base))
    trained = jax.eval_shape(partial(prepare.trained_params, config), shapes)
    params = checkpoints.restore_params(step, trained, mesh)
    if not config.policy.lora_rank:
        return params
    whole = load(base, shardings=lambda x: param_shardings(x, mesh)).params
    return prepare.make_lora(config, whole).merge(params)


if __name__ == "__main__":
    cli.run(export)
