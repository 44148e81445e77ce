"""The learner: experience in, updates out.

    experience, info = learner.score(params, prompts, experience)     # reference, KL, advantages
    for part in learner.split(experience):
        state, metrics = learner.update(state, part)                  # metrics go to `updates`
    learner.after_step(state, step, info, updates)

Supervised fine-tuning takes the same updates with another loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from emor3_jax.data.batch import Prompts
from emor3_jax.learner import packing
from emor3_jax.learner.logprobs import LogprobSpec, response_logprobs, score_responses
from emor3_jax.learner.reference import Reference
from emor3_jax.models.lora import Lora, add_adapter, merged_layout
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_whole
from emor3_jax.parallel.program import (
    Program,
    Programs,
    as_params,
    by_prompts,
    by_prompts_and_whole,
    first_rows,
    laid_out,
    mesh_of,
    whole,
)
from emor3_jax.rl import advantages
from emor3_jax.rl.advantages import RewardTerms
from emor3_jax.rl.kl import penalty
from emor3_jax.rl.losses import ImitationLoss, PolicyLoss, Tokens
from emor3_jax.rl.update import (
    Frozen,
    TrainState,
    accumulate,
    apply_gradients,
    combine,
    partition,
)
from emor3_jax.types import (
    Clock,
    Experience,
    NoClock,
    Samples,
    bucket,
    split,
    stack_parts,
    take_part,
)

Metrics = dict[str, jax.Array]


class UpdateSpec(NamedTuple):
    """Settings of one update; hashable, a static argument.

    Attributes:
      policy: with the rematerialisation of the update.
      optimizer: optax transformation.
      loss: the loss to minimise.
      logprobs: settings of scoring.
      micro_batches: their number, must divide the prompts of an update.
      kl_coef: weight of the KL, at the start where it adapts.
      frozen: true for the key paths of parameters that the optimizer leaves unchanged, which then
        cost no backward pass and are no part of `grad_norm`; None if there are none.
    """

    policy: Policy
    optimizer: optax.GradientTransformation
    loss: PolicyLoss | ImitationLoss
    logprobs: LogprobSpec
    micro_batches: int
    kl_coef: float = 0.0
    frozen: Frozen | None = None


@dataclass(frozen=True)
class StepSpec:
    """Settings of a step around its updates.

    Attributes:
      num_updates: number of updates, must divide the prompts of a step.
      response_lengths: rising padded lengths of scoring and update.
      pack: short responses of a group share a row, where the attention can.
      advantage: name of the estimator.
      std: standard deviation that it divides by, "population" or "sample".
      weights: name of a score → its weight in the reward.
      use_reference: score the responses under the reference.
      recompute: compute the log-probabilities of the policy that sampled once more.
      kl_penalty: estimate of the KL that is taken off the reward; "" for none.
      adapt_kl: from coefficient and KL of a step to the coefficient of the next, or None.
    """

    num_updates: int
    response_lengths: tuple[int, ...]
    pack: bool
    advantage: str = "grpo"
    std: str = "population"
    weights: tuple[tuple[str, float], ...] = ()
    use_reference: bool = False
    recompute: bool = False
    kl_penalty: str = ""
    adapt_kl: Callable[[jax.Array, jax.Array], jax.Array] | None = None


class Learner:
    """Scores experience and updates the policy.

    Attributes:
      spec: settings of an update.
      step: settings of a step.
      suppressed: bool[V], ids that the sampler could not draw.
      reference: the policy that the KL is measured from.
      lora: base of the adapters, or None where the weights themselves are trained.
      kl_coef: float32[], weight of the KL; changes with the steps if `step.adapt_kl`.
    """

    def __init__(
        self,
        spec: UpdateSpec,
        step: StepSpec,
        mesh: Mesh,
        suppressed: np.ndarray,
        *,
        reference: Reference,
        lora: Lora | None = None,
    ) -> None:
        """Joins the settings with the parameters that stay.

        Args:
          spec, step, suppressed, reference, lora: see the attributes.
          mesh: of the devices.
        """
        self.spec, self.step, self.suppressed = spec, step, suppressed
        self.reference, self.lora, self._mesh = reference, lora, mesh
        self.kl_coef = np.float32(spec.kl_coef) if step.adapt_kl else spec.kl_coef

    def init(self, trained: dict) -> TrainState:
        """Returns the state before the first update.

        Args:
          trained: parameters or adapters that updates change; donated to the first one.
        """
        return TrainState.create(trained, self.spec.optimizer)

    def params(self, state: TrainState) -> dict:
        """Returns the parameters of the policy as it is now."""
        return self.lora.merge(state.params) if self.lora else state.params

    def score(
        self,
        params: dict,
        prompts: Prompts,
        experience: Experience,
        clock: Clock | None = None,
    ) -> tuple[Experience, Metrics]:
        """Adds log-probabilities, the KL in the reward, and advantages to the experience of a step.

        Args:
          params: of the policy that sampled.
          prompts: of the experience, for their ids.
          experience: of the rollout.
          clock: told of the phases "reference" and "old".

        Returns:
          The experience with trimmed responses, and metrics: `policy/kl` where it is in the reward,
          `policy/kl_coef` where it adapts, `policy/sampler_gap` where the log-probabilities are
          recomputed.
        """
        clock, step, info = clock or NoClock(), self.step, {}
        experience = self.pack(experience)
        batch, samples = experience.batch, experience.samples
        logprobs = partial(
            response_logprobs,
            batch=batch,
            samples=samples,
            packing=experience.packing,
            suppressed=self.suppressed,
            policy=self.spec.policy,
            spec=self.spec.logprobs,
            count=step.num_updates * self.spec.micro_batches,
        )
        ref_logprobs = old_logprobs = None
        if step.use_reference:
            features = self.reference.features(batch, prompts.ids)
            features = shard_whole(features, self._mesh)
            ref_logprobs = logprobs(self.reference.params, features=features)
            clock.mark("reference", ref_logprobs)
        if step.recompute:
            old_logprobs = logprobs(params)
            info["policy/sampler_gap"] = mean_gap(old_logprobs, samples)
            clock.mark("old", old_logprobs)
        rewards = experience.rewards
        if ref_logprobs is not None and step.kl_penalty:
            old = samples if old_logprobs is None else samples._replace(logprobs=old_logprobs)
            rewards, info["policy/kl"] = penalise(
                rewards, old, ref_logprobs, self.kl_coef, name=step.kl_penalty
            )
            ref_logprobs = None
        terms = RewardTerms(
            rewards, experience.scores.named(), dict(step.weights), experience.greedy
        )
        if step.adapt_kl:
            info["policy/kl_coef"] = self.kl_coef
        return experience._replace(
            rewards=rewards,
            ref_logprobs=ref_logprobs,
            old_logprobs=old_logprobs,
            advantages=estimate_jitted(terms, name=step.advantage, std=step.std),
        ), info

    def pack(self, experience: Experience) -> Experience:
        """Trims the padding of responses, and plans which of them share a row."""
        lengths = jax.device_get(hosts.everywhere(experience.samples.lengths))
        sizes = (*self.step.response_lengths, experience.samples.tokens.shape[-1])
        samples = trim(experience.samples, size=min(bucket(int(lengths.max()), sizes), sizes[-1]))
        plan = None
        # Kernels know nothing of responses within a row.
        if self.step.pack and self.spec.policy.compute.attention == "xla":
            plan = packing.plan(lengths, samples.tokens.shape[-1], self.step.response_lengths)
        return experience._replace(samples=samples, packing=shard_whole(plan, self._mesh))

    def split(self, experience: Experience) -> list[Experience]:
        """Returns the prompts of each update, with all that the loss needs."""
        return split(_read(experience), self.step.num_updates)

    def update(self, state: TrainState, part: Experience) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step.

        Args:
          state: parameters and optimizer state; donated.
          part: some prompts of a step, with all that the loss needs.

        Returns:
          The new state and metrics: those of the loss, `grad_norm`, `skipped`, and `entropy` if
          asked for. All but the loss are means over the tokens that count.
        """
        kl_coef = self.kl_coef if self.step.adapt_kl else None
        return update(state, part, self.suppressed, kl_coef, self.lora, spec=self.spec)

    def programs(
        self,
        state: TrainState,
        experience: Experience,
        reference: Any,
        rewards: RewardTerms,
        params: Any,
    ) -> Programs:
        """Yields every jitted program of `score`, `update` and `after_step` at the largest shapes.

        Args:
          state: before the updates, abstract.
          experience: of the rollout, abstract.
          reference: parameters of the reference, abstract.
          rewards: what advantages are estimated from, abstract.
          params: of the policy that sampled, abstract; in memory until the first update.

        Returns:
          The abstract state after the updates.
        """
        step, spec, mesh = self.step, self.spec, mesh_of(experience.samples)
        how = {"size": experience.samples.tokens.shape[-1]}
        samples = yield Program("trim", trim, (experience.samples,), how)
        experience = experience._replace(samples=samples)
        sampled = {"parameters": params}
        how = {
            "policy": spec.policy,
            "spec": spec.logprobs,
            "count": step.num_updates * spec.micro_batches,
        }
        scored = experience.batch, samples, None, self.suppressed
        ref_logprobs = old_logprobs = None
        if step.use_reference:
            features = yield from self.reference.programs(reference, experience.batch)
            args = (reference, *scored, features)
            ref_logprobs = yield Program("reference", response_logprobs, args, how, sampled)
        if step.recompute:
            args = params, *scored
            old_logprobs = yield Program("old", response_logprobs, args, how, sampled)
            yield Program("mean_gap", mean_gap, (old_logprobs, samples))
        kl_coef = jax.ShapeDtypeStruct((), jnp.float32)
        kl_coef = whole(mesh, kl_coef) if step.adapt_kl else spec.kl_coef
        if ref_logprobs is not None and step.kl_penalty:
            old = samples if old_logprobs is None else samples._replace(logprobs=old_logprobs)
            args = rewards.rewards, old, ref_logprobs, kl_coef
            penalised, _ = yield Program("kl", penalise, args, {"name": step.kl_penalty})
            rewards, ref_logprobs = rewards._replace(rewards=penalised), None
        how = {"name": step.advantage, "std": step.std}
        advantage = yield Program("advantage", estimate_jitted, (rewards,), how)
        part = _read(
            experience._replace(
                old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, advantages=advantage
            )
        )
        held: Any = part
        if step.num_updates > 1:
            args, how = (part, np.int32(0)), {"count": step.num_updates}
            rows = len(part.samples.lengths) // step.num_updates
            # The last one is cut while the others are there.
            others = [first_rows(part, rows) for _ in range(step.num_updates - 1)]
            part = yield Program(
                "split",
                take_part,
                args,
                how,
                {"data": others, **sampled},
                calls=step.num_updates,
            )
            held = [part, *others]
        args = state, part, self.suppressed, kl_coef if step.adapt_kl else None, self.lora
        state, metrics = yield Program(
            "update",
            update,
            args,
            {"spec": spec},
            {"data": held},
            calls=step.num_updates,
        )
        if step.adapt_kl:
            yield Program("adapt_kl", step.adapt_kl, (kl_coef, metrics["loss"]))
        yield from self.reference.follow_programs(reference, state.params)
        return state

    def merge_programs(self, state: TrainState) -> Programs:
        """Yields the programs of `params`; returns what that returns, abstract."""
        if self.lora is None:
            return state.params
        merged = {}
        for name, args in self.lora.merges(state.params).items():
            layout = partial(merged_layout, name)
            # Beside those that were merged before.
            alive, how = {"parameters": list(merged.values())}, {"path": name}
            merged[name] = yield Program(
                f"merge.{name}", add_adapter, args, how, alive, layout=layout
            )
        return self.lora.replace(merged)

    def after_step(self, state: TrainState, step: int, info: Metrics, updates: list) -> None:
        """Adapts the KL coefficient, and lets the reference follow the policy.

        Args:
          state: after the updates.
          step: number of steps that are done.
          info: as `score` returned it.
          updates: metrics of each update.
        """
        if self.step.adapt_kl:
            kl = info.get("policy/kl")
            if kl is None:
                kl = sum(metrics["kl"] for metrics in updates) / len(updates)
            self.kl_coef = self.step.adapt_kl(self.kl_coef, kl)
        self.reference.follow(step, state.params)

    def checkpoint(self, state: TrainState) -> Any:
        """Returns the arrays that a checkpoint holds: the state, and a reference that follows."""
        if not self.reference.follows:
            return state
        return {"state": state, "reference": self.reference.params}

    def progress(self) -> dict[str, Any]:
        """Returns the JSON that a checkpoint holds beside the arrays."""
        found: dict[str, Any] = {"kl_coef": float(self.kl_coef)} if self.step.adapt_kl else {}
        return found | ({"reference": True} if self.reference.follows else {})

    def restore(self, arrays: Any, progress: dict[str, Any]) -> TrainState:
        """Goes on from what `checkpoint` and `progress` returned; returns the state."""
        if self.step.adapt_kl:
            self.kl_coef = np.float32(progress.get("kl_coef", self.kl_coef))
        if not self.reference.follows:
            return arrays
        self.reference.params = arrays["reference"]
        return arrays["state"]


