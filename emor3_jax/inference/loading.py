"""A policy by any of its names: a folder, a run, a checkpoint of it, an id on the hub."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax import prepare
from emor3_jax.config import EMBEDDED
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.errors import UserError
from emor3_jax.files import expand_user, is_file, is_folder, show
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.models import LoadedPolicy, is_hub_id, load
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.prepare.embedded_policy import embedded_folder
from emor3_jax.prepare.inference import inference_settings
from emor3_jax.runtime import job
from emor3_jax.runtime.restore import read_checkpoint_params


class FoundPolicy(NamedTuple):
    """A policy and what it is asked.

    Attributes:
      policy: with its parameters.
      settings: of its folder or run; None if they say nothing.
      name: that it was asked for by.
    """

    policy: LoadedPolicy
    settings: InferenceSettings | None
    name: str


def find_policy(
    name: str | Path, dtype: Any = jnp.float32, say: Callable[[str], None] | None = None
) -> FoundPolicy:
    """Loads a policy onto the first device.

    Args:
      name: a folder in Hugging Face's format; the workdir of a run, of which the newest state is
        taken, its `policy` folder or a checkpoint; `workdir/checkpoints/<step>`; or an id on the
        hub, "owner/name" or "owner/name@revision".
      dtype: of the parameters.
      say: told what is loaded.

    Raises:
      UserError, FileNotFoundError: if there is no such policy, or it cannot be read.
    """
    say, folder = say or (lambda line: None), expand_user(name)
    run, step = folder, None
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        run, step = folder.parent.parent, int(folder.name)
    if folder.name == "policy" and is_folder(folder.parent / "checkpoints"):
        found = _of_folder(folder, str(name), dtype)
        return found._replace(settings=found.settings or _settings_of_run(folder.parent))
    if is_folder(run / "checkpoints"):
        return _of_run(run, step, str(name), dtype, say)
    if is_file(folder / "config.json"):
        return _of_folder(folder, str(name), dtype)
    if is_folder(folder / "policy"):
        return _of_folder(folder / "policy", str(name), dtype)
    if not is_folder(folder) and not is_hub_id(str(name)):
        raise UserError(
            f"there is no policy {show(name)}: give a folder in Hugging Face's format, the folder "
            "of a run, one of its checkpoints, or an id on the hub, 'owner/name'"
        )
    if is_folder(folder):
        raise UserError(
            f"{show(name)} holds neither a policy (config.json and weights) nor a run with a "
            "checkpoint; give the folder of one"
        )
    return _of_folder(str(name), str(name), dtype)


def _of_folder(folder: str | Path, name: str, dtype: Any) -> FoundPolicy:
    policy = load(folder, dtype=dtype)
    return FoundPolicy(policy, InferenceSettings.read(policy.source), name)


def _of_run(
    workdir: Path, step: int | None, name: str, dtype: Any, say: Callable[[str], None]
) -> FoundPolicy:
    checkpoints = Checkpoints(workdir, keep=None)
    try:
        steps = checkpoints.steps()
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{show(name)}: no such checkpoint; {workdir} has {known}")
        if step is None and _is_newer(workdir / "policy", workdir / "checkpoints", steps):
            say(f"loading {workdir / 'policy'}")
            found = _of_folder(workdir / "policy", name, dtype)
            # A run of an earlier version wrote no settings.
            return found._replace(settings=found.settings or _settings_of_run(workdir))
        if not steps:
            raise UserError(f"{show(name)}: the run has no checkpoint yet; train first")
        config = job.read_config(workdir)
        embedded = config.policy.path == EMBEDDED
        path = embedded_folder(config) if embedded else Path(config.policy.path)
        if embedded and not is_file(path / "config.json"):
            raise UserError(
                f"{show(name)}: the run started from {path}, which is not there; start from the "
                "folder that the run was started from"
            )
        base = prepare.read_policy(config, say)
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        params, step = read_checkpoint_params(config, base.source, checkpoints, step, mesh)
    finally:
        checkpoints.close()
    say(f"loaded step {step} of {workdir}")
    params = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]).astype(dtype), params)
    loaded = dataclasses.replace(base, params=params)
    return FoundPolicy(loaded, _settings_of_run(workdir), name)


def _settings_of_run(workdir: Path) -> InferenceSettings:
    return InferenceSettings.read(workdir) or inference_settings(job.read_config(workdir))


def _is_newer(policy: Path, checkpoints: Path, steps: list[int]) -> bool:
    """Looks whether a run's policy was written after its newest checkpoint."""
    if not is_file(policy / "config.json"):
        return False
    if not steps:
        return True
    newest = checkpoints / str(max(steps))
    return (policy / "config.json").stat().st_mtime >= newest.stat().st_mtime
