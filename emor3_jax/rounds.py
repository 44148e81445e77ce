"""A round of a training step: prompts answered, judged and scored; and rounds made into one batch.

    played = play(actor, params, host, ids, key, ...)
    played, counts = fill(played, again, data, key, ...)      # DAPO's dynamic sampling

A group whose rewards are all equal teaches nothing. Dynamic sampling (DAPO, arXiv 2503.14476)
replaces such prompts by others of further batches until every group has something to compare.

Deviations, numbered:
 1. The paper draws batches until the last group is useful, which on few labels may be never: here
    at most `tries` more are drawn, and the step goes on with what it has, all-equal groups too.
 2. The paper filters by the accuracy, of which its reward is a function; here by the whole reward,
    since the format and the reflection also tell responses apart.
 3. Useful groups beyond the batch are dropped, not kept for the next step: its policy is another.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.data.batch import Batch, pick_rows
from emor3_jax.episode import Actor, Judgement, Replies, Scores
from emor3_jax.parallel.mesh import shard_rows
from emor3_jax.rl.advantages import all_equal
from emor3_jax.rollout.engine import Plan
from emor3_jax.rollout.generate import Samples, SamplingRule


class Round(NamedTuple):
    """B prompts and what came of them.

    Attributes:
      host, ids: the prompts as host arrays, and the ids of their rows.
      batch: the prompts on the devices.
      samples: the responses.
      replies: what was said of them; None without reflection.
      scores: of the responses.
      rewards: float32[B, G], what advantages compare.
      greedy: float32[B, 1], the reward of a greedy response to each prompt, or None.
    """

    host: Batch
    ids: tuple[str, ...]
    batch: Batch
    samples: Samples
    replies: Replies | Judgement | None
    scores: Scores
    rewards: jax.Array
    greedy: jax.Array | None


def play(
    actor: Actor,
    params: dict,
    host: Batch,
    ids: Sequence[str],
    key: jax.Array,
    *,
    put: Callable[[Batch], Batch],
    parts: int,
    responses: int,
    rule: SamplingRule,
    plan: Plan,
    shape: Callable[[Scores, Samples], jax.Array],
    greedy: bool,
    mark: Callable[[str, Any], None],
) -> Round:
    """Answers prompts, asks both reflections and scores.

    Args:
      actor: for the label set of the data.
      params: of the policy.
      host: B prompts as host arrays.
      ids: of their rows.
      key: PRNG key.
      put: places prompts on the devices.
      parts: how many parts the devices cut the prompts into.
      responses: G.
      rule: how responses are sampled.
      plan: how much is in flight at once.
      shape: returns the rewards that advantages compare, float32[B, G].
      greedy: also answer each prompt once greedily, and reward that in the same way.
      mark: told of each phase and the arrays that it ends with.
    """
    batch = put(host)

    def answer(count: int, rule: SamplingRule) -> tuple:
        samples, replies = actor.run(
            params, batch, key, responses=count, rule=rule, plan=plan, parts=parts, mark=mark
        )
        scores = actor.score(batch, samples, replies)
        rewards = shape(scores, samples)
        mark("reward", rewards)
        return samples, replies, scores, rewards

    baseline = answer(1, rule._replace(temperature=0.0))[-1] if greedy else None
    return Round(host, tuple(ids), batch, *answer(responses, rule), baseline)


def fill(
    played: Round,
    again: Callable[[Batch, tuple[str, ...], jax.Array], Round],
    data: Iterator[tuple[Batch, tuple[str, ...]]],
    key: jax.Array,
    *,
    tries: int,
    merge: int,
    put: Callable[[Batch], Batch],
) -> tuple[Round, dict[str, float]]:
    """Replaces prompts whose groups are all equal by prompts of further rounds.

    Args:
      played: the first round.
      again: plays further prompts: `play` without its options.
      data: where these come from, on the host.
      key: PRNG key of the first round.
      tries: at most so many rounds more.
      merge: patches that the merger joins (spatial_merge_size squared).
      put: places prompts on the devices.

    Returns:
      A round of as many prompts, and `resample/rounds` (all of the step), `resample/dropped`
      (all-equal groups that are not learned from), `resample/surplus` (useful ones for which there
      was no place), `resample/left` (all-equal groups that stayed) and `resample/reward_all` (mean
      reward over all rounds).
    """
    first, prompts = played, len(played.ids)
    useless = np.array(all_equal(played.rewards))
    rounds, dropped, surplus, rewards = 1, 0, 0, [played.rewards]
    while useless.any() and rounds <= tries:
        # Far from the keys that a round splits its own into.
        extra = again(*next(data), jax.random.fold_in(key, 2**32 - 1 - rounds))
        rounds += 1
        rewards.append(extra.rewards)
        found, places = np.flatnonzero(~np.asarray(all_equal(extra.rewards))), useless.nonzero()[0]
        used = min(len(found), len(places))
        dropped += prompts - len(found) + used
        surplus += len(found) - used
        if used:
            order = np.arange(prompts)
            order[places[:used]] = prompts + found[:used]
            played = _merge(played, extra, order, merge)
            useless[places[:used]] = False
    if played is not first:
        played = played._replace(batch=put(played.host))
    return played, {
        "resample/rounds": float(rounds),
        "resample/dropped": float(dropped),
        "resample/surplus": float(surplus),
        "resample/left": float(useless.sum()),
        "resample/reward_all": float(np.mean([np.mean(x) for x in rewards])),
    }


def _merge(first: Round, second: Round, order: np.ndarray, merge: int) -> Round:
    """Picks prompts of two rounds; the device's copy of the prompts is left to the caller."""
    ids = [*first.ids, *second.ids]
    arrays = [(x.samples, x.replies, x.scores, x.rewards, x.greedy) for x in (first, second)]
    return Round(
        pick_rows(first.host, second.host, order, merge),
        tuple(ids[i] for i in order),
        first.batch,
        *_pick(*arrays, order),
    )


@jax.jit
def _pick(first: Any, second: Any, order: jax.Array) -> Any:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return shard_rows(0, jnp.concatenate([a, b])[order])

    return jax.tree.map(pick, first, second)
