"""The learner: experience in, updates out.

    experience, plan, info = learner.plan(experience)                 # micro-batches by length
    experience, info = learner.score(params, prompts, experience, plan)
    for part in learner.split(experience, plan):
        state, metrics = learner.update(state, part)                  # metrics go to `updates`
    learner.after_step(state, step, info, updates)

`score` adds reference, KL and advantages. Supervised fine-tuning takes the same updates with
another loss, without it.

The programs of an update are in `learner.gradients`, the plan of its micro-batches in
`learner.micro_batches`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from emor3_jax.data.batch import Prompts
from emor3_jax.learner.gradients import (
    Coefficients,
    Cut,
    Metrics,
    TokenWeights,
    UpdateSpec,
    add_metrics,
    add_micro_batch,
    apply_update,
    no_gradients,
    weigh,
    weighed,
)
from emor3_jax.learner.logprobs import (
    LogprobSpec,
    Scored,
    no_logprobs,
    planned_logprobs,
    response_logprobs,
)
from emor3_jax.learner.micro_batches import (
    Buckets,
    MicroBatch,
    Packed,
    PlanSpec,
    Shape,
    StepPlan,
    largest_together,
    plan_step,
)
from emor3_jax.learner.reference import Reference
from emor3_jax.learner.scoring import (
    compare_groups,
    estimate_jitted,
    measure,
    mismatch_jitted,
    penalise,
    terms_of,
    trim,
)
from emor3_jax.models.lora import Lora, add_adapter, merged_layout
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import (
    num_parts,
    shard_whole,
)
from emor3_jax.parallel.program import (
    Program,
    Programs,
    mesh_of,
    whole,
)
from emor3_jax.rl.advantages import RewardTerms
from emor3_jax.rl.entropy import EntropyBonus
from emor3_jax.rl.update import (
    TrainState,
    partition,
)
from emor3_jax.types import (
    Clock,
    Experience,
    NoClock,
)


@dataclass(frozen=True)
class StepSpec:
    """Settings of a step around its updates.

    Attributes:
      num_updates: number of updates, must divide the prompts of a step.
      micro_prompts: prompts of a micro-batch, must divide those of an update.
      buckets: padded sizes of scoring and update.
      pack: short responses of a group share a row; with splash attention, those of several groups.
      balance: choose the prompts of each update so that all have like many tokens.
      advantage: name of the estimator.
      std: standard deviation that it divides by, "population" or "sample".
      weights: name of a score → its weight in the reward.
      use_reference: score the responses under the reference.
      recompute: compute the log-probabilities of the policy that sampled once more.
      kl_penalty: estimate of the KL that is taken off the reward; "" for none.
      adapt_kl: from coefficient, KL of a step, and number of updates in which a token counted, to
        the coefficient of the next step; or None.
      adapt_entropy: the same for the entropy bonus, or None.
    """

    num_updates: int
    micro_prompts: int
    buckets: Buckets
    pack: bool
    balance: bool = False
    advantage: str = "grpo"
    std: str = "population"
    weights: tuple[tuple[str, float], ...] = ()
    use_reference: bool = False
    recompute: bool = False
    kl_penalty: str = ""
    adapt_kl: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    adapt_entropy: Callable[[EntropyBonus, jax.Array, jax.Array], EntropyBonus] | None = None


def plan_spec(policy: Policy, step: StepSpec, parts: int) -> PlanSpec:
    """Returns the settings by which the micro-batches of a step are planned.

    Args:
      policy: with the attention of the platform.
      step: settings of the step.
      parts: that the mesh cuts a batch into.
    """
    shapes, packed = policy.shapes, Packed.APART
    if step.pack:
        splash = policy.compute.attention.startswith("splash")
        packed = Packed.TOGETHER if splash else Packed.GROUPS
    tower = shapes.vision
    # Both keep the input of each layer, and little else.
    window = tower.window_patches * tower.depth * tower.hidden_size
    tokens = window / (shapes.num_layers * shapes.hidden_size)
    return PlanSpec(step.num_updates, step.micro_prompts, parts, packed, step.balance, tokens)


class UpdatePart(NamedTuple):
    """One update of a step.

    Attributes:
      experience: of the whole step, with all that the loss needs.
      weights: of the tokens in the loss of the update that they belong to.
      total_weight: float32[], of the update's tokens.
      micro_batches: the prompts of this update.
    """

    experience: Experience
    weights: TokenWeights
    total_weight: jax.Array
    micro_batches: tuple[MicroBatch, ...]

    def cut(self, micro: MicroBatch) -> Cut:
        """Returns one of the micro-batches."""
        return Cut(self.experience, self.weights, micro.rows, micro.packing)


class Learner:
    """Scores experience and updates the policy.

    Attributes:
      spec: settings of an update.
      step: settings of a step.
      suppressed: bool[V], ids that the sampler could not draw.
      reference: the policy that the KL is measured from.
      lora: base of the adapters, or None where the weights themselves are trained.
      kl_coef: float32[], weight of the KL; changes with the steps if `step.adapt_kl`.
      bonus: weight of the entropy bonus; changes with the steps if `step.adapt_entropy`.
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
        coef = np.float32(spec.entropy_coef)
        self.bonus = EntropyBonus(coef, coef)

    def init(self, trained: dict) -> TrainState:
        """Returns the state before the first update.

        Args:
          trained: parameters or adapters that updates change; donated to the first one.
        """
        return TrainState.create(trained, self.spec.optimizer)

    def params(self, state: TrainState) -> dict:
        """Returns the parameters of the policy as it is now; merged kernels are rounded."""
        if self.lora is None:
            return state.params
        return self.lora.merge(state.params, self.spec.policy.dtype)

    def plan(self, experience: Experience) -> tuple[Experience, StepPlan, Metrics]:
        """Plans the micro-batches of a step; waits for its responses.

        Args:
          experience: of the rollout, or given responses.

        Returns:
          The experience with padding cut off all responses, the plan, and `padding/*`, real over
          padded tokens of the plan (`StepPlan.padding`).
        """
        step, batch, samples = self.step, experience.batch, experience.samples
        images = batch.images.mask.shape
        largest = Shape(batch.prompt.tokens.shape[1], images[2], samples.tokens.shape[-1])
        # Of several images, one's padding lies in front of the next.
        buckets = step.buckets if images[1] == 1 else step.buckets._replace(windows=())
        sizes = hosts.fetch(measure(batch, samples))
        plan = plan_step(
            sizes, largest, buckets, plan_spec(self.spec.policy, step, num_parts(self._mesh))
        )
        info = plan.padding(sizes, images[1] * images[3])
        return experience._replace(samples=trim(samples, size=plan.length)), plan, info

    def score(
        self,
        params: dict,
        prompts: Prompts,
        experience: Experience,
        plan: StepPlan,
        clock: Clock | None = None,
    ) -> tuple[Experience, Metrics]:
        """Adds log-probabilities, the KL in the reward, and advantages to the experience of a step.

        Args:
          params: of the policy that sampled.
          prompts: of the experience, for their ids.
          experience: as `plan` returned it.
          plan: its micro-batches.
          clock: told of the phases "reference" and "old".

        Returns:
          The experience, and metrics: `policy/kl` where it is in the reward, `policy/kl_coef` where
          it adapts, `policy/entropy_coef` likewise, and where the log-probabilities are recomputed
          `policy/` and the names of `rl.correction.mismatch`.
        """
        clock, step, info = clock or NoClock(), self.step, {}
        batch, samples = experience.batch, experience.samples
        logprobs = partial(
            planned_logprobs,
            batch=batch,
            samples=samples,
            plan=plan,
            suppressed=self.suppressed,
            policy=self.spec.policy,
        )
        ref_logprobs = old_logprobs = entropies = None
        if step.use_reference:
            features = self.reference.features(batch, prompts.ids)
            features = shard_whole(features, self._mesh)
            ref_logprobs = logprobs(
                self.reference.params, features=features, spec=self.spec.logprobs
            ).logprobs
            clock.mark("reference", ref_logprobs)
        if step.recompute:
            old_logprobs, entropies = logprobs(params, spec=self._old_spec)
            found = mismatch_jitted(old_logprobs, samples)
            info |= {f"policy/{name}": value for name, value in found.items()}
            clock.mark("old", old_logprobs)
        rewards = experience.rewards
        if ref_logprobs is not None and step.kl_penalty:
            old = samples if old_logprobs is None else samples._replace(logprobs=old_logprobs)
            rewards, info["policy/kl"] = penalise(
                rewards, old, ref_logprobs, self.kl_coef, name=step.kl_penalty
            )
            ref_logprobs = None
        terms = terms_of(experience._replace(rewards=rewards), step.weights)
        if step.adapt_kl:
            info["policy/kl_coef"] = self.kl_coef
        if step.adapt_entropy:
            info["policy/entropy_coef"] = self.bonus.applied
        return experience._replace(
            rewards=rewards,
            ref_logprobs=ref_logprobs,
            old_logprobs=old_logprobs,
            advantages=estimate_jitted(terms, name=step.advantage, std=step.std),
            entropies=entropies,
        ), info

    def compare(self, experience: Experience) -> tuple[jax.Array, jax.Array]:
        """Returns groups with nothing to compare, bool[B], and the mean reward, float32[]."""
        terms = terms_of(experience, self.step.weights)
        return compare_groups(terms, name=self.step.advantage)

    @property
    def _old_spec(self) -> LogprobSpec:
        """Settings of the pass that recomputes what the sampler recorded."""
        selection = getattr(self.spec.loss, "selection", None)
        wanted = selection is not None and selection.kind == "top_entropy"
        return self.spec.logprobs._replace(entropy=wanted)

    def split(
        self, experience: Experience, plan: StepPlan, key: jax.Array | None = None
    ) -> list[UpdatePart]:
        """Returns the updates of a step, each with the weights of its tokens.

        Args:
          experience: with all that the loss needs.
          plan: its micro-batches.
          key: PRNG key of the step; a random selection of tokens alone reads it.
        """
        rows, loss = plan.rows(num_parts(self._mesh)), self.spec.loss
        weights, totals = weigh(weighed(experience, loss), rows, key, loss=loss)
        read = _read(experience)
        return [
            UpdatePart(read, weights, total, micro_batches)
            for total, micro_batches in zip(totals, plan.updates, strict=True)
        ]

    def update(self, state: TrainState, part: UpdatePart) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step.

        Args:
          state: parameters and optimizer state; donated.
          part: some prompts of a step, with all that the loss needs.

        Returns:
          The new state and metrics: those of the loss, `grad_norm`, `skipped`, `empty` (1 if no
          token counts), and `entropy` if asked for. The others but the loss are means over the
          tokens that count.
        """
        grads, metrics = self._no_gradients(state), None
        for micro in part.micro_batches:
            grads, found = self._add_gradients(grads, state, part, micro)
            metrics = found if metrics is None else add_metrics(metrics, found)
        return apply_update(state, grads, metrics, part.total_weight, spec=self.spec)

    def contributions(
        self, state: TrainState, part: UpdatePart
    ) -> Iterator[tuple[MicroBatch, jax.Array]]:
        """Yields each micro-batch of an update with the norm of its part of the gradient.

        Args:
          state: before the update; not donated.
          part: as of `update`.
        """
        for micro in part.micro_batches:
            grads, _ = self._add_gradients(self._no_gradients(state), state, part, micro)
            yield micro, _norm(grads)

    def _no_gradients(self, state: TrainState) -> dict:
        trained, _ = partition(state.params, self.spec.frozen)
        return no_gradients(trained, policy=None if self.lora else self.spec.policy)

    def _add_gradients(
        self, grads: dict, state: TrainState, part: UpdatePart, micro: MicroBatch
    ) -> tuple[dict, Metrics]:
        """Returns gradients with those of a micro-batch added, and its metrics; donates `grads`."""
        return add_micro_batch(
            grads,
            state.params,
            part.cut(micro),
            self.suppressed,
            Coefficients(
                self.kl_coef if self.step.adapt_kl else None,
                self.bonus.applied if self.step.adapt_entropy else None,
            ),
            self.lora,
            spec=self.spec.without_optimizer(),
            shape=micro.shape,
        )

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
        batch, images = experience.batch, experience.batch.images.mask.shape
        yield Program("measure", measure, (batch, experience.samples))
        how = {"size": experience.samples.tokens.shape[-1]}
        samples = yield Program("trim", trim, (experience.samples,), how)
        experience = experience._replace(samples=samples)
        sampled = {"parameters": params}
        # The largest: all as long as they can be, and so no two of them in one row.
        shape = Shape(batch.prompt.tokens.shape[1], images[2], samples.tokens.shape[-1])
        rows = np.zeros(step.micro_prompts, np.int32)
        passes = len(samples.lengths) // step.micro_prompts
        ref_logprobs = old_logprobs = entropies = None

        def score(name: str, params: Any, scoring: LogprobSpec, features: Any = None) -> Programs:
            how = {"entropy": scoring.entropy}
            empty = yield Program(f"no_{name}", no_logprobs, (samples,), how, sampled)
            how = {"policy": spec.policy, "spec": scoring, "shape": shape}
            scored = Scored(batch, samples, features, rows, None)
            args = empty, params, scored, self.suppressed
            return (yield Program(name, response_logprobs, args, how, sampled, calls=passes))

        if step.use_reference:
            features = yield from self.reference.programs(reference, batch)
            ref_logprobs, _ = yield from score("reference", reference, spec.logprobs, features)
        if step.recompute:
            old_logprobs, entropies = yield from score("old", params, self._old_spec)
            yield Program("mismatch", mismatch_jitted, (old_logprobs, samples))
        kl_coef = jax.ShapeDtypeStruct((), jnp.float32)
        kl_coef = whole(mesh, kl_coef) if step.adapt_kl else spec.kl_coef
        if ref_logprobs is not None and step.kl_penalty:
            old = samples if old_logprobs is None else samples._replace(logprobs=old_logprobs)
            args = rewards.rewards, old, ref_logprobs, kl_coef
            penalised, _ = yield Program("kl", penalise, args, {"name": step.kl_penalty})
            rewards, ref_logprobs = rewards._replace(rewards=penalised), None
        how = {"name": step.advantage, "std": step.std}
        advantage = yield Program("advantage", estimate_jitted, (rewards,), how)
        read = _read(
            experience._replace(
                old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs,
                advantages=advantage,
                entropies=entropies,
            )
        )
        b = len(samples.lengths)
        args = weighed(read._replace(rewards=rewards.rewards), spec.loss)
        key = whole(mesh, jax.eval_shape(partial(jax.random.key, 0)))
        args = args, np.zeros((step.num_updates, b // step.num_updates), np.int32), key
        alive = {"data": read, **sampled}
        weights, totals = yield Program("weigh", weigh, args, {"loss": spec.loss}, alive)
        held = {"data": [read, weights]}
        calls = {"calls": step.num_updates}
        how = {"policy": None if self.lora else spec.policy}
        trained, _ = partition(state.params, spec.frozen)
        grads = yield Program("no_gradients", no_gradients, (trained,), how, held, **calls)
        args = grads, state.params, Cut(read, weights, rows, None), self.suppressed
        bonus = jax.tree.map(
            lambda _: whole(mesh, jax.ShapeDtypeStruct((), np.float32)), self.bonus
        )
        coefs = Coefficients(
            kl_coef if step.adapt_kl else None, bonus.applied if step.adapt_entropy else None
        )
        args = *args, coefs, self.lora
        how = {"spec": spec.without_optimizer(), "shape": shape}
        held = held | {"optimizer": grads}
        grads, metrics = yield Program("update", add_micro_batch, args, how, held, calls=passes)
        parts = num_parts(mesh)
        settings = plan_spec(spec.policy, step, parts)
        together = largest_together(shape, settings, b // step.num_updates, samples.tokens.shape[1])
        if together is not None:
            # Instead of some of these: fewer response tokens, but more images and prompts at once.
            count, packing = together
            cut = Cut(read, weights, np.zeros(count, np.int32), packing)
            args, held = (grads, *args[1:2], cut, *args[3:]), held | {"optimizer": grads}
            grads, _ = yield Program(
                "update_packed", add_micro_batch, args, how, held, calls=passes
            )
        held |= {"optimizer": grads}
        yield Program("add_metrics", add_metrics, (metrics, metrics), {}, held, calls=passes)
        args = state, grads, metrics, totals[0]
        state, metrics = yield Program("apply", apply_update, args, {"spec": spec}, held, **calls)
        if step.adapt_kl:
            one = metrics["loss"]
            yield Program("adapt_kl", step.adapt_kl, (kl_coef, one, one))
        if step.adapt_entropy:
            one = metrics["loss"]
            yield Program("adapt_entropy", step.adapt_entropy, (bonus, one, one))
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
            alive = {"parameters": list(merged.values())}
            how = {"path": name, "dtype": jnp.dtype(self.spec.policy.dtype)}
            merged[name] = yield Program(
                f"merge.{name}", add_adapter, args, how, alive, layout=layout
            )
        return self.lora.replace(merged)

    def after_step(self, state: TrainState, step: int, info: Metrics, updates: list) -> None:
        """Adapts the KL coefficient and the entropy bonus; lets the reference follow the policy.

        Args:
          state: after the updates.
          step: number of steps that are done.
          info: as `score` returned it.
          updates: metrics of each update.
        """
        if self.step.adapt_kl:
            kl = info.get("policy/kl")
            kl, counted = _mean(updates, "kl") if kl is None else (kl, 1.0)
            self.kl_coef = self.step.adapt_kl(self.kl_coef, kl, counted)
        if self.step.adapt_entropy:
            self.bonus = self.step.adapt_entropy(self.bonus, *_mean(updates, "entropy"))
        self.reference.follow(step, state.params)

    def checkpoint(self, state: TrainState) -> Any:
        """Returns the arrays that a checkpoint holds: the state, and a reference that follows."""
        if not self.reference.follows:
            return state
        return {"state": state, "reference": self.reference.params}

    def progress(self) -> dict[str, Any]:
        """Returns the JSON that a checkpoint holds beside the arrays."""
        found: dict[str, Any] = {"kl_coef": float(self.kl_coef)} if self.step.adapt_kl else {}
        if self.step.adapt_entropy:
            found["entropy_bonus"] = [float(x) for x in self.bonus]
        return found | ({"reference": True} if self.reference.follows else {})

    def restore(self, arrays: Any, progress: dict[str, Any]) -> TrainState:
        """Goes on from what `checkpoint` and `progress` returned; returns the state."""
        if self.step.adapt_kl:
            self.kl_coef = np.float32(progress.get("kl_coef", self.kl_coef))
        if self.step.adapt_entropy:
            self.bonus = EntropyBonus(*map(np.float32, progress.get("entropy_bonus", self.bonus)))
        if not self.reference.follows:
            return arrays
        self.reference.params = arrays["reference"]
        return arrays["state"]


_norm = jax.jit(optax.tree.norm)


def _mean(updates: Sequence[Metrics], name: str) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of a metric over the updates in which a token counted, and their number."""
    counted = sum(1.0 - metrics["empty"] for metrics in updates)
    return sum(metrics[name] for metrics in updates) / jnp.maximum(counted, 1.0), counted


def _read(experience: Experience) -> Experience:
    """Returns the part of an experience that an update reads."""
    return experience._replace(replies=None, scores=None, rewards=None, greedy=None, entropies=None)
