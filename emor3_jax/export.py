"""Writes the policy of a run's newest checkpoint as a Hugging Face folder.

    python -m emor3_jax.export --config=configs/cpu_demo.py --workdir=runs/cpu_demo

The folder is `workdir/policy`, which transformers loads as it is. A run that reaches its last step
writes it by itself; this is for one that was stopped earlier. The config must name the policy that
the run started from.
"""

from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from emor3_jax import cli, prepare
from emor3_jax.config import ConfigError
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console
from emor3_jax.models import Policy, load, read_config, save
from emor3_jax.models.qwen2_5_vl.processor import Processor
from emor3_jax.models.qwen2_5_vl.weights import param_shapes
from emor3_jax.parallel.mesh import make_mesh, param_shardings
from emor3_jax.reference import keep
from emor3_jax.rl.update import TrainState


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
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    step = checkpoints.latest()
    if step is None:
        rule = f"there is no checkpoint yet under {workdir / 'checkpoints'}; train first"
        raise ConfigError("checkpoint.every", config.checkpoint.every, rule)
    base = prepare.find_policy(config, say)
    shapes = read_config(base)
    optimizer, _ = prepare.make_update(config)
    trained = jax.eval_shape(partial(prepare.trained_params, config), param_shapes(shapes))
    blank = jax.eval_shape(lambda p: TrainState.create(p, optimizer), trained)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if checkpoints.progress(step).get("reference"):
        # A reference that follows the policy lies beside it.
        kept = jax.eval_shape(partial(keep, dtype=config.reference.dtype), param_shapes(shapes))
        held, _ = checkpoints.restore(step, {"state": blank, "reference": kept}, mesh)
        params = held["state"].params
    else:
        params = checkpoints.restore(step, blank, mesh)[0].params
    checkpoints.close()
    if config.policy.lora_rank:
        whole = load(base, shardings=lambda x: param_shardings(x, mesh)).params
        params = prepare.make_lora(config, whole).merge(params)
    folder = workdir / "policy"
    save(Policy(shapes, params, Processor.from_folder(base)), folder)
    say(f"wrote the policy of step {step} to {folder}")
    return folder


if __name__ == "__main__":
    cli.run(export)
