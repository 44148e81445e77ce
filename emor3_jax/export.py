"""Writes the policy of a run's newest checkpoint as a Hugging Face folder.

    python -m emor3_jax.export --config=configs/cpu_demo.py --workdir=runs/cpu_demo

The folder is `workdir/policy`, which transformers loads as it is. A run that reaches its last step
writes it by itself; this is for one that was stopped earlier. The config must name the policy that
the run started from.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.config import check_complete, default
from emor3_jax.data.inference_settings import FILE, InferenceSettings
from emor3_jax.errors import UserError
from emor3_jax.files import read_text
from emor3_jax.io.card import CARD_FILE, step_of
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console
from emor3_jax.models import read_config, vllm
from emor3_jax.parallel.mesh import check_policy, make_mesh
from emor3_jax.prepare.inference import inference_settings
from emor3_jax.runtime import cli, job
from emor3_jax.runtime.card import card_of_run
from emor3_jax.runtime.policy_folder import save_whole
from emor3_jax.runtime.restore import read_checkpoint_params


def export(config: ConfigDict, workdir: str | Path) -> Path:
    """Writes `workdir/policy` from the newest checkpoint.

    Args:
      config: of the run.
      workdir: of the run.

    Returns:
      The folder.

    Raises:
      UserError: if the run has no checkpoint, or a field of the config is missing.
    """
    workdir = Path(workdir)
    check_complete(config, default)
    say = Console("export")
    job.start_jax(config.log.compile_cache)
    checkpoints = None
    if (workdir / "checkpoints").is_dir():
        checkpoints = Checkpoints(workdir, keep=None)
    if checkpoints is None or not checkpoints.steps():
        raise UserError(f"workdir={str(workdir)!r}: has no checkpoint yet; train first")
    base = prepare.ensure_policy(config, say)
    policy = read_config(base)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_policy(mesh, policy.shapes)
    params, step = read_checkpoint_params(config, base, checkpoints, None, mesh)
    checkpoints.close()
    folder = workdir / "policy"
    settings = InferenceSettings.read(workdir) or inference_settings(config)
    exported = dataclasses.replace(prepare.read_policy(config, say), params=params)
    family = policy.family.model_type
    # That of the end of training has its results.
    own = folder / CARD_FILE
    card = read_text(own, UserError) if own.is_file() else ""
    if step_of(card) != step:
        card = card_of_run(workdir.name, "", config, family, step, settings)
    save_whole(exported, folder, {FILE: settings.to_json(), CARD_FILE: card})
    say(f"wrote the policy of step {step} to {folder}")
    for line in vllm.advice(folder):
        say(line)
    return folder


if __name__ == "__main__":
    cli.run(export)
