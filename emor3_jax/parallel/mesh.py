"""The device mesh and the one table of sharding rules.

Axes: `data` (replicas of the parameters), `fsdp` (parameters and optimizer state cut up, gathered
layer by layer), `tensor` (heads, hidden units and vocabulary cut up). Batches are cut over `data`
and `fsdp` together. `jax.jit` with these shardings is what pjit became.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emor3_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
CHECK = "python -m emor3_jax.compile --config=FILE --topology=NAME"
"""The command that compiles a config for devices that are not here."""


class MeshError(UserError):
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
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    wanted = {"data": data, "fsdp": fsdp, "tensor": tensor}
    sizes = axis_sizes(wanted, len(devices), slices, _describe(devices))
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(wanted: dict[str, int], count: int, slices: int, found: str) -> dict[str, int]:
    """Returns axis → size of a mesh, with "the rest" in the place of -1.

    Args:
      wanted: axis → size as in the config.
      count: number of devices.
      slices: that they are of.
      found: says what devices there are, as in "are 8 devices".

    Raises:
      MeshError: if the axes do not multiply to the number of devices, or `data` to that of slices.
    """
    said = ", ".join(f"mesh.{name}={size}" for name, size in wanted.items())
    free = [name for name, size in wanted.items() if size == -1]
    known = math.prod(size for size in wanted.values() if size != -1)
    unfit = any(size < 1 and size != -1 for size in wanted.values())
    if unfit or len(free) > 1 or count % known or (not free and known != count):
        raise MeshError(
            f"{said}: the axes must multiply to the number of devices, and there {found}; set one "
            f"axis to -1 for 'the rest', the others to divisors of {count}. A config for devices "
            f"that are not here is checked by: {CHECK}"
        )
    sizes = wanted | {name: count // known for name in free}
    if sizes["data"] % slices:
        raise MeshError(
            f"{said}: there are {slices} slices, and mesh.data={sizes['data']} must be a "
            f"multiple of that, since fsdp and tensor stay within a slice: let fsdp times tensor "
            f"divide the {count // slices} devices of one"
        )
    return sizes


def _describe(devices: Sequence[jax.Device]) -> str:
    """Returns what was found, as in "are 8 devices (tpu, TPU v4) in 2 processes"."""
    kinds = sorted({f"{device.platform}, {device.device_kind}" for device in devices})
    processes = len({device.process_index for device in devices})
    number = "is 1 device" if len(devices) == 1 else f"are {len(devices)} devices"
    return f"{number} ({'; '.join(kinds)}) in {processes} process{'es' * (processes > 1)}"


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the PartitionSpec of one parameter by the first rule that matches its path.

    A vector (a bias) that an axis does not divide stays whole, since it costs nothing; a matrix
    that would stay whole on every device is refused.

    Args:
      path: keys joined by "/".
      shape: the parameter's shape.
      mesh: for the axis sizes.

    Raises:
      MeshError: naming the parameter, the dimension and the sizes of the axis that divide it.
    """
    for pattern, axes in RULES:
        if re.search(pattern, path):
            # A scanned layer has the layer axis in front; rules speak of the last dimensions.
            spec = (None,) * (len(shape) - len(axes)) + tuple(axes)
            return P(
                *(
                    _cut_or_whole(path, shape, dimension, axis, mesh, vector=len(axes) == 1)
                    for dimension, axis in enumerate(spec)
                )
            )
    return P()


def _cut_or_whole(
    path: str, shape: tuple[int, ...], dimension: int, axis: str | None, mesh: Mesh, vector: bool
) -> str | None:
    """Returns the axis that cuts one dimension of a parameter, None if it stays whole."""
    size = shape[dimension]
    if axis is None or (vector and size % mesh.shape[axis]):
        return None
    if size % mesh.shape[axis]:
        raise MeshError(
            f"mesh.{axis}={mesh.shape[axis]}: does not divide dimension {dimension} of {path}, "
            f"whose shape is {shape}; {_listed(_divisors(size))} would"
        )
    return axis


RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens", ("tensor", "fsdp")),
    (r"lm_head", ("fsdp", "tensor")),
    # Of int8 kernels: one for each output, cut where the outputs are.
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel_scale", ("tensor",)),
    (r"(o_proj|down_proj)/kernel_scale", ("fsdp",)),
    (r"(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|mlp_0).*kernel", ("fsdp", "tensor")),
    (r"(o_proj|proj|down_proj|fc2|mlp_2).*kernel", ("tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|mlp_0).*bias", ("tensor",)),
    (r"patch_embed.*kernel", (None, "fsdp")),
    # An adapter is cut where its kernel is; the rank never.
    (r"(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|mlp_0)/lora_a", ("fsdp", None)),
    (r"(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|mlp_0)/lora_b", (None, "tensor")),
    (r"(o_proj|proj|down_proj|fc2|mlp_2)/lora_a", ("tensor", None)),
    (r"(o_proj|proj|down_proj|fc2|mlp_2)/lora_b", (None, "fsdp")),
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


def keep_layout(params: Any) -> Any:
    """Returns parameters of a jitted program, laid out as `param_shardings` does.

    Without a mesh (`jax.set_mesh`) there is nothing to do.

    Args:
      params: arrays of a jitted program.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    return jax.tree.map(jax.lax.with_sharding_constraint, params, _specs(params, mesh, False))


def path_of(keys: tuple) -> str:
    """Returns the path of a leaf as rules read it: keys joined by "/"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in keys)


def gather(x: jax.Array, path: str) -> jax.Array:
    """Returns one parameter of a jitted program, whole but for what is cut over `tensor`.

    For what a loop reads that is not over layers: else each turn would gather it anew.

    Args:
      x: the parameter.
      path: of the parameter, see `path_of`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _without_fsdp(spec_of(path, x.shape, mesh)))


def keep_rows(x: jax.Array) -> jax.Array:
    """Returns activations of a jitted program, their first axis cut as a batch, the others whole.

    The compiler spreads the layout of a cut weight to what is computed with it; left alone, it cuts
    activations by features over `fsdp`, and then every layer sums them over devices.

    Args:
      x: [B, …]; left as it is where B does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or row_axes(mesh, len(x)) is None:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def share_heads(x: jax.Array) -> jax.Array:
    """Repeats keys or values of a jitted program so that each part of `tensor` has a head.

    With fewer heads than parts the compiler would cut within heads, as the projection is cut, and
    the cache with them: decoding then gathered all of it for every token.

    Args:
      x: float[B, …, heads, head_dim]; left as it is where `tensor` divides the heads.

    Returns:
      float[B, …, heads * copies, head_dim], copies beside each other.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    copies = tensor // math.gcd(x.shape[-2], tensor)
    if copies == 1:
        return x
    spec = P(row_axes(mesh, len(x)), *[None] * (x.ndim - 3), "tensor")
    return jax.lax.with_sharding_constraint(jnp.repeat(x, copies, axis=-2), spec)


def by_rows(
    function: Callable[..., Any],
    weight: jax.Array,
    path: str,
    *rows: jax.Array,
    copies: bool = False,
) -> Any:
    """Returns what a function of a weight and of rows gives, each device working on its own rows.

    The weight is gathered over `fsdp` once and its gradient scattered once, whatever loops the
    function has; left to the compiler, each turn of a loop would sum the whole gradient over
    devices. What is cut over `tensor` stays so.

    Args:
      function: (weight, *rows, axis) → arrays with the first axis of `rows`, worked out row by row.
        `axis` names the mesh axis that has cut the weight, over which to sum; None if it is whole.
      weight: a parameter.
      path: of the parameter, see `path_of`.
      *rows: [B, …] each.
      copies: the weight is `data_copies` of a parameter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or row_axes(mesh, len(rows[0])) is None:
        weight = weight[0] if copies else weight
        return function(gather(weight, path), *rows, axis=None)
    axes = spec_of(path, weight.shape[1:] if copies else weight.shape, mesh)
    spec = P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in axes))
    cut = [dimension for dimension, axis in enumerate(spec) if axis == "fsdp"]
    varies = {"data"} if copies else set()
    varies |= {"fsdp"} if cut else set()

    def own(weight: jax.Array, *rows: jax.Array) -> Any:
        weight = weight[0] if copies else weight
        # Before the gather, so that its gradient is first scattered over `fsdp`: then only what a
        # device keeps of it is summed over `data`.
        if missing := tuple(axis for axis in BATCH[0] if axis not in varies):
            weight = jax.lax.pcast(weight, missing, to="varying")
        for dimension in cut:
            weight = jax.lax.all_gather(weight, "fsdp", axis=dimension, tiled=True)
        return function(weight, *rows, axis="tensor" if "tensor" in spec else None)

    given = P("data", *spec) if copies else spec
    return jax.shard_map(own, in_specs=(given, *[BATCH] * len(rows)), out_specs=BATCH)(
        weight, *rows
    )


