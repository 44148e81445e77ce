"""Parameters as a plain nested dict of arrays: casts, weight sync, layouts of layers, counts.

Layers are stacked along the first axis. Leaves named `kernel` or `embedding` are matrices.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.layers import Dtype
from emor3_jax.models.quantisation import quantise_layers
from emor3_jax.parallel.mesh import gather, keep_layout, path_of
from emor3_jax.parallel.program import as_gathered_params, as_params, laid_out

Params = dict[str, Any]


def cast_for_decoding(params: Params, dtype: Dtype, *, int8: bool = False) -> Params:
    """Returns the parameters as decoding reads them, once a step so that no token pays for it.

    Matrices have the compute type, as `cast_matrices` says, and are whole on every device but for
    the axes that `tensor` shards (`parallel.mesh.RULES`).

    Args:
      params: float32 master parameters.
      dtype: compute type; if the matrices already have it on one device, the parameters are
        returned unchanged.
      int8: quantise the layers of the decoder (`models.quantisation`).
    """
    if not int8 and is_ready_to_decode(params, dtype, jax.sharding.get_abstract_mesh().size):
        return params
    return weight_sync(params, jnp.dtype(dtype), int8=int8)


def is_ready_to_decode(params: Params, dtype: Dtype, devices: int) -> bool:
    """Recognises parameters that decoding reads as they are, without a copy.

    Args:
      params: of a policy, or their shapes.
      dtype: compute type.
      devices: of the mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kinds = {leaf.dtype for path, leaf in leaves if is_matrix(path[-1].key)}
    return devices <= 1 and kinds == {jnp.dtype(dtype)}


@partial(jax.jit, static_argnames="dtype")
@laid_out(as_params)
def cast_matrices(params: Params, dtype: Dtype) -> Params:
    """Returns the parameters with matrices in the compute type, sharded as before.

    Each use would round them so. Norms and biases, which are added in float32, stay as they are.
    The result shares no memory with the argument.

    Args:
      params: float32 master parameters.
      dtype: compute type.
    """
    return jax.tree.map(jnp.copy, keep_layout(_cast(params, dtype)))


@partial(jax.jit, static_argnames=("dtype", "int8"))
@laid_out(as_gathered_params)
def weight_sync(params: Params, dtype: Dtype, *, int8: bool = False) -> Params:
    """Casts and reshards for decoding: `cast_for_decoding`, always."""
    before: jax.Array | None = None

    def reshard(path: tuple, leaf: jax.Array) -> jax.Array:
        nonlocal before
        # One after the other: gathered all at once, they would take the memory of a second copy.
        if before is not None:
            leaf, _ = jax.lax.optimization_barrier((leaf, before))
        before = gather(leaf, path_of(path))
        return before

    # Quantised where they lie: what is gathered then has a byte for each weight.
    params = quantise_layers(params) if int8 else params
    return jax.tree_util.tree_map_with_path(reshard, keep_layout(_cast(params, dtype)))


def is_matrix(name: str) -> bool:
    """Recognises a parameter that each use rounds to the compute type, by the last of its keys."""
    return name in ("kernel", "embedding")


def _cast(params: Params, dtype: Dtype) -> Params:
    def cast(path: tuple, x: jax.Array) -> jax.Array:
        quantised = x.dtype == jnp.int8
        return x.astype(dtype) if is_matrix(path[-1].key) and not quantised else x

    return jax.tree_util.tree_map_with_path(cast, params)


@jax.jit
@laid_out(as_gathered_params)
def unroll(params: Params) -> Params:
    """Returns the parameters with the decoder's layers apart, for `Policy.decode`.

    Args:
      params: with the layers stacked, as everything else reads them.
    """
    decoder = dict(params["model"])
    layers = decoder.pop("layers")
    count = jax.tree.leaves(layers)[0].shape[0]
    apart = {f"layers_{i}": jax.tree.map(lambda x: x[i], layers) for i in range(count)}  # noqa: B023
    return params | {"model": decoder | apart}


def leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    """Yields the path and the value of each parameter."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(key.key for key in path), leaf


def parameter_overview(params: Params) -> str:
    """Returns a table of all parameters: path, shape, size; the total last."""
    rows = [
        (path, "x".join(map(str, leaf.shape)), f"{int(np.prod(leaf.shape)):,}")
        for path, leaf in leaves(params)
    ]
    rows.append(("total", "", f"{count_params(params):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{path:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}"
        for path, shape, count in rows
    )


def count_params(params: Params) -> int:
    """Returns the number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