def _read(experience: Experience) -> Experience:
    """Returns the part of an experience that an update reads."""
    return experience._replace(replies=None, scores=None, rewards=None, greedy=None)


def _updated_layout(mesh: Mesh, result: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
    return as_params(mesh, result[0]), whole(mesh, result[1])


@jax.jit
def mean_gap(logprobs: jax.Array, samples: Samples) -> jax.Array:
    """Returns the mean distance of log-probabilities, float32[B, G, T], from the sampler's."""
    gap = jnp.where(samples.mask, jnp.abs(logprobs - samples.logprobs), 0.0)
    return jnp.sum(gap) / jnp.sum(samples.lengths)


@partial(jax.jit, static_argnames="size")
@laid_out(by_prompts)
def trim(samples: Samples, *, size: int) -> Samples:
    """Cuts padding off the end of responses.

    Args:
      samples: of length T.
      size: new length, at least that of the longest response and at most T.
    """
    return samples._replace(
        tokens=samples.tokens[..., :size], logprobs=samples.logprobs[..., :size]
    )


@partial(jax.jit, static_argnames="name")
@laid_out(by_prompts_and_whole)
def penalise(
    rewards: jax.Array,
    samples: Samples,
    ref_logprobs: jax.Array,
    kl_coef: jax.Array | float,
    *,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    """Takes the KL off the rewards; returns them float32[B, G], and the mean KL of a token.

    Args:
      rewards: float32[B, G].
      samples: responses with their log-probabilities under the policy that sampled.
      ref_logprobs: float32[B, G, T], under the reference.
      kl_coef: weight of the KL.
      name: of the estimate, see `rl.kl`.
    """
    each, mean = penalty(name, samples.logprobs, ref_logprobs, samples.mask)
    return rewards - kl_coef * each, mean


@partial(jax.jit, static_argnames=("name", "std"))
@laid_out(by_prompts)
def estimate_jitted(terms: RewardTerms, *, name: str, std: str) -> jax.Array:
    """Returns `rl.advantages.estimate`, jitted."""
    return advantages.estimate(name, terms, std=std)


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
@laid_out(_updated_layout)
def update(
    state: TrainState,
    part: Experience,
    suppressed: jax.Array,
    kl_coef: jax.Array | None,
    lora: Lora | None,
    *,
    spec: UpdateSpec,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on a loss that is summed over micro-batches.

    Args:
      state: parameters and optimizer state; donated.
      part: batch, samples, packing, and what `spec.loss` needs.
      suppressed: bool[V], ids that the sampler could not draw.
      kl_coef: float32[], weight of the KL where it adapts; None takes `spec.kl_coef`.
      lora: base of the adapters, where the state's parameters are these.
      spec: settings.
    """
    loss = spec.loss
    weights = loss.weights(part.samples.mask, part.samples.ended)
    trained, held = partition(state.params, spec.frozen)

    def loss_fn(trained: dict, micro: tuple) -> tuple[jax.Array, Metrics]:
        part, weight = micro
        params = combine(trained, held)
        params = params if lora is None else lora.overlay(params)
        score = score_responses(
            spec.policy,
            params,
            part.batch,
            part.samples,
            spec.logprobs,
            suppressed,
            part.packing,
            entropy=loss.entropy,
        )
        sampler = part.samples.logprobs
        tokens = Tokens(
            logprobs=score.logprobs,
            old=sampler if part.old_logprobs is None else part.old_logprobs,
            sampler=sampler,
            ref=part.ref_logprobs,
            advantages=part.advantages,
            weights=weight,
        )
        value, metrics = loss(tokens, spec.kl_coef if kl_coef is None else kl_coef)
        if loss.entropy:
            metrics["entropy"] = jnp.sum(weight * jnp.where(weight > 0, score.entropy, 0.0))
        return value, metrics

    micro = stack_parts((part, weights), spec.micro_batches)
    grads, metrics = accumulate(loss_fn, trained, micro)
    metrics = loss.summarise(metrics, weights.sum())
    state, applied = apply_gradients(state, grads, spec.optimizer)
    return state, metrics | applied