def data_copies(x: jax.Array, path: str) -> jax.Array:
    """Returns one parameter of a jitted program for each part of `data` apart, [data, …].

    Each device holds what it held before. The gradient by these copies is that of each part's own
    rows, so it can be added up over several programs before it is summed over devices.

    Args:
      x: the parameter.
      path: of the parameter, see `path_of`.
    """
    return keep_copies(jax.numpy.broadcast_to(x, (num_data(), *x.shape)), path)


def keep_copies(x: jax.Array, path: str) -> jax.Array:
    """Returns `data_copies`, or their gradient, laid out as these."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, P("data", *spec_of(path, x.shape[1:], mesh)))


def num_data() -> int:
    """Returns the number of parts of `data` of the mesh that is set; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"]


ALIKE = -1
"""In place of an axis: an array that all parts hold whole."""


def on_each_part(
    function: Callable[..., Any], args: tuple, axes: tuple, result_axes: Any, parts: int
) -> Any:
    """Applies a function to the rows of each part of a batch apart, without collectives.

    Args:
      function: of a part's own rows.
      args: trees of arrays, their rows cut into equal parts.
      axes: which axis of each array is that of the rows, in trees that are prefixes of `args`;
        `ALIKE` for none.
      result_axes: the same of what the function returns.
      parts: data * fsdp; with 1 there is nothing to cut.
    """
    if parts == 1:
        return function(*args)

    def spec(axis: int) -> P:
        return P() if axis == ALIKE else P(*[None] * axis, BATCH[0])

    ins, outs = (jax.tree.map(spec, tree) for tree in (axes, result_axes))
    own = jax.shard_map(function, in_specs=ins, out_specs=outs, axis_names=set(BATCH[0]))
    return own(*args)


def _without_fsdp(spec: P) -> P:
    return P(*(None if axis == "fsdp" else axis for axis in spec))


def _specs(params: Any, mesh: Mesh, gathered: bool) -> Any:
    def spec(path: tuple, leaf: Any) -> P:
        found = spec_of(path_of(path), leaf.shape, mesh)
        return _without_fsdp(found) if gathered else found

    return jax.tree_util.tree_map_with_path(spec, params)


def head_axis(mesh: Mesh, heads: int) -> str | None:
    """Returns the mesh axis that cuts heads, "tensor" where it divides them."""
    return "tensor" if heads % mesh.shape["tensor"] == 0 else None


def host_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns the rows of a batch that this process reads, those of its devices: int64[n], rising.

    Processes whose devices hold the same rows, since `tensor` runs across them, read the same.

    Args:
      mesh: the mesh.
      rows: of the whole batch, a multiple of data * fsdp.
    """
    parts, count = _own_parts(mesh)
    size = rows // count
    return np.concatenate([np.arange(part * size, (part + 1) * size) for part in parts])


def _own_parts(mesh: Mesh) -> tuple[list[int], int]:
    """Returns which parts of a batch this process holds, and how many parts there are."""
    count = num_parts(mesh)
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((count,))
    return sorted({index[0].indices(count)[0] for index in held.values()}), count


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays, their first axis cut over `data` and `fsdp`, of each process's rows.

    Args:
      batch: pytree of host arrays that hold this process's `host_rows`; with one process, all rows.
      mesh: the mesh.
    """
    if jax.process_count() == 1:
        return shard_whole(batch, mesh)
    parts, count = _own_parts(mesh)

    def assemble(x: np.ndarray) -> jax.Array:
        size = len(x) // len(parts)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            at = parts.index((index[0].start or 0) // size) * size
            return x[at : at + size]

        shape = (size * count, *x.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), part)

    return jax.tree.map(assemble, batch)


