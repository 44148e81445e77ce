"""The rollout: prompts in, experience out. Sample responses, ask the reflections, score all.

    experience = rollout(params, batch, key)

A few prompts at a time leave the engine (`rollout.engine`), and the policy is asked about their
responses while their keys are still there; then other prompts are admitted. The arrays stay on the
device.

Deviations, numbered:
 1. Where a response has no text to judge, the paper's profile scores 0 and the release's scores as
    its stand-in reply "None" would (`emor3_jax.rewards`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emor3_jax.models.cache import KV
from emor3_jax.models.params import cast_for_decoding, is_ready_to_decode, weight_sync
from emor3_jax.models.policy import Policy
from emor3_jax.parallel.program import (
    Program,
    Programs,
    along,
    by_prompts,
    first_rows,
    laid_out,
    mesh_of,
)
from emor3_jax.rewards.reward import score_jitted, shape_jitted
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rollout.engine import ALL_AT_ONCE, Engine, Finished, Plan
from emor3_jax.rollout.judge import Judge
from emor3_jax.rollout.reflect import Reflection, reflect, reflect_programs
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import Admission, prefix_layout
from emor3_jax.types import (
    Batch,
    Clock,
    Experience,
    ImagePrefix,
    NoClock,
    Replies,
    ReplyProbs,
    Samples,
    iterate_parts,
    join,
    join_rows,
    take,
    take_part,
    take_rows,
)


@dataclass(frozen=True)
class Rollout:
    """Samples, reflects and scores for one label set; holds no parameters.

    Attributes:
      policy: the policy.
      scorer: of the label set.
      suppressed: bool[V], ids that a response may never contain.
      sampling: of the responses.
      group_size: G, responses to each prompt.
      reflection: the questions; None asks none.
      plan: number of prompts in flight at once.
      greedy: also reward one greedy response to each prompt.
      num_shards: number of equal parts that the devices cut the prompts into.
      int8: decode with quantised weights (`models.quantisation`), whose policy the responses and
        their log-probabilities, and the replies of a policy that is asked itself, are of.
    """

    policy: Policy
    scorer: Scorer
    suppressed: np.ndarray
    sampling: Sampling
    group_size: int = 1
    reflection: Reflection | None = None
    plan: Plan = ALL_AT_ONCE
    greedy: bool = False
    num_shards: int = 1
    int8: bool = False

    def __call__(
        self,
        params: dict,
        batch: Batch,
        key: jax.Array,
        clock: Clock | None = None,
        judge: Judge | None = None,
    ) -> Experience:
        """Samples `group_size` responses to each prompt, asks the questions, scores.

        Args:
          params: of the policy; cast once for all tokens to the compute type.
          batch: B prompts on the devices.
          key: PRNG key.
          clock: told of each phase ("rollout", "reflect", "reward") and the arrays that end it.
          judge: who is asked the questions; None asks the policy.
        """
        clock, greedy = clock or NoClock(), None
        if judge is not None:
            kind = judge.policy.dtype
            judge = judge._replace(params=cast_for_decoding(judge.params, kind))
        play = partial(self._play, params, batch, key, clock=clock, judge=judge)
        if self.greedy:
            greedy = play(self._engine(1, self.sampling._replace(temperature=0.0))).rewards
        return play(self._engine(self.group_size, self.sampling))._replace(greedy=greedy)

    def respond(self, params: dict, batch: Batch, key: jax.Array) -> tuple[KV, Samples]:
        """Samples responses to each prompt at once; returns the prompts' keys and values too."""
        engine = self._engine(self.group_size, self.sampling, ALL_AT_ONCE)
        params = cast_for_decoding(params, self.policy.dtype, int8=self.int8)
        (finished,) = self._sample(params, batch, key, engine)
        return finished.prefix, finished.samples

    def reflect(
        self,
        params: dict,
        batch: Batch,
        finished: Finished,
        key: jax.Array,
        judge: Judge | None = None,
    ) -> Replies | ReplyProbs | None:
        """Asks the questions about responses; None if reflection is switched off.

        Args:
          params: of the policy.
          batch: the prompts of the step.
          finished: some of its prompts, or all, with their responses.
          key: PRNG key.
          judge: who is asked, its parameters cast; None asks the policy.
        """
        if self.reflection is None:
            return None
        rows, prefix = np.asarray(finished.row, np.int32), finished.prefix
        if judge is None:
            judge = Judge(self.policy, params, self.suppressed)
            shared = take((batch.shared_length, batch.shared_position), rows)
        else:
            seen = take(batch.seen_by_judge, rows)
            prefix = prefill(judge.params, seen, policy=judge.policy)
            shared = seen.shared_length, seen.shared_position
        return reflect(
            judge.policy,
            judge.params,
            self.reflection,
            self.scorer.tables,
            (prefix, *shared),
            finished.samples,
            (key, rows),
            judge.suppressed,
        )

    def counters(self) -> dict[str, float]:
        """Returns `reflect/texts_cut`: judged texts so far that were too long for a judge's tokens.

        Empty where the texts are read as they were written.
        """
        if self.reflection is None or self.reflection.retokenizer is None:
            return {}
        return {"reflect/texts_cut": float(self.reflection.retokenizer.cut)}

    def programs(self, params: Any, batch: Batch, key: Any, judge: Judge | None = None) -> Programs:
        """Yields every jitted program of a call, at its largest shapes.

        Args:
          params: master parameters, abstract.
          batch: B prompts in the largest buckets, abstract.
          key: abstract PRNG key.
          judge: who is asked the questions, its parameters abstract; None asks the policy.

        Returns:
          The abstract experience.
        """
        engine, greedy = self._engine(self.group_size, self.sampling), None
        play, alive = partial(self._experience_programs, params, batch, key), {}
        if judge is not None:
            sync = _sync_programs(mesh_of(batch), judge.params, judge.policy)
            judge = judge._replace(params=(yield from along(sync, {}, "judge")))
            alive["parameters"] = judge.params
        if self.greedy:
            one = self._engine(1, self.sampling)
            baseline = yield from along(play(one, judge), alive, "greedy")
            greedy = baseline.rewards
        experience = yield from along(play(engine, judge), alive)
        return experience._replace(greedy=greedy)

    def _experience_programs(
        self, params: Any, batch: Batch, key: Any, engine: Engine, judge: Judge | None
    ) -> Programs:
        mesh, prompts = mesh_of(batch), len(batch.last_token)
        params = yield from _sync_programs(mesh, params, self.policy, self.int8)
        alive = {"parameters": params}
        refill = engine.sizes(prompts)[1]
        waves = prompts // refill
        batch, everything = _of_policy(batch), batch
        # All at once they are the batch itself, not a part beside it.
        part = first_rows(batch, refill) if waves > 1 else batch
        rows = by_prompts(mesh, jax.ShapeDtypeStruct((refill,), jnp.int32))

        def admit_programs(cache: dict) -> Programs:
            wave = part
            if waves > 1:
                args = batch, np.int32(0)
                wave = yield Program(
                    "take_part", take_part, args, {"count": waves}, cache, calls=waves
                )
            how = {"policy": self.policy}
            held = {**cache, "data": wave}
            prefix = yield Program("prefill", prefill, (params, wave), how, held, calls=waves)
            return Admission(rows, wave.last_token, wave.next_position, prefix)

        prefix = prefill.eval_shape(params, batch, policy=self.policy)
        everyone = by_prompts(mesh, jax.ShapeDtypeStruct((prompts,), jnp.int32))
        every = Admission(everyone, everyone, everyone, prefix_layout(mesh, prefix))
        sampled = engine.programs(params, admit_programs, every, key)
        prefix, samples = yield from along(sampled, alive)
        replies = None
        if self.reflection is not None:
            # The slots are still there; the prompts that left are in none of them.
            alive["cache"] = engine.abstract_flight(every), prefix
            if judge is None:
                judge = Judge(self.policy, params, self.suppressed)
                args = (batch.shared_length, batch.shared_position), rows
                shared = yield Program("take", take_rows, args, {}, alive, calls=waves)
            else:
                args = everything.seen_by_judge, rows
                seen = yield Program("judge.take", take_rows, args, {}, alive, calls=waves)
                how, held = {"policy": judge.policy}, {**alive, "data": seen}
                args = (judge.params, seen)
                prefix = yield Program("judge.prefill", prefill, args, how, held, calls=waves)
                shared = seen.shared_length, seen.shared_position
            asked = reflect_programs(
                judge.policy,
                judge.params,
                self.reflection,
                self.scorer.tables,
                (prefix, *shared),
                samples,
                (key, rows),
                judge.suppressed,
            )
            replies = yield from along(asked, alive, calls=waves)
        if waves > 1:
            # As many arrays as there are waves, each an object of its own.
            parts = [first_rows((samples, replies), refill) for _ in range(waves)]
            args = parts, np.zeros(prompts, np.int32)
            samples, replies = yield Program("join", join_rows, args)
        reward = self.scorer.reward
        scores = yield Program(
            "reward",
            score_jitted,
            (reward, self.scorer.tables, batch.answers, batch.grades, samples, replies, {}),
        )
        rewards = scores.overall
        if reward.overlong is not None:
            args = reward.overlong, scores.overall, samples.lengths
            rewards = yield Program("shape", shape_jitted, args)
        return Experience(batch, samples, replies, scores, rewards)

    def _engine(self, group_size: int, sampling: Sampling, plan: Plan | None = None) -> Engine:
        plan = plan or self.plan
        return Engine(self.policy, sampling, plan, group_size, self.num_shards, self.suppressed)

    def _play(
        self,
        params: dict,
        batch: Batch,
        key: jax.Array,
        engine: Engine,
        *,
        clock: Clock,
        judge: Judge | None,
    ) -> Experience:
        params = cast_for_decoding(params, self.policy.dtype, int8=self.int8)
        sampling_key, reflection_key = jax.random.split(key)
        found, rows = [], []
        for finished in self._sample(params, batch, sampling_key, engine):
            clock.mark("rollout", finished.samples)
            replies = self.reflect(params, batch, finished, reflection_key, judge)
            clock.mark("reflect", replies)
            found.append((finished.samples, replies))
            rows.append(finished.row)
        samples, replies = _in_order(found, np.concatenate(rows))
        scores = self.scorer.score(batch, samples, replies)
        rewards = self.scorer.reward.shape(scores, samples)
        clock.mark("reward", rewards)
        return Experience(_of_policy(batch), samples, replies, scores, rewards)

    def _sample(
        self, params: dict, batch: Batch, key: jax.Array, engine: Engine
    ) -> Iterator[Finished]:
        prompts = len(batch.last_token)
        refill = engine.sizes(prompts)[1]
        waves = prompts // refill

        def admissions() -> Iterator[Admission]:
            for wave, part in enumerate(iterate_parts(_of_policy(batch), waves)):
                rows = np.arange(wave, prompts, waves, dtype=np.int32)
                prefix = prefill(params, part, policy=self.policy)
                yield Admission(rows, part.last_token, part.next_position, prefix)

        return engine.run(params, admissions(), prompts, key)


def _sync_programs(mesh: Mesh, params: Any, policy: Policy, int8: bool = False) -> Programs:
    """Yields the program of `cast_for_decoding`, if it does anything; returns its result."""
    if int8 or not is_ready_to_decode(params, policy.dtype, mesh.size):
        args = params, jnp.dtype(policy.dtype)
        how = {"int8": True} if int8 else {}
        params = yield Program("weight_sync", weight_sync, args, how)
    return params


def _of_policy(batch: Batch) -> Batch:
    """Returns a batch without what the judge alone reads: it is not learned from."""
    return batch._replace(judge_prefix=None)


@partial(jax.jit, static_argnames="policy")
@laid_out(prefix_layout)
def prefill(params: dict, batch: Batch | ImagePrefix, *, policy: Policy) -> KV:
    """Returns keys and values of the prompts of a batch, or of what a judge reads instead."""
    return policy.prefill(params, batch.prompt, batch.images)


def _in_order(found: list, rows: np.ndarray) -> Any:
    """Joins results for some prompts each, in the order of the prompts."""
    if len(found) == 1 and (rows == np.arange(len(rows))).all():
        return found[0]
    return join(found, np.argsort(rows))
