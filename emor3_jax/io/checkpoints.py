"""Checkpoints with orbax: train state, data position and progress, in one step folder.

What is read is what was written: beside the arrays lie their shapes, types and checksums, and a
digest of the JSON itself. A checkpoint that fails is named, and the one before it is used.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from emor3_jax.errors import RunError, UserError, os_error_number, os_error_text
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import param_shardings, path_of

logger = logging.getLogger(__name__)

LAYOUT = 2
"""How parameters lie in their arrays; goes up when the same arrays would mean another policy.
Since 2 the tower's fused projection goes head by head."""


class CheckpointError(UserError):
    """A checkpoint that this program would read wrongly."""


class DamagedError(UserError):
    """A checkpoint that is not what was written."""


_UNFINISHED = "*.orbax-checkpoint-tmp"
_REMOVALS = 10


def _not_orbax(record: logging.LogRecord) -> bool:
    """Keeps orbax from printing the traces of errors that `Checkpoints` raises."""
    return "/orbax/" not in record.pathname or record.levelno < logging.ERROR


logging.getLogger("absl").addFilter(_not_orbax)


def _hear_unraisable(tell: Callable[[Any], Any], unraisable: Any) -> None:
    """Leaves out what tensorstore says to the loop of a checkpoint that has failed already."""
    if str(unraisable.exc_value) != "Event loop is closed":
        tell(unraisable)


sys.unraisablehook = partial(_hear_unraisable, sys.unraisablehook)


@jax.jit
def checksums(tree: Any) -> list[jax.Array]:
    """Returns a checksum of each array, uint32[], whatever devices it lies on.

    The bits of element i count 2 * i + 1 times, modulo 2**32: a single bit that is flipped, or two
    elements that are exchanged, always change the sum.
    """

    def of(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            index = index * jnp.uint32(size) + place
        return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)

    return [of(x) for x in jax.tree.leaves(tree)]


def describe(tree: Any) -> dict[str, list[Any]]:
    """Returns path → shape, type and checksum of each array of a tree."""
    sums = hosts.fetch(checksums(tree))
    return {
        path: [list(shape), dtype, int(value)]
        for (path, (shape, dtype)), value in zip(_kinds(tree).items(), sums, strict=True)
    }


