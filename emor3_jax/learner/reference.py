"""The reference policy, from which the KL is measured, and its cache of vision features.

| `reference.kind` | the reference |
|---|---|
| frozen | the policy that training started from |
| refresh | the policy itself as it was every `reference.every` steps |
| average | `decay * reference + (1 - decay) * policy` after every step |
| none | there is none, nor any KL: no parameters are kept, cast or loaded |

Deviations, numbered:
 1. The release has the frozen one alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.params import Params, cast_matrices
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.program import (
    Program,
    Programs,
    as_params,
    by_prompts,
    laid_out,
    mesh_of,
)
from emor3_jax.types import Batch, Images, take, take_rows


class Reference:
    """Parameters of the reference and how they follow the policy.

    Attributes:
      params: as they are kept; empty without a reference.
      follows: they change, and so belong into checkpoints.
    """

    def __init__(
        self,
        params: Params,
        kind: str = "frozen",
        *,
        every: int = 1,
        decay: float = 0.0,
        dtype: Any = jnp.float32,
        cache: "FeatureCache | None" = None,
    ) -> None:
        """Takes the parameters that training starts from.

        Args:
          params: of the policy; kept as they are, or cast, but never changed. {} if only
            `programs` are asked for.
          kind: see the module.
          every, decay: of the kinds "refresh" and "average".
          dtype: of the matrices.
          cache: of vision features, or None.
        """
        self._kind, self._every, self._decay = kind, every, decay
        self._dtype, self._cache = jnp.dtype(dtype), cache
        self.follows = kind in ("refresh", "average")
        self.params: Params = {}
        if kind != "none":
            same = self._dtype == jnp.float32 or not params
            self.params = params if same else cast_matrices(params, self._dtype)

    def features(self, batch: Batch, ids: Sequence[str]) -> np.ndarray | None:
        """Returns vision features of a batch, float[B, N, F] on the host.

        None if none are kept; the pass over the responses then computes them itself.

        Args:
          batch: B prompts on the devices.
          ids: of their rows.
        """
        return self._cache.of(self.params, batch, ids) if self._cache else None

    def programs(self, params: Any, batch: Batch) -> Programs:
        """Yields the programs of `features`; returns the abstract features, None if none are kept.

        Args:
          params: of the reference, abstract.
          batch: B prompts on the devices, abstract.
        """
        if self._cache is None:
            return None
        mesh, size = mesh_of(batch), self._cache.micro_prompts
        rows = np.zeros(size, np.int32)
        images = yield Program("take_images", take_rows, (batch.images, rows))
        how = {"policy": self._cache.policy}
        one = yield Program("encode", encode, (params, images), how)
        shape = (len(batch.last_token), *one.shape[1:])
        return by_prompts(mesh, jax.ShapeDtypeStruct(shape, one.dtype))

    def cast_programs(self, params: Any) -> Programs:
        """Yields the program that makes the reference; returns its abstract parameters."""
        if self._kind == "none":
            return {}
        if self._dtype == jnp.float32:
            return params
        args = params, self._dtype
        return (yield Program("cast_matrices", cast_matrices, args, {}, {"parameters": params}))

    def follow_programs(self, reference: Any, params: Any) -> Programs:
        """Yields the programs of `follow`; arguments are abstract."""
        if self._kind == "refresh":
            args = params, self._dtype
            yield Program("refresh", cast_matrices, args)
        elif self._kind == "average":
            args = reference, params, self._decay
            yield Program("average", average, args)

    def counters(self) -> dict[str, float]:
        """Returns the counts of the kept features; {} if none are kept."""
        return self._cache.counters() if self._cache else {}

    def follow(self, step: int, params: Params) -> None:
        """Lets the reference follow the policy after a step.

        Args:
          step: the one that has been done.
          params: of the policy, which may be donated to the next update.
        """
        if self._kind == "refresh" and step % self._every == 0:
            self.params = cast_matrices(params, self._dtype)
        elif self._kind == "average":
            self.params = average(self.params, params, self._decay)


@partial(jax.jit, donate_argnums=0)
@laid_out(as_params)
def average(reference: Params, params: Params, decay: float) -> Params:
    """Returns `decay * reference + (1 - decay) * params`; the reference is donated."""
    return jax.tree.map(lambda r, p: decay * r + (1.0 - decay) * p, reference, params)


class FeatureCache:
    """Vision features under a tower that does not change, kept on the host while they fit.

    An image is read again in each epoch, and a frozen tower gives it the same features each time.
    The features of a row are kept until the bound is reached; those of later rows are computed each
    time.

    Attributes:
      policy: the policy.
      micro_prompts: prompts whose images are encoded at once.
      bytes: kept now.
      hits, misses: rows found and rows computed so far.
    """

    def __init__(self, policy: Policy, limit: int, micro_prompts: int) -> None:
        """Keeps nothing yet.

        Args:
          policy: the policy.
          limit: bytes to keep at most.
          micro_prompts: prompts whose images are encoded at once.
        """
        self.policy, self.micro_prompts, self._limit = policy, micro_prompts, limit
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self.bytes = self.hits = self.misses = 0

    def of(self, params: Params, batch: Batch, ids: Sequence[str]) -> np.ndarray:
        """Returns the features of a batch's images, float[B, N, F] on the host.

        Args:
          params: of the reference.
          batch: B prompts on the devices.
          ids: of their rows; the same id is the same image.
        """
        # Padding changes the number of an image's slots, so it is part of the key.
        windows = batch.images.mask.shape[2]
        found = {i: self._kept.get((row, windows)) for i, row in enumerate(ids)}
        missing = [i for i, value in found.items() if value is None]
        self.hits, self.misses = self.hits + len(ids) - len(missing), self.misses + len(missing)
        for start in range(0, len(missing), self.micro_prompts):
            rows = missing[start : start + self.micro_prompts]
            # One shape, whatever is missing.
            filled = np.asarray((rows * self.micro_prompts)[: self.micro_prompts])
            values = np.asarray(encode(params, take(batch.images, filled), policy=self.policy))
            for i, value in zip(rows, values, strict=False):
                found[i] = value
                if (ids[i], windows) not in self._kept and self.bytes + value.nbytes <= self._limit:
                    self._kept[ids[i], windows] = np.copy(value)
                    self.bytes += value.nbytes
        return np.stack([found[i] for i in range(len(ids))])

    def counters(self) -> dict[str, float]:
        """Returns `reference/cache_{hits,misses,bytes}`: rows so far, and what is kept now."""
        names = ("hits", "misses", "bytes")
        return {f"reference/cache_{name}": float(getattr(self, name)) for name in names}


@partial(jax.jit, static_argnames="policy")
@laid_out(by_prompts)
def encode(params: Params, images: Images, *, policy: Policy) -> jax.Array:
    """Returns the features of each prompt's images, float[B, N, F]."""
    return policy.encode_images(params, images)
