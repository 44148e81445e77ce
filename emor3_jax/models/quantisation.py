"""int8 weights for decoding: symmetric, one scale for each output of a matrix, nothing calibrated.

`W[i, j]` is kept as `round(W[i, j] / s[j])`, in [-127, 127], with `s[j] = max_i |W[i, j]| / 127`.
The scale does not depend on the inputs that are summed over, so a layer multiplies by the integers
and then by the scale (`layers.Dense`): `x W ≈ (x Q) s`. Integers of 8 bits are exact in bfloat16.
Activations are not quantised.

Quantised are the kernels of the decoder's layers, of which each decoded token reads all. Embedding
and head stay as they are, since errors of logits are errors of log-probabilities; so does the
vision tower, which runs once a prompt and is bounded by arithmetic.
"""

from typing import Any

import jax
import jax.numpy as jnp

MOST = 127
"""Largest integer; -128 is not used, so that the range is symmetric."""

SCALE = "kernel_scale"
"""Name of the leaf beside a quantised kernel."""


def quantise(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a matrix as int8, and the scale of each output.

    What is not finite makes the scale of its output so, and with it the results.

    Args:
      kernel: float[..., D, F].

    Returns:
      int8[..., D, F] in [-127, 127], and float32[..., F], 0 for an output whose weights are all 0.
      Their product is within half a scale of each weight.
    """
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / MOST
    # A scale of 0 may also be that of weights too small for one.
    steps = kernel / jnp.where(scale > 0, scale, 1.0)[..., None, :]
    return jnp.clip(jnp.round(steps), -MOST, MOST).astype(jnp.int8), scale


def quantise_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters with int8 kernels in the layers of the decoder, a `SCALE` beside each.

    Args:
      params: of a policy, the layers stacked; adapters merged.
    """
    layers = _quantised(params["model"]["layers"])
    return {**params, "model": {**params["model"], "layers": layers}}


def _quantised(params: dict[str, Any]) -> dict[str, Any]:
    if "kernel" in params:
        kernel, scale = quantise(params["kernel"])
        return {**params, "kernel": kernel, SCALE: scale}
    return {k: _quantised(v) if isinstance(v, dict) else v for k, v in params.items()}
