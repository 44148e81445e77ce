"""Checkpoints with orbax: train state, data position and progress, in one step folder."""

import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from emor3_jax.errors import UserError
from emor3_jax.parallel.mesh import param_shardings

LAYOUT = 2
"""How parameters lie in their arrays; goes up when the same arrays would mean another policy.
Since 2 the tower's fused projection goes head by head."""


class CheckpointError(UserError):
    """A checkpoint that this program would read wrongly."""


def release(tree: Any) -> Any:
    """Frees the memory of arrays whose values are not needed; returns their shapes and layouts.

    Args:
      tree: arrays on devices, each in use nowhere else: whoever still holds one cannot read it.
    """

    def free(x: jax.Array) -> jax.ShapeDtypeStruct:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        x.delete()
        return shape

    return jax.tree.map(free, tree)


class Checkpoints:
    """Keeps the newest checkpoints of a run under `workdir/checkpoints/<step>`.

    A checkpoint is written whole or not at all (orbax renames a finished folder into place), so a
    run that is killed at any moment goes on from the last complete one. Threads write it while the
    run goes on; the methods that read wait for them.
    """

    def __init__(self, workdir: Path, keep: int | None = 2) -> None:
        """Opens or makes the folder.

        Args:
          workdir: folder of the run.
          keep: how many checkpoints stay; None keeps all, as who only reads does.
        """
        # A thread that ends the process waits for what the main one is writing.
        self._one_at_a_time = threading.RLock()
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """Returns the newest step that is complete, or None."""
        self.wait()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps that are complete, rising."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Begins to write a checkpoint; waits for the one before, and for the arrays.

        They are copied to the host before this returns, so they may be donated then.

        Args:
          step: steps done so far.
          state: pytree of arrays.
          progress: JSON, the data position and the evaluations so far.
        """
        with self._one_at_a_time:
            if step in self._manager.all_steps():
                return
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave({**progress, "layout": LAYOUT}),
                ),
            )

    def wait(self) -> None:
        """Waits until what is being written is complete.

        Raises:
          Exception: whatever went wrong in writing it.
        """
        with self._one_at_a_time:
            self._manager.wait_until_finished()

    def restore(self, step: int, state: Any, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, Any]]:
        """Returns the state and the progress of a checkpoint.

        Args:
          step: a step that `latest` returned.
          state: pytree of the same structure and shapes, its values unused: what `release` returns,
            else there are two states in memory.
          mesh: the arrays come back cut by this mesh's rules.

        Raises:
          CheckpointError: if it was written with another layout, or holds other arrays.
        """
        progress, shardings = self.progress(step), param_shardings(state, mesh)
        self._check_arrays(step, state, every=True)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
        )
        return restored["state"], progress

    def progress(self, step: int) -> dict[str, Any]:
        """Returns the progress of a checkpoint alone.

        Raises:
          CheckpointError: if it was written with another layout, or is not whole.
        """
        self.wait()
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        try:
            progress = self._manager.restore(step, args=args)["progress"]
        except (KeyError, OSError, ValueError) as error:
            raise self._not_whole(step) from error
        layout = progress.pop("layout", 1)
        if layout != LAYOUT:
            raise CheckpointError(
                f"{self._manager.directory / str(step)}: its parameters are laid out as of version "
                f"{layout}, and this program reads {LAYOUT}; export the policy with the program "
                "that wrote it, and start from the exported folder (policy.path)"
            )
        return progress

    def restore_params(self, step: int, params: Any, mesh: jax.sharding.Mesh) -> Any:
        """Returns what was trained alone, whatever optimizer and reference the run had.

        Args:
          step: one of `steps`.
          params: pytree of its shapes.
          mesh: the arrays come back cut by this mesh's rules.

        Raises:
          CheckpointError: if it was written with another layout, or holds other arrays.
        """
        wanted = {"params": params}
        # A reference that follows the policy lies beside the state.
        beside = self.progress(step).get("reference")
        wanted = {"state": wanted} if beside else wanted
        self._check_arrays(step, wanted, every=False)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            wanted,
            param_shardings(wanted, mesh),
        )
        part = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        found = self._manager.restore(step, args=ocp.args.Composite(state=part))["state"]
        return (found["state"] if beside else found)["params"]

    def _not_whole(self, step: int) -> CheckpointError:
        """Returns the error of a checkpoint that lacks files.

        Such as one that was copied in part, or written to a bucket that cannot rename folders.
        """
        rule = "is not a whole checkpoint; delete it, and a run goes on from the one before it"
        return CheckpointError(f"{self._manager.directory / str(step)}: {rule}")

    def _check_arrays(self, step: int, wanted: Any, *, every: bool) -> None:
        """Checks that a checkpoint holds arrays of the wanted paths and shapes.

        Args:
          step: of the checkpoint.
          wanted: pytree of arrays or shapes.
          every: it holds no others.

        Raises:
          CheckpointError: naming the first that differs.
        """
        folder = self._manager.directory / str(step)
        try:
            there = _shapes(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
        except (KeyError, OSError, ValueError) as error:
            raise self._not_whole(step) from error
        here = _shapes(wanted)
        for path in sorted(here.keys() | there.keys() if every else here.keys()):
            if here.get(path) != there.get(path):
                raise CheckpointError(
                    f"{folder}: {path} is {there.get(path, 'not there')}, and in this run "
                    f"{here.get(path, 'not there')}; keep what the run began with: the policy, its "
                    "adapters (policy.lora_*), policy.freeze_vision_tower, policy_update.rates and "
                    "reference.kind; or take another workdir"
                )

    def close(self) -> None:
        """Waits for what is being written."""
        with self._one_at_a_time:
            self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns path → shape of the arrays of a tree, whether its nodes are dicts or tuples."""

    def name(key: Any) -> str:
        found = (getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind))
        return str(next(found))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}
