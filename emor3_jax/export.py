"""Writes the policy of a run's newest checkpoint as a Hugging Face folder.

    python -m emor3_jax.export --config=configs/cpu_demo.py --workdir=runs/cpu_demo

The folder is `workdir/policy`, which transformers loads as it is. A run that reaches its last step
writes it by itself; this is for one that was stopped earlier. The config must name the policy that
the run started from.
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from emor3_jax import cli, prepare
from emor3_jax.config import ConfigError
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console
from emor3_jax.models import Policy, read_config, save
from emor3_jax.models.qwen2_5_vl.processor import Processor
from emor3_jax.models.qwen2_5_vl.weights import param_shapes
from emor3_jax.parallel.mesh import check_policy, make_mesh
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
    prepare.start_jax(config.log.compile_cache)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    step = checkpoints.latest()
    if step is None:
        rule = f"there is no checkpoint yet under {workdir / 'checkpoints'}; train first"
        raise ConfigError("checkpoint.every", config.checkpoint.every, rule)
    base = prepare.find_policy(config, say)
    shapes = read_config(base)
    optimizer, _ = prepare.make_update(config)
    blank = jax.eval_shape(lambda p: TrainState.create(p, optimizer), param_shapes(shapes))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_policy(mesh, shapes)
    state, _ = checkpoints.restore(step, blank, mesh)
    checkpoints.close()
    folder = workdir / "policy"
    save(Policy(shapes, state.params, Processor.from_folder(base)), folder)
    say(f"wrote the policy of step {step} to {folder}")
    return folder


if __name__ == "__main__":
    cli.run(export)
