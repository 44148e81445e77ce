"""The pieces that the decoder and the vision tower share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | type


class Dense(nn.Dense):
    """`nn.Dense` as one matrix product: all leading axes joined.

    The gradient of a product over several leading axes is compiled with strided copies on
    CPU; joined, the backward pass of a layer takes half the time.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., features]."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32.

    Attributes:
      eps: added to the mean square.
      dtype: of the result.
    """

    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of float[..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return scale.astype(self.dtype) * x.astype(self.dtype)


class Mlp(nn.Module):
    """The gated feed-forward layer.

    Attributes:
      width: of the hidden units.
      use_bias: the vision tower has biases, the decoder has none.
      dtype: compute type.
    """

    width: int
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., D]."""

        def dense(features: int, name: str) -> Dense:
            return Dense(features, use_bias=self.use_bias, dtype=self.dtype, name=name)

        gate = nn.silu(dense(self.width, "gate_proj")(x))
        return dense(x.shape[-1], "down_proj")(gate * dense(self.width, "up_proj")(x))
