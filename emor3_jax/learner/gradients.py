"""One update as jitted programs: zeros, the gradient of each micro-batch added to them, one step.

    grads = no_gradients(trained, policy=policy)
    for cut in micro-batches:
        grads, found = add_micro_batch(grads, params, cut, …)        # one program for each shape
    state, metrics = apply_update(state, grads, metrics, total_weight, spec=spec)

The gradient is donated from call to call, so there is one. That of the output matrix is kept for
each part of `data` apart (`HEAD_COPIES`) and summed over them once, in `apply_update`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emor3_jax.learner.logprobs import LogprobSpec, cut_batch, score_responses
from emor3_jax.learner.micro_batches import Shape
from emor3_jax.models.lora import Lora
from emor3_jax.models.policy import HEAD_COPIES, Policy
from emor3_jax.parallel.mesh import (
    data_copies,
    keep_copies,
    keep_layout,
    num_data,
    put_own_rows,
    shard_rows,
    take_own_rows,
)
from emor3_jax.parallel.program import as_params, by_prompts_and_whole, laid_out, whole
from emor3_jax.rl.advantages import all_equal
from emor3_jax.rl.losses import ImitationLoss, PolicyLoss
from emor3_jax.rl.selection import Selection
from emor3_jax.rl.surrogates import Tokens
from emor3_jax.rl.update import (
    Frozen,
    TrainState,
    add_gradients,
    apply_gradients,
    combine,
    partition,
)
from emor3_jax.types import Experience, Packing

Metrics = dict[str, jax.Array]


class UpdateSpec(NamedTuple):
    """Settings of one update; hashable, a static argument.

    Attributes:
      policy: with the rematerialisation of the update.
      optimizer: optax transformation; None in the program of a micro-batch, which reads none.
      loss: the loss to minimise.
      logprobs: settings of scoring.
      kl_coef: weight of the KL, at the start where it adapts.
      entropy_coef: weight of an entropy bonus, at the start where it adapts.
      frozen: true for the key paths of parameters that the optimizer leaves unchanged, which then
        cost no backward pass and are no part of `grad_norm`; None if there are none.
    """

    policy: Policy
    optimizer: optax.GradientTransformation | None
    loss: PolicyLoss | ImitationLoss
    logprobs: LogprobSpec
    kl_coef: float = 0.0
    frozen: Frozen | None = None
    entropy_coef: float = 0.0

    def without_optimizer(self) -> "UpdateSpec":
        """Returns the spec of a micro-batch: runs with other schedules share its program."""
        return self._replace(optimizer=None)


class Coefficients(NamedTuple):
    """Weights in the loss that change from step to step; None takes the fixed one.

    Attributes:
      kl: float32[], of the KL.
      entropy: float32[], of the entropy bonus.
    """

    kl: jax.Array | None = None
    entropy: jax.Array | None = None


class TokenWeights(NamedTuple):
    """What each token of a step counts in the loss of its update.

    Attributes:
      weights: float32[B, G, T].
      selected: bool[B, G, T], see `rl.selection`; None where none are.
    """

    weights: jax.Array
    selected: jax.Array | None = None


class Cut(NamedTuple):
    """One micro-batch as an update's program takes it; leaves [B, …] are of the whole step.

    Attributes:
      experience: all that the loss needs.
      weights: of the tokens in the loss.
      rows: int32[b], the prompts, counted within each device's part, see `MicroBatch`.
      packing: positions of their responses in fewer rows, or None.
    """

    experience: Experience
    weights: TokenWeights
    rows: jax.Array | np.ndarray
    packing: Packing | None


def _updated_layout(mesh: Mesh, result: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
    return as_params(mesh, result[0]), whole(mesh, result[1])


def _gradients_layout(mesh: Mesh, grads: dict) -> dict:
    rest, copies = _without_copies(grads)
    found = as_params(mesh, rest)
    if copies is not None:
        # The rules speak of the last dimensions.
        paths = {"lm_head/kernel": copies} if "lm_head" in rest else {"embed_tokens": copies}
        (laid,) = as_params(mesh, paths).values()
        sharding = NamedSharding(mesh, P("data", *laid.sharding.spec[1:]))
        found[HEAD_COPIES] = jax.ShapeDtypeStruct(copies.shape, copies.dtype, sharding=sharding)
    return found


def _added_layout(mesh: Mesh, result: tuple[dict, Metrics]) -> tuple[dict, Metrics]:
    return _gradients_layout(mesh, result[0]), whole(mesh, result[1])


@partial(jax.jit, static_argnames="loss")
@laid_out(by_prompts_and_whole)
def weigh(
    experience: Experience,
    rows: jax.Array,
    key: jax.Array | None = None,
    *,
    loss: PolicyLoss | ImitationLoss,
) -> tuple[TokenWeights, tuple[jax.Array, ...]]:
    """Returns what each token of a step counts in the loss of its update, and the totals.

    Args:
      experience: of the B prompts of a step, as `weighed` returns it.
      rows: int32[U, B / U], the prompts of each update, see `StepPlan.rows`.
      key: PRNG key; a random selection of tokens alone reads it.
      loss: that weighs the tokens of an update.

    Returns:
      The weights, and their sum for each update, float32[].
    """
    shape, selection = experience.samples.tokens.shape, _selection(loss)
    weights = shard_rows(0, jnp.zeros(shape, jnp.float32))
    selected = None if selection is None else shard_rows(0, jnp.zeros(shape, bool))
    totals = []
    for update, own in enumerate(rows):
        part = take_own_rows(experience, own)
        mask, ended = part.samples.mask, part.samples.ended
        equal = all_equal(part.rewards) if loss.mask_equal else None
        found = loss.weights(mask, ended, equal)
        weights = put_own_rows(weights, own, found)
        totals.append(jnp.sum(found))
        if selection is not None:
            old = part.samples.logprobs if part.old_logprobs is None else part.old_logprobs
            own_key = None if key is None else _selection_key(key, update)
            chosen = selection(found > 0, old, part.advantages, part.entropies, own_key)
            selected = put_own_rows(selected, own, chosen)
    return TokenWeights(weights, selected), tuple(totals)


def weighed(experience: Experience, loss: PolicyLoss | ImitationLoss) -> Experience:
    """Returns the part of an experience that `weigh` reads."""
    selection = _selection(loss)
    kept = {"samples": experience.samples._replace(logprobs=None)}
    if loss.mask_equal:
        kept["rewards"] = experience.rewards
    if selection is not None:
        kept |= {name: getattr(experience, name) for name in ("advantages", "old_logprobs")}
        if experience.old_logprobs is None:
            kept["samples"] = experience.samples
        if selection.kind == "top_entropy":
            kept["entropies"] = experience.entropies
    nothing = Experience(None, None, None, None, None)
    return nothing._replace(**kept)


def _selection_key(key: jax.Array, update: int) -> jax.Array:
    # Apart from what the rollout of the step draws from its key.
    return jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), update)


def _selection(loss: PolicyLoss | ImitationLoss) -> Selection | None:
    return loss.selection if isinstance(loss, PolicyLoss) else None


@partial(jax.jit, static_argnames="policy")
@laid_out(_gradients_layout)
def no_gradients(params: dict, *, policy: Policy | None) -> dict:
    """Returns zeros to which micro-batches add their gradients.

    Args:
      params: that are trained, see `rl.update.partition`.
      policy: theirs; None if they are adapters, without an output matrix.

    Returns:
      Zeros in the layout of the parameters, and where `data` has several parts `HEAD_COPIES`: the
      gradient by the output matrix is then summed over `data` once an update.
    """
    return _keep_gradients(jax.tree.map(jnp.zeros_like, _with_copies(params, policy)), policy)


def _with_copies(params: dict, policy: Policy | None) -> dict:
    """Returns parameters, and where `data` has several parts copies of the output matrix."""
    if policy is None or num_data() == 1 or policy.head(params)[0] is None:
        return params
    return {**params, HEAD_COPIES: data_copies(*policy.head(params))}


def _without_copies(tree: dict) -> tuple[dict, Any]:
    """Returns a tree without `HEAD_COPIES`, and these, None if there are none."""
    rest = {name: x for name, x in tree.items() if name != HEAD_COPIES}
    return rest, tree.get(HEAD_COPIES)


def _keep_gradients(grads: dict, policy: Policy | None) -> dict:
    """Returns gradients laid out as parameters, and as copies of the output matrix."""
    rest, copies = _without_copies(grads)
    rest = keep_layout(rest)
    if copies is None:
        return rest
    return {**rest, HEAD_COPIES: keep_copies(copies, policy.head(rest)[1])}


def _joined_gradients(grads: dict, policy: Policy) -> dict:
    """Returns gradients by parameters alone, those by copies of the output matrix summed."""
    rest, copies = _without_copies(grads)
    if copies is None:
        return rest
    own, path = policy.head(rest)
    total = own + jnp.sum(copies, axis=0)
    at, leaf = path.rsplit("/", 1)
    inner = rest = jax.tree.map(lambda x: x, rest)
    for key in at.split("/"):
        inner = inner[key]
    inner[leaf] = total
    return keep_layout(rest)


@jax.jit
@laid_out(whole)
def add_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Returns the sums of the metrics of micro-batches."""
    return jax.tree.map(jnp.add, first, second)


