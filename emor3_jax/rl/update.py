"""Optimizer step: gradient accumulation with exact global means, AdamW, and a non-finite guard.

A step whose gradient norm is not finite leaves the state unchanged and is counted
(`policy/skipped`), as in the release.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any
Frozen = Callable[[tuple[Any, ...]], bool]
"""Whether a parameter stays as it is, by its key path."""


class TrainState(NamedTuple):
    """Training state: float32 master parameters, optimizer state, number of updates."""

    params: Params
    opt_state: optax.OptState
    updates: jax.Array

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns the state before the first update."""
        return cls(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    mu_dtype: str | None = None,
    frozen: Frozen | None = None,
    rate_of: Callable[[tuple[Any, ...]], float] | None = None,
) -> optax.GradientTransformation:
    """Returns AdamW with global gradient-norm clipping.

    Args:
      learning_rate: a number or an optax schedule of the update count.
      weight_decay: decoupled decay, on every trained parameter as in the release.
      max_grad_norm: the gradient is scaled down to at most this norm.
      b1, b2: Adam's decay rates.
      mu_dtype: in which the first moment is kept; None is that of the parameters. The second one
        always is: with a `b2` of 0.999, a step changes it by less than bfloat16 can tell.
      frozen: true for the parameters to leave unchanged, of which no moments are kept; None trains
        all.
      rate_of: learning-rate factor of parameters, by their key path; None is 1 for all.
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, mu_dtype=mu_dtype, weight_decay=weight_decay),
        *([] if rate_of is None else [_scale_by_path(rate_of)]),
    )
    if frozen is None:
        return adamw

    def label(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if frozen(path) else "trained", params
        )

    return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, label)


def _scale_by_path(rate_of: Callable[[tuple[Any, ...]], float]) -> optax.GradientTransformation:
    def scale(updates: Params, params: Params | None = None) -> Params:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, x: rate_of(path) * x, updates)

    return optax.stateless(scale)


def partition(params: Params, frozen: Frozen | None) -> tuple[Params, Params]:
    """Returns the trained parameters and the frozen ones, each with None for the others.

    What is differentiated with respect to the first alone has no backward pass for the second.

    Args:
      params: of the policy, or adapters.
      frozen: as of `make_optimizer`.
    """

    def keep(wanted: bool) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if (frozen is not None and frozen(path)) == wanted else None, params
        )

    return keep(False), keep(True)


def combine(trained: Params, held: Params) -> Params:
    """Returns what `partition` parted."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, held, is_leaf=_is_none)


def _is_none(x: Any) -> bool:
    return x is None


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one optimizer step, unless the gradient norm is not finite.

    Args:
      state: before the step.
      grads: of the trained parameters; None for those that the optimizer leaves unchanged.
      optimizer: of `make_optimizer`.

    Returns:
      The state, and float32[] `grad_norm` (before clipping) and `skipped` (1 if left unchanged).
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    # Compiled, zeros that are added to nothing cost nothing.
    grads = jax.tree.map(
        lambda g, p: jnp.zeros_like(p) if g is None else g, grads, state.params, is_leaf=_is_none
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return state, {"grad_norm": grad_norm, "skipped": 1.0 - finite.astype(jnp.float32)}


def add_gradients(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]],
    total: Params,
    params: Params,
    micro_batch: Any,
) -> tuple[Params, dict[str, jax.Array]]:
    """Returns the gradients of a micro-batch, added to those of the ones before, and its metrics.

    `loss_fn` must return sums that are already weighted over the whole update batch
    (`losses.token_weights`), so that the total does not depend on the micro-batch size.

    Args:
      loss_fn: (params, micro_batch) -> (loss, metrics).
      total: of the micro-batches before, as `params`; 0 at first.
      params: the parameters to differentiate with respect to.
      micro_batch: what the loss reads.
    """
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, micro_batch)
    return jax.tree.map(jnp.add, total, grads), metrics
