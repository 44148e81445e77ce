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
from emor3_jax.models import Policy, save
from emor3_jax.parallel.mesh import make_mesh
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
    policy = prepare.load_policy(config, say)
    optimizer, _ = prepare.make_update(config)
    shapes = jax.eval_shape(lambda: TrainState.create(policy.params, optimizer))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    state, _ = checkpoints.restore(step, shapes, mesh)
    checkpoints.close()
    folder = workdir / "policy"
    save(Policy(policy.config, jax.device_get(state.params), policy.processor), folder)
    say(f"wrote the policy of step {step} to {folder}")
    return folder


if __name__ == "__main__":
    cli.run(export)
