"""Low-rank adapters (LoRA, arXiv 2106.09685): `x W + scale (x A) B`, of which A and B are trained.

Adapters are a tree of their own with the paths of the modules that they adapt. Laid over the base
parameters they are two more leaves beside a kernel, which the layers read (`layers.Dense`): neither
a merged kernel nor a gradient of one exists in an update. For decoding, where each token would pay
for two more products, and for export they are merged into the kernels. The un-adapted base is the
reference, so that no second copy of the weights is kept. Base and merged kernels of a run are in
the compute type, in which they are used; an export merges in float32.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from emor3_jax.errors import UserError
from emor3_jax.models.layers import Dtype
from emor3_jax.parallel.program import as_params, lay_out

Params = dict[str, Any]

TOWER = "visual/"
"""In front of the name of a module of the vision tower; the decoder's have none."""


class LoraError(UserError):
    """A module that is to be adapted does not exist."""


class Lora(NamedTuple):
    """The base that adapters belong to; a pytree.

    Attributes:
      base: parameters of the policy, which stay as they are.
      scale: float32[], alpha over rank.
    """

    base: Params
    scale: jax.Array

    def overlay(self, adapters: Params) -> Params:
        """Returns the parameters that the layers read with the adapters beside their kernels."""
        return _overlay(self.base, adapters, self.scale)

    def merge(self, adapters: Params, dtype: Dtype = jnp.float32) -> Params:
        """Returns the parameters with the adapters added into their kernels.

        Every other leaf is the base's own, not a copy.

        Args:
          adapters: of some modules.
          dtype: of the sums; in a policy's compute type they take half the memory, and each use of
            them would round them so.
        """
        return self.replace(
            {
                path: add_adapter(*args, path=path, dtype=jnp.dtype(dtype))
                for path, args in self.merges(adapters).items()
            }
        )

    def merges(self, adapters: Params) -> dict[str, tuple]:
        """Returns path → arrays of `add_adapter`, for each kernel that is adapted."""
        return {
            "/".join(path): (
                _at(self.base, path)["kernel"],
                _at(adapters, path)["lora_a"],
                _at(adapters, path)["lora_b"],
                self.scale,
            )
            for path in _kernels(self.base)
            if _has(adapters, path)
        }

    def replace(self, kernels: dict[str, Any]) -> Params:
        """Returns the base with other kernels, path → kernel; every other leaf is the base's."""
        return _replace(self.base, {tuple(path.split("/")): x for path, x in kernels.items()})


def _replace(
    params: Params, kernels: dict[tuple[str, ...], Any], path: tuple[str, ...] = ()
) -> Params:
    if path in kernels:
        return {**params, "kernel": kernels[path]}
    return {
        name: _replace(value, kernels, (*path, name)) if isinstance(value, dict) else value
        for name, value in params.items()
    }


def modules(params: Params) -> dict[str, tuple[str, ...]]:
    """Returns name → path of one of its kernels, for every module that can be adapted.

    Names are those of `policy.lora_modules`: `q_proj` of the decoder, `visual/qkv` of the tower.
    """
    return {_name(path): path for path in _kernels(params)}


def init_adapters(params: Params, names: Sequence[str], rank: int, key: jax.Array) -> Params:
    """Returns fresh adapters, which change nothing: A is random, B is 0.

    Args:
      params: of the policy, or their shapes.
      names: of the modules to adapt, see `modules`.
      rank: r, at least 1.
      key: PRNG key.

    Returns:
      A tree of `lora_a`: float32[..., D, r] and `lora_b`: float32[..., r, F] for each kernel
      float32[..., D, F].

    Raises:
      LoraError: if a module is unknown, or has no kernel of at least that rank.
    """
    known = modules(params)
    if unknown := [name for name in names if name not in known]:
        raise LoraError(f"{unknown[0]!r} is no module; choose among {', '.join(sorted(known))}")
    adapters: Params = {}
    for path in _kernels(params):
        if _name(path) not in names:
            continue
        *lead, wide, out = _at(params, path)["kernel"].shape
        if rank > min(wide, out):
            raise LoraError(f"{_name(path)!r} is of {wide} x {out}, under the rank {rank}")
        key, own = jax.random.split(key)
        node = adapters
        for part in path:
            node = node.setdefault(part, {})
        node["lora_a"] = jax.random.normal(own, (*lead, wide, rank)) / math.sqrt(wide)
        node["lora_b"] = jnp.zeros((*lead, rank, out))
    return adapters


def _overlay(base: Params, adapters: Params, scale: jax.Array) -> Params:
    if "lora_a" in adapters:
        return {**base, "lora_a": adapters["lora_a"], "lora_b": scale * adapters["lora_b"]}
    return {**base, **{name: _overlay(base[name], x, scale) for name, x in adapters.items()}}


def merged_layout(path: str, mesh: Mesh, kernel: Any) -> Any:
    """Returns an abstract kernel with its adapter, laid out as the kernel; see `add_adapter`."""
    return as_params(mesh, {f"{path}/kernel": kernel})[f"{path}/kernel"]


@partial(jax.jit, static_argnames=("path", "dtype"))
def add_adapter(
    kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, path: str, dtype: Dtype
) -> jax.Array:
    """Returns a kernel with its adapter added.

    Args:
      kernel: of the base.
      a, b: the adapter.
      scale: float32[], alpha over rank.
      path: of the module, its keys joined by "/".
      dtype: of the result.
    """
    merged = (kernel + scale * jnp.matmul(a, b, precision="highest")).astype(dtype)
    return lay_out(partial(merged_layout, path), merged)


def _kernels(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the paths of modules with a kernel in the decoder's layers, the tower and mergers."""
    for name, value in params.items():
        if name in ("lm_head", "patch_embed") or not isinstance(value, dict):
            continue
        if "kernel" in value:
            yield (*path, name)
        else:
            yield from _kernels(value, (*path, name))


def _name(path: tuple[str, ...]) -> str:
    return (TOWER if path[0] == "visual" else "") + path[-1]


def _has(params: Params, path: tuple[str, ...]) -> bool:
    for part in path:
        if part not in params:
            return False
        params = params[part]
    return True


def _at(params: Params, path: tuple[str, ...]) -> Params:
    for part in path:
        params = params[part]
    return params
