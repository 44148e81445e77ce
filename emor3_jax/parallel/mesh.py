"""The device mesh and the one table of sharding rules.

Axes: `data` (replicas of the parameters), `fsdp` (parameters and optimizer state cut up, gathered
layer by layer), `tensor` (heads, hidden units and vocabulary cut up). Batches are cut over `data`
and `fsdp` together. `jax.jit` with these shardings is what pjit became.
"""

import re
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


class MeshError(ValueError):
    """The mesh of the config does not fit the devices or the arrays."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh over all devices; one axis may be -1, "the rest".

    Raises:
      MeshError: if the axes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.device_count()
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    unfit = any(size < 1 and size != -1 for size in sizes.values())
    if unfit or len(free) > 1 or devices % known or (not free and known != devices):
        wanted = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise MeshError(
            f"{wanted}: the axes must multiply to the number of devices, and this machine has "
            f"{devices} ({jax.devices()[0].device_kind}); set one axis to -1 for 'the rest'"
        )
    if free:
        sizes[free[0]] = devices // known
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the PartitionSpec of one parameter by the first rule that matches its path.

    An axis that does not divide the dimension is left out there: a tiny policy on a large mesh is
    replicated rather than refused.

    Args:
      path: keys joined by "/".
      shape: the parameter's shape.
      mesh: for the axis sizes.
    """
    for pattern, axes in RULES:
        if re.search(pattern, path):
            # A scanned layer has the layer axis in front; rules speak of the last dimensions.
            spec = (None,) * (len(shape) - len(axes)) + tuple(axes)
            return P(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(spec, shape, strict=True)
                )
            )
    return P()


RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens", ("tensor", "fsdp")),
    (r"lm_head", ("fsdp", "tensor")),
    (r"(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|mlp_0).*kernel", ("fsdp", "tensor")),
    (r"(o_proj|proj|down_proj|fc2|mlp_2).*kernel", ("tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|mlp_0).*bias", ("tensor",)),
    (r"patch_embed.*kernel", (None, "fsdp")),
)
"""Parameter path → mesh axes of its last dimensions. First match wins; the rest is replicated."""


def param_shardings(params: Any, mesh: Mesh, *, gathered: bool = False) -> Any:
    """Returns a NamedSharding for each leaf of a tree of parameters or of optimizer state.

    Optimizer state holds the parameters' paths within its own, so it is cut like its parameters.

    Args:
      params: arrays or anything with a shape.
      mesh: the mesh.
      gathered: lay out for decoding: nothing is cut over `fsdp`, so that no token gathers weights.
    """
    specs = _specs(params, mesh, gathered)
    return jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, P))


def keep_layout(params: Any, *, gathered: bool = False) -> Any:
    """Returns parameters of a jitted program, laid out as `param_shardings` does.

    Without a mesh (`jax.set_mesh`) there is nothing to do.

    Args:
      params: arrays of a jitted program.
      gathered: see `param_shardings`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    specs = _specs(params, mesh, gathered)
    return jax.tree.map(jax.lax.with_sharding_constraint, params, specs)


def _specs(params: Any, mesh: Mesh, gathered: bool) -> Any:
    def spec(path: tuple, leaf: Any) -> P:
        keys = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        found = spec_of(keys, leaf.shape, mesh)
        return P(*(None if axis == "fsdp" else axis for axis in found)) if gathered else found

    return jax.tree_util.tree_map_with_path(spec, params)


def head_axis(mesh: Mesh, heads: int) -> str | None:
    """Returns the mesh axis that cuts heads, "tensor" where it divides them."""
    return "tensor" if heads % mesh.shape["tensor"] == 0 else None


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a pytree of host arrays on the devices, their first axis cut over `data` and `fsdp`."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, BATCH)), batch)


def shard_rows(axis: int, x: jax.Array) -> jax.Array:
    """Returns an array of a jitted program with one axis, the prompts', cut as `shard_batch` does.

    What a program makes from nothing would otherwise be laid out as the compiler likes. Without a
    mesh (`jax.set_mesh`) there is nothing to do.

    Args:
      axis: which axis is cut over `data` and `fsdp`; the others are left to the compiler.
      x: the array.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = [P.UNCONSTRAINED] * x.ndim
    spec[axis] = BATCH[0]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Raises MeshError, naming the config's field, if a batch does not divide over the mesh.

    Args:
      mesh: the mesh.
      field: of the config, which gives the size.
      size: number of prompts.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        below, above = size // parts * parts, (size // parts + 1) * parts
        raise MeshError(
            f"config.{field}={size}: must be a multiple of mesh.data * mesh.fsdp = {parts}; "
            f"{f'{below} or {above}' if below else above} would do"
        )
