"""The device mesh and the one table of sharding rules.

Axes: `data` (replicas of the parameters), `fsdp` (parameters and optimizer state cut up, gathered
layer by layer), `tensor` (heads, hidden units and vocabulary cut up). Batches are cut over `data`
and `fsdp` together. `jax.jit` with these shardings is what pjit became.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
CHECK = "python -m emor3_jax.compile --config=FILE --topology=NAME"
"""The command that compiles a config for devices that are not here."""


class MeshError(ValueError):
    """The mesh of the config does not fit the devices, the policy or a batch."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh over devices; one axis may be -1, "the rest".

    Where the devices are several TPU slices, `data` runs over the slow network between them, `fsdp`
    and `tensor` stay within a slice.

    Args:
      data, fsdp, tensor: sizes of the axes.
      devices: of all processes, or of a topology that is not here; by default `jax.devices()`.

    Raises:
      MeshError: if the axes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    wanted = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    unfit = any(size < 1 and size != -1 for size in sizes.values())
    if unfit or len(free) > 1 or len(devices) % known or (not free and known != len(devices)):
        raise MeshError(
            f"{wanted}: the axes must multiply to the number of devices, and there "
            f"{_describe(devices)}; set one axis to -1 for 'the rest', the others to divisors of "
            f"{len(devices)}. A config for devices that are not here is checked by: {CHECK}"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise MeshError(
            f"{wanted}: there are {slices} slices, and mesh.data={sizes['data']} must be a "
            f"multiple of that, since fsdp and tensor stay within a slice: let fsdp times tensor "
            f"divide the {len(devices) // slices} devices of one"
        )
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _describe(devices: Sequence[jax.Device]) -> str:
    """Returns what was found, as in "are 8 devices (tpu, TPU v4) in 2 processes"."""
    kinds = sorted({f"{device.platform}, {device.device_kind}" for device in devices})
    processes = len({device.process_index for device in devices})
    number = "is 1 device" if len(devices) == 1 else f"are {len(devices)} devices"
    return f"{number} ({'; '.join(kinds)}) in {processes} process{'es' * (processes > 1)}"


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


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for each leaf of a tree of parameters or of optimizer state.

    Optimizer state holds the parameters' paths within its own, so it is cut like its parameters.

    Args:
      params: arrays or anything with a shape.
      mesh: the mesh.
    """

    def sharding(path, leaf):
        keys = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return NamedSharding(mesh, spec_of(keys, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, params)


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
