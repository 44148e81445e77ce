"""The reference policy, from which the KL is measured, and the pictures' features that it keeps.

| `reference.kind` | the reference |
|---|---|
| frozen | what training started from |
| refresh | the policy itself as it was every `reference.every` steps |
| average | `decay * reference + (1 - decay) * policy` after every step |
| none | there is none, nor any KL |

Deviations, numbered:
 1. The release has the frozen one alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emor3_jax.data.batch import Batch, take_rows
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.parallel.mesh import shard_rows

Params = dict[str, Any]


class Reference:
    """Parameters of the reference and how they follow the policy.

    Attributes:
      params: as they are kept; empty without a reference.
      follows: whether they change, and so belong into checkpoints.
    """

    def __init__(self, config: ConfigDict, params: Params) -> None:
        """Takes what training starts from.

        Args:
          config: of the run.
          params: of the policy; kept as they are, or cast, but never changed.
        """
        c = config.reference
        self._every, self._decay = c.every, c.decay
        self._kind = c.kind
        # Rounded as each use of it would be; but an average would not move any more, and adapters
        # share their base.
        whole = c.kind == "average" or config.policy.lora_rank
        own = "float32" if whole else config.policy.dtype
        self._dtype = jnp.dtype(c.dtype or own)
        self.follows = c.kind in ("refresh", "average")
        self.params: Params = {}
        if c.kind != "none":
            same = self._dtype == jnp.float32
            self.params = params if same else model.cast_matrices(params, self._dtype)
        self._cache = FeatureCache(c.image_cache) if c.image_cache else None
        self._micro, self._type = config.policy_update.micro_prompts, jnp.dtype(config.policy.dtype)

    def see(self, batch: Batch, ids: Sequence[str], shapes: Config) -> np.ndarray | None:
        """Returns the features of a batch's pictures, float[B, S, D] on the host.

        None if none are kept; the pass over the responses then looks at the pictures itself.

        Args:
          batch: B prompts with a picture each, on the devices.
          ids: of their rows.
          shapes: of the policy.
        """
        if self._cache is None:
            return None
        return self._cache.of(self.params, batch, ids, self._micro, shapes, self._type)

    def counters(self) -> dict[str, float]:
        """Returns the counts of the kept features; {} if none are kept."""
        return self._cache.counters() if self._cache else {}

    def follow(self, step: int, params: Params) -> None:
        """Lets the reference follow the policy after a step.

        Args:
          step: the one that has been done.
          params: of the policy, which the next update may give up.
        """
        if self._kind == "refresh" and step % self._every == 0:
            self.params = model.cast_matrices(params, self._dtype)
        elif self._kind == "average":
            self.params = _average(self.params, params, self._decay)


@partial(jax.jit, donate_argnums=0)
def _average(reference: Params, params: Params, decay: float) -> Params:
    return jax.tree.map(lambda r, p: decay * r + (1.0 - decay) * p, reference, params)


class FeatureCache:
    """Features of pictures under a tower that does not change, kept on the host while they fit.

    A picture is looked at again in each epoch, and by a frozen tower always seen alike. The
    features of a row are kept until the bound is reached; those of later rows are computed each
    time.

    Attributes:
      bytes: what is kept.
      hits, misses: rows found and rows computed so far.
    """

    def __init__(self, limit: int) -> None:
        """Keeps nothing yet.

        Args:
          limit: bytes to keep at most.
        """
        self._limit = limit
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self.bytes = self.hits = self.misses = 0

    def of(
        self,
        params: Params,
        batch: Batch,
        ids: Sequence[str],
        micro: int,
        config: Config,
        dtype: Any,
    ) -> np.ndarray:
        """Returns the features of a batch's pictures, float[B, S, D] on the host.

        Args:
          params: of the reference.
          batch: B prompts with a picture each, on the devices.
          ids: of their rows; the same id is the same picture.
          micro: prompts that are encoded at once.
          config: of the policy.
          dtype: compute type.
        """
        # Padding changes how many slots a picture has, so it is part of the key.
        windows = batch.images.mask.shape[1]
        found = {i: self._kept.get((row, windows)) for i, row in enumerate(ids)}
        missing = [i for i, value in found.items() if value is None]
        self.hits, self.misses = self.hits + len(ids) - len(missing), self.misses + len(missing)
        for start in range(0, len(missing), micro):
            rows = missing[start : start + micro]
            # One shape, whatever is missing.
            filled = np.asarray((rows * micro)[:micro])
            part = take_rows(batch, filled, config.vision.merge_unit)
            values = np.asarray(encode(params, part, config=config, dtype=dtype))
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


@partial(jax.jit, static_argnames=("config", "dtype"))
def encode(params: Params, batch: Batch, *, config: Config, dtype: Any) -> jax.Array:
    """Returns the features of each prompt's pictures, float[B, S, D]."""
    found = model.encode_images(config, params, batch.images, dtype=dtype)
    return shard_rows(0, found.reshape(len(batch.last_token), -1, found.shape[-1]))