@partial(jax.jit, static_argnames=("spec", "shape"), donate_argnames="total")
@laid_out(_added_layout)
def add_micro_batch(
    total: dict,
    params: dict,
    cut: Cut,
    suppressed: jax.Array,
    coefs: Coefficients,
    lora: Lora | None,
    *,
    spec: UpdateSpec,
    shape: Shape,
) -> tuple[dict, Metrics]:
    """Adds the gradient of one micro-batch to that of those before it.

    Args:
      total: gradient so far, float32 as `no_gradients` returned it; donated.
      params: that are trained.
      cut: the micro-batch.
      suppressed: bool[V], ids that the sampler could not draw.
      coefs: weights in the loss that adapt; the others are those of `spec`.
      lora: base of the adapters, where the trained parameters are these.
      spec: settings.
      shape: padded sizes of the micro-batch.

    Returns:
      The gradient with the micro-batch's added, and its share of the update's metrics.
    """
    loss, whole_step = spec.loss, cut.experience
    cut_off = whole_step._replace(
        batch=cut_batch(whole_step.batch, shape), samples=whole_step.samples.cut(shape.length)
    )
    old, ref, weights = jax.tree.map(
        lambda x: x[..., : shape.length],
        (whole_step.old_logprobs, whole_step.ref_logprobs, cut.weights),
    )
    cut_off = cut_off._replace(old_logprobs=old, ref_logprobs=ref)
    kl_coef = spec.kl_coef if coefs.kl is None else coefs.kl
    bonus = spec.entropy_coef if coefs.entropy is None else coefs.entropy
    micro = take_own_rows((cut_off, weights), cut.rows)
    trained, held = partition(params, spec.frozen)

    def loss_fn(trained: dict, micro: tuple) -> tuple[jax.Array, Metrics]:
        part, (weight, selected) = micro
        trained, copies = _without_copies(trained)
        params = combine(trained, held)
        params = params if copies is None else {**params, HEAD_COPIES: copies}
        params = params if lora is None else lora.overlay(params)
        score = score_responses(
            spec.policy,
            params,
            part.batch,
            part.samples,
            spec.logprobs._replace(entropy=loss.entropy),
            suppressed,
            cut.packing,
        )
        sampler = part.samples.logprobs
        tokens = Tokens(
            logprobs=score.logprobs,
            old=sampler if part.old_logprobs is None else part.old_logprobs,
            sampler=sampler,
            ref=part.ref_logprobs,
            advantages=part.advantages,
            weights=weight,
            selected=selected,
        )
        value, metrics = loss(tokens, kl_coef)
        if loss.entropy:
            entropy = jnp.sum(weight * jnp.where(weight > 0, score.entropy, 0.0))
            metrics["entropy"] = entropy
            value = value - bonus * entropy
        return value, metrics

    policy = spec.policy if lora is None else None
    total, metrics = add_gradients(loss_fn, total, _with_copies(trained, policy), micro)
    return _keep_gradients(total, policy), metrics


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
@laid_out(_updated_layout)
def apply_update(
    state: TrainState,
    grads: dict,
    metrics: Metrics,
    total_weight: jax.Array,
    *,
    spec: UpdateSpec,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step by the summed gradient of its micro-batches.

    Args:
      state: parameters and optimizer state; donated.
      grads: as `add_micro_batch` returned them.
      metrics: of the loss, summed over micro-batches.
      total_weight: float32[], of all tokens of the update.
      spec: settings.
    """
    metrics = spec.loss.summarise(metrics, total_weight)
    grads = _joined_gradients(grads, spec.policy)
    state, applied = apply_gradients(state, grads, spec.optimizer)
    return state, metrics | applied | {"empty": (total_weight == 0).astype(jnp.float32)}