def _kinds(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns path → shape and type of each array, or description of one."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(keys): (tuple(x.shape), x.dtype.name) for keys, x in leaves}


def _digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


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
          keep: how many checkpoints stay; None keeps all, as who only reads does. Who writes also
            removes what a killed run was writing.
        """
        # A thread that ends the process waits for what the main one is writing.
        self._one_at_a_time = threading.RLock()
        self._damaged: set[int] = set()
        self._writing: int | None = None
        self._has_failed = False
        self._root = (workdir / "checkpoints").absolute()
        if keep is not None and hosts.is_first():
            self._remove_unfinished()
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """Returns the newest step whose checkpoint can be read, or None if there is none at all.

        Newer ones are named. Their arrays are checked when they are restored.

        Raises:
          CheckpointError: if there are some, and none of them can be read.
        """
        found = self.steps()
        for step in reversed(found):
            if step in self._damaged:
                continue
            try:
                self.progress(step)
            except DamagedError as error:
                self.give_up(step, error)
                continue
            return step
        if found:
            raise CheckpointError(
                f"{self._manager.directory}: none of the checkpoints {', '.join(map(str, found))} "
                "can be read; move the folder away to begin anew"
            )
        return None

    def give_up(self, step: int, error: DamagedError) -> None:
        """Remembers that a checkpoint is damaged, and says so."""
        logger.warning("%s; the one before it is used", error)
        self._damaged.add(step)

    def set_aside(self) -> None:
        """Moves damaged checkpoints to `workdir/damaged`, so that their steps can be written anew.

        For a run that goes on; all processes call it.
        """
        with hosts.first_goes_first():
            for step in sorted(self._damaged) if hosts.is_first() else ():
                folder = self._manager.directory / str(step)
                place = Path(self._manager.directory).parent / "damaged" / str(step)
                number = 0
                while place.exists():
                    number += 1
                    place = place.with_name(f"{step}.{number}")
                place.parent.mkdir(exist_ok=True)
                Path(folder).rename(place)
                logger.warning("the damaged checkpoint of step %s is now %s", step, place)
        self._damaged.clear()
        self._manager.reload()

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

        Raises:
          RunError: as `wait`, of this checkpoint or of the one before.
        """
        with self._one_at_a_time:
            if step in self._manager.all_steps():
                return
            told = {**progress, "layout": LAYOUT, "step": step, "arrays": describe(state)}
            # As it will be read.
            told = json.loads(json.dumps(told))
            self.wait()
            self._writing = step
            with self._written_whole():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        progress=ocp.args.JsonSave({**told, "digest": _digest(told)}),
                    ),
                )

    def compile(self, state: Any) -> None:
        """Compiles what `save` runs on these arrays, so that no step of the run waits for it."""
        jax.block_until_ready(checksums(state))

    def wait(self) -> None:
        """Waits until what is being written is complete.

        Raises:
          RunError: if it could not be written, as on a full disk; what was written of it is gone.
          Exception: whatever else went wrong.
        """
        with self._one_at_a_time, self._written_whole():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _written_whole(self) -> Iterator[None]:
        """Names a checkpoint that the file system did not take, and removes its parts."""
        try:
            yield
        except Exception as error:
            number = os_error_number(error)
            if number is None:
                raise
            self._has_failed = True
            if hosts.is_first():
                self._remove_unfinished()
            there = sorted(int(path.name) for path in self._root.glob("*") if path.name.isdecimal())
            rest = f"goes on from the checkpoint of step {there[-1]}" if there else "begins anew"
            raise RunError(
                f"{self._root}: the checkpoint of step {self._writing} could not be written: "
                f"{os_error_text(number)} there, and start again: the run {rest}"
            ) from error

    def _remove_unfinished(self) -> None:
        # Writers that have not heard of the failure yet make folders anew.
        for _ in range(_REMOVALS if self._has_failed else 1):
            for folder in self._root.glob(_UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05 * self._has_failed)

    def restore(self, step: int, state: Any, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, Any]]:
        """Returns the state and the progress of a checkpoint.

        Args:
          step: a step that `latest` returned.
          state: pytree of the same structure and shapes, its values unused: what `release` returns,
            else there are two states in memory.
          mesh: the arrays come back cut by this mesh's rules.

        Raises:
          DamagedError: if it is not what was written.
          CheckpointError: if it was written with another layout, or by another kind of run.
        """
        wanted = self._told(step).get("arrays")
        self._check_kind(step, _kinds(state), wanted, whole=True)
        target = _laid_out(state, mesh)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        found = self._read(step, args)["state"]
        self._check_sums(step, found, wanted)
        return found, self.progress(step)

    def progress(self, step: int) -> dict[str, Any]:
        """Returns the progress of a checkpoint alone.

        Raises:
          DamagedError: if it is not what was written.
          CheckpointError: if it was written with another layout.
        """
        told = self._told(step)
        return {key: value for key, value in told.items() if key not in ("step", "arrays")}

    def _told(self, step: int) -> dict[str, Any]:
        """Returns the JSON of a checkpoint, the step and the arrays' descriptions among it."""
        self.wait()
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        told = self._read(step, args)["progress"]
        if not isinstance(told, dict):
            raise DamagedError(f"{self._folder(step)}: its progress is no JSON object")
        digest = told.pop("digest", None)
        if digest is not None and digest != _digest(told):
            raise DamagedError(f"{self._folder(step)}: its progress is not what was written")
        layout = told.pop("layout", 1)
        if layout != LAYOUT:
            raise CheckpointError(
                f"{self._folder(step)}: its parameters are laid out as of version "
                f"{layout}, and this program reads {LAYOUT}; export the policy with the program "
                "that wrote it, and start from the exported folder (policy.path)"
            )
        if told.get("step", step) != step:
            raise DamagedError(
                f"{self._folder(step)}: is a copy of the checkpoint of step {told['step']}"
            )
        return told

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        """Reads parts of a checkpoint; raises DamagedError for what cannot be read."""
        try:
            return self._manager.restore(step, args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            # A missing or damaged file: orbax and tensorstore raise errors of many kinds.
            what = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise DamagedError(f"{self._folder(step)}: cannot be read ({what})") from error

    def _folder(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def _check_kind(
        self,
        step: int,
        kinds: dict[str, tuple[tuple[int, ...], str]],
        wanted: dict[str, list[Any]] | None,
        *,
        whole: bool = False,
    ) -> None:
        """Raises CheckpointError if a run of other settings wrote the arrays."""
        if wanted is None:
            return
        there = {path: (tuple(shape), dtype) for path, (shape, dtype, _) in wanted.items()}
        strange = sorted(path for path in kinds if kinds[path] != there.get(path))
        strange += sorted(there.keys() - kinds.keys()) if whole else []
        if strange:
            path = strange[0]
            raise CheckpointError(
                f"{self._folder(step)}: has {_shown(there.get(path))} as {path}, and this run "
                f"needs {_shown(kinds.get(path))} ({len(strange)} arrays differ); it was written "
                "with another policy, or other settings of what is trained (policy.lora_rank, "
                "policy_update.mu_dtype, reference.kind): take those, or another workdir"
            )

    def _check_sums(self, step: int, tree: Any, wanted: dict[str, list[Any]] | None) -> None:
        """Raises DamagedError if arrays are not those that were written."""
        if wanted is None:
            logger.warning("%s: older than checksums, read unchecked", self._folder(step))
            return
        found = describe(tree)
        damaged = [path for path, (*_, value) in found.items() if value != wanted[path][2]]
        if damaged:
            raise DamagedError(
                f"{self._folder(step)}: {damaged[0]} is not what was written, by its checksum "
                f"({len(damaged)} of {len(found)} arrays)"
            )

    def restore_params(self, step: int, params: Any, mesh: jax.sharding.Mesh) -> Any:
        """Returns what was trained alone, whatever optimizer and reference the run had.

        Args:
          step: one of `steps`.
          params: pytree of its shapes.
          mesh: the arrays come back cut by this mesh's rules.

        Raises:
          DamagedError: if it is not what was written.
          CheckpointError: if it was written with another layout, or holds another policy.
        """
        wanted = {"params": params}
        # A reference that follows the policy lies beside the state.
        told = self._told(step)
        beside = told.get("reference")
        wanted = {"state": wanted} if beside else wanted
        self._check_kind(step, _kinds(wanted), told.get("arrays"))
        target = _laid_out(wanted, mesh)
        part = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        found = self._read(step, ocp.args.Composite(state=part))["state"]
        self._check_sums(step, found, told.get("arrays"))
        return (found["state"] if beside else found)["params"]

    def close(self) -> None:
        """Waits for what is being written."""
        with self._one_at_a_time:
            try:
                self.wait()
            finally:
                self._manager.close()
                if self._has_failed and hosts.is_first():
                    self._remove_unfinished()


def _laid_out(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the shapes of a tree, cut by a mesh's rules."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        param_shardings(state, mesh),
    )


def _shown(kind: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if kind is None else f"{kind[1]}{list(kind[0])}"
