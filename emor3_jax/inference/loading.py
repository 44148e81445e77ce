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
      step: of the checkpoint that it was read from; None of a folder.
    """

    policy: LoadedPolicy
    settings: InferenceSettings | None
    name: str
    step: int | None = None


class PolicyPlace(NamedTuple):
    """Where a policy is.

    Attributes:
      folder: in Hugging Face's format, or an id on the hub; None if it is a checkpoint.
      run: workdir of the run that it is of; None if it is of none that is known.
      step: of the checkpoint; None takes the newest that is what was written.
    """

    folder: Path | str | None
    run: Path | None = None
    step: int | None = None


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
    say = say or (lambda line: None)
    place = locate(name)
    if place.folder is None:
        return _of_checkpoint(place, str(name), dtype, say)
    if place.run is None:
        return _of_folder(place.folder, str(name), dtype)
    say(f"loading {place.folder}")
    found = _of_folder(place.folder, str(name), dtype)
    # A run of an earlier version wrote no settings.
    return found._replace(settings=found.settings or settings_of_run(place.run))


def locate(name: str | Path) -> PolicyPlace:
    """Finds a policy by any of its names, and reads nothing of it.

    Args:
      name: as of `find_policy`.

    Raises:
      UserError: if there is no such policy, run or checkpoint.
    """
    folder = expand_user(name)
    run, step = folder, None
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        run, step = folder.parent.parent, int(folder.name)
    if folder.name == "policy" and is_folder(folder.parent / "checkpoints"):
        return PolicyPlace(folder, folder.parent)
    if is_folder(run / "checkpoints"):
        return _locate_in_run(run, step, name)
    if is_file(folder / "config.json"):
        return PolicyPlace(folder)
    if is_folder(folder / "policy"):
        return PolicyPlace(folder / "policy")
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
    return PolicyPlace(str(name))


def _locate_in_run(run: Path, step: int | None, name: str | Path) -> PolicyPlace:
    checkpoints = Checkpoints(run, keep=None)
    try:
        steps = checkpoints.steps()
    finally:
        checkpoints.close()
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{show(name)}: no such checkpoint; {run} has {known}")
    if step is None and _is_newer(run / "policy", run / "checkpoints", steps):
        return PolicyPlace(run / "policy", run)
    if not steps:
        raise UserError(f"{show(name)}: the run has no checkpoint yet; train first")
    return PolicyPlace(None, run, step)


def _of_folder(folder: str | Path, name: str, dtype: Any) -> FoundPolicy:
    policy = load(folder, dtype=dtype)
    return FoundPolicy(policy, InferenceSettings.read(policy.source), name)


def _of_checkpoint(
    place: PolicyPlace, name: str, dtype: Any, say: Callable[[str], None]
) -> FoundPolicy:
    config = job.read_config(place.run)
    embedded = config.policy.path == EMBEDDED
    path = embedded_folder(config) if embedded else Path(config.policy.path)
    if embedded and not is_file(path / "config.json"):
        raise UserError(
            f"{show(name)}: the run started from {path}, which is not there; start from the "
            "folder that the run was started from"
        )
    base = prepare.read_policy(config, say)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    checkpoints = Checkpoints(place.run, keep=None)
    try:
        params, step = read_checkpoint_params(config, base.source, checkpoints, place.step, mesh)
    finally:
        checkpoints.close()
    say(f"loaded step {step} of {place.run}")
    params = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]).astype(dtype), params)
    loaded = dataclasses.replace(base, params=params)
    return FoundPolicy(loaded, settings_of_run(place.run), name, step)


def settings_of_run(workdir: Path) -> InferenceSettings:
    """Returns the inference settings of a run, or those that its config gives."""
    return InferenceSettings.read(workdir) or inference_settings(job.read_config(workdir))


def _is_newer(policy: Path, checkpoints: Path, steps: list[int]) -> bool:
    """Looks whether a run's policy was written after its newest checkpoint."""
    if not is_file(policy / "config.json"):
        return False
    if not steps:
        return True
    newest = checkpoints / str(max(steps))
    return (policy / "config.json").stat().st_mtime >= newest.stat().st_mtime