def shard_whole(tree: Any, mesh: Mesh) -> Any:
    """Does the same with host arrays that every process holds whole.

    Args:
      tree: pytree of host arrays, alike on all processes.
      mesh: the mesh.
    """
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


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


def row_axes(mesh: Mesh | jax.sharding.AbstractMesh, rows: int) -> tuple[str, ...] | None:
    """Returns the axes that cut the rows of a batch; None where they do not divide them."""
    return None if rows % num_parts(mesh) else BATCH[0]


def num_parts(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of parts that a batch is cut into, data * fsdp; 1 without a mesh."""
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def take_own_rows(tree: Any, rows: jax.Array) -> Any:
    """Returns rows of arrays of a jitted program, each device taking from its own: none move.

    Args:
      tree: pytree of arrays, [B, …] each, cut as a batch; None leaves stay.
      rows: int32[b], b / parts for each part of the batch, counted within the part.
    """

    def own(tree: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), tree)

    tree = jax.tree.map(jnp.asarray, tree)
    if num_parts(jax.sharding.get_abstract_mesh()) == 1:
        return own(tree, rows)
    return jax.shard_map(own, in_specs=(BATCH, BATCH), out_specs=BATCH)(tree, rows)


def put_own_rows(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Writes what `take_own_rows` would take; the last axis of the values may be shorter.

    Args:
      x: [B, …], cut as a batch.
      rows: int32[b], see `take_own_rows`.
      values: [b, …].
    """

    def own(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
        at = x.at[rows, ..., : values.shape[-1]]
        return at.set(values, mode="promise_in_bounds", unique_indices=True)

    if num_parts(jax.sharding.get_abstract_mesh()) == 1:
        return own(x, rows, values)
    return jax.shard_map(own, in_specs=(BATCH, BATCH, BATCH), out_specs=BATCH)(x, rows, values)


def check_policy(mesh: Mesh, shapes: Any) -> None:
    """Raises MeshError, naming the dimension and the sizes that do, if a policy cannot be cut so.

    `tensor` cuts the heads, hidden units and vocabulary, `fsdp` the widths. Heads of keys and
    values may be fewer than `tensor`, if they divide it: then several devices share one.

    Args:
      mesh: the mesh.
      shapes: of the policy.
    """

    def shared(tensor: int) -> bool:
        return shapes.num_kv_heads % tensor == 0 or tensor % shapes.num_kv_heads == 0

    def fits(axis: str, size: int) -> bool:
        cut = shapes.cut_by_tensor if axis == "tensor" else shapes.cut_by_fsdp
        return all(n % size == 0 for n in cut.values()) and (axis == "fsdp" or shared(size))

    for axis, cut in (("tensor", shapes.cut_by_tensor), ("fsdp", shapes.cut_by_fsdp)):
        size = mesh.shape[axis]
        if fits(axis, size):
            continue
        unfit = [f"{name}={n}" for name, n in cut.items() if n % size]
        if axis == "tensor" and not shared(size):
            unfit.append(f"num_key_value_heads={shapes.num_kv_heads} (nor is divided by it)")
        good = [x for x in _divisors(math.gcd(*cut.values())) if fits(axis, x)]
        raise MeshError(
            f"mesh.{axis}={size}: does not divide the policy's {', '.join(unfit)}; "
            f"{_listed(good)} would"
        )


def _divisors(size: int) -> list[int]:
    return [x for x in range(1, size + 1) if size % x == 0]


def _listed(numbers: list[int]) -> str:
    """Returns numbers as in "1, 2 or 4"."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Raises MeshError, naming the config's field, if a batch does not divide over the mesh.

    Args:
      mesh: the mesh.
      field: of the config, which gives the size.
      size: number of prompts.
    """
    parts = num_parts(mesh)
    if size % parts:
        below, above = size // parts * parts, (size // parts + 1) * parts
        raise MeshError(
            f"config.{field}={size}: must be a multiple of mesh.data * mesh.fsdp = {parts}; "
            f"{f'{below} or {above}' if below else above} would do"
        )
