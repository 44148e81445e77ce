"""The pieces that the decoder and the vision tower share.

In bfloat16 each layer rounds its result once, with int8 weights twice: products are summed, biases
added and activations computed in float32.
"""

from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from emor3_jax.models.quantisation import SCALE
from emor3_jax.parallel.mesh import keep_layout

Dtype = jnp.dtype | type


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies float[N, D] by float[D, F], in the type of `x`, summed in float32.

    The gradient by the kernel comes in the kernel's own type: float32 of master weights, not the
    rounded one that differentiating through a cast would give.

    Returns:
      float32[N, F].
    """
    kernel = kernel.astype(x.dtype)
    return jnp.matmul(two_rows(x), kernel, preferred_element_type=jnp.float32)[: len(x)]


def two_rows(x: jax.Array) -> jax.Array:
    """Repeats a single row: on CPU, XLA has a kernel for matrices of bfloat16, none for a vector.

    A decoded token of a single response is ten times as fast for it, and its weights are not
    converted to float32 in memory.

    Args:
      x: float[N, D].

    Returns:
      float[max(N, 2), D].
    """
    return jnp.concatenate([x, x]) if len(x) == 1 else x


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    by_x = jnp.matmul(cotangent, kernel.astype(x.dtype).T)
    by_kernel = jnp.matmul(x.T, cotangent, preferred_element_type=kernel.dtype)
    return by_x, by_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def matmul_transposed(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiplies float[N, D] by the transpose of float[F, D]; else as `matmul`.

    Returns:
      float32[N, F].
    """
    table = table.astype(x.dtype)
    equation = "nd,fd->nf"
    return jnp.einsum(equation, two_rows(x), table, preferred_element_type=jnp.float32)[: len(x)]


def _transposed_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple]:
    return matmul_transposed(x, table), (x, table)


def _transposed_backward(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, table = saved
    cotangent = cotangent.astype(x.dtype)
    by_x = jnp.matmul(cotangent, table.astype(x.dtype))
    by_table = jnp.matmul(cotangent.T, x, preferred_element_type=table.dtype)
    return by_x, by_table


matmul_transposed.defvjp(_transposed_forward, _transposed_backward)


Remat = Literal["none", "layers", "activations"]


class Compute(NamedTuple):
    """Settings of a policy's arithmetic; hashable.

    Attributes:
      dtype: type of the layers' arithmetic.
      attention: back end, see `attention.attend`.
      decode_attention: back end of decoded tokens, one of `attention.DECODE_BACKENDS`.
      remat: recomputed in the backward pass, see `rematerialised`.
    """

    dtype: Dtype = jnp.float32
    attention: str = "xla"
    decode_attention: str = "xla"
    remat: Remat = "none"


DEFAULT = Compute()
"""float32 on any platform."""


class GroupRow(NamedTuple):
    """Layout of a prompt and its continuations in one row: P tokens, then G times S.

    Several prompts may share a row, of P / prompts tokens each; segment i of the continuations then
    belongs to prompt i // responses.

    Attributes:
      prompt: P.
      count: G.
      prompts: number of prompts.
      responses: to each of them, if there are several.
    """

    prompt: int
    count: int
    prompts: int = 1
    responses: int = 0

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns [B, 1, P, …] and [B, G, S, …] of [B, 1, P + G * S, …]."""
        rest = x[:, 0, self.prompt :]
        return x[:, :, : self.prompt], rest.reshape(len(x), self.count, -1, *x.shape[3:])

    def join(self, prompt: jax.Array, rest: jax.Array) -> jax.Array:
        """Returns what `split` splits."""
        return jnp.concatenate([prompt, rest.reshape(len(rest), 1, -1, *rest.shape[3:])], axis=2)


_PRODUCT = "product"


def rematerialised(layer: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Returns a layer class whose backward pass recomputes what was not kept.

    Args:
      layer: the class, to be scanned.
      remat: "none" keeps everything; "layers" only the input of each layer, for about a third more
        arithmetic; "activations" the results of the matrix products as well and recomputes what
        lies between: norms, activation functions and attention.
    """
    if remat == "none":
        return layer
    policy = None
    if remat == "activations":
        policy = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
    return nn.remat(layer, prevent_cse=False, policy=policy)


class Dense(nn.Module):
    """A dense layer as one matrix product: all leading axes joined.

    The gradient of a product over several leading axes is compiled with strided copies on
    CPU; joined, the backward pass of a layer takes half the time.

    Attributes:
      features: width of the result.
      use_bias: add a bias.
      dtype: compute type, and that of the result.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        out = matmul(rows, kernel)
        if self.has_variable("params", SCALE):
            # The kernel is int8 (`models.quantisation`). Rounded before it is scaled, so that sums
            # over devices have the compute type: in float32 they would move twice the bytes.
            out = out.astype(self.dtype) * self.get_variable("params", SCALE)
        if self.has_variable("params", "lora_a"):
            # Adapters that lie beside the kernel (`models.lora`).
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            out += matmul(matmul(rows, a).astype(self.dtype), b)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        out = checkpoint_name(out.astype(self.dtype), _PRODUCT)
        return out.reshape(*x.shape[:-1], self.features)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, tokens: jax.Array, dtype: Dtype) -> jax.Array:
    """Returns the rows of a table, rounded to a compute type.

    The gradient, where all tokens of a batch that are alike add up, is summed in float32: in
    bfloat16 a sum stops growing once it is 256 to 512 times what is added. It is laid out as the
    table, so that nothing else must be gathered to be added to it.

    Args:
      table: float[V, D].
      tokens: int32[...].
      dtype: of the result.
    """
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _look_up_forward(table: jax.Array, tokens: jax.Array, dtype: Dtype) -> tuple[jax.Array, tuple]:
    return look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(_: Dtype, saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    zeros = jnp.zeros(table.shape, jnp.float32)
    by_table = zeros.at[tokens].add(cotangent.astype(jnp.float32))
    by_table = keep_layout({"embed_tokens": by_table})["embed_tokens"]
    return by_table.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class TokenEmbedding(nn.Module):
    """A table of vectors, one for each token.

    Attributes:
      tokens: V, size of the vocabulary.
      features: D, width of a vector.
      dtype: of the result.
    """

    tokens: int
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32[...] to float[..., features]."""
        shape = (self.tokens, self.features)
        table = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        return look_up(table, tokens, self.dtype)


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
        return (scale * x).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, computed in float32.

    Attributes:
      eps: added to the variance.
      dtype: of the result.
    """

    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of float[..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (scale * x + bias).astype(self.dtype)


class Mlp(nn.Module):
    """The gated feed-forward layer; its activation is computed in float32.

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

        gate = nn.silu(dense(self.width, "gate_proj")(x).astype(jnp.float32))
        hidden = gate * dense(self.width, "up_proj")(x)
        return dense(x.shape[-1], "down_proj")(hidden.astype(self.dtype))
