"""Dynamic sampling (DAPO, arXiv 2503.14476): prompts with nothing to compare are replaced.

A group whose rewards are all equal teaches nothing. Such prompts are replaced by others of further
batches until every group has something to compare (`rl.advantages.nothing_to_compare`): for `remax`
with the greedy response, for `gdpo` in one of its terms.

Deviations, numbered:
 1. The paper draws batches until the last group is useful, which on few labels may be never: here
    at most `tries` more are drawn, and the step goes on with what it has, useless groups too.
 2. The paper filters by the accuracy, of which its reward is a function; here by the whole reward,
    since the format and the reflection also tell responses apart.
 3. Useful groups beyond the batch are dropped, not kept for the next step: its policy is another.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from emor3_jax.data.batch import Prompts, pick_prompts
from emor3_jax.types import Batch, Experience, join


def resample(
    prompts: Prompts,
    experience: Experience,
    rollout: Callable[[Batch, jax.Array], Experience],
    data: Iterator[Prompts],
    key: jax.Array,
    tries: int,
    put: Callable[[Batch], Batch],
    compare: Callable[[Experience], tuple[jax.Array, jax.Array]],
) -> tuple[Prompts, Experience, dict[str, float]]:
    """Replaces prompts whose groups have nothing to compare by prompts of further batches.

    Args:
      prompts: the first batch.
      experience: of the first batch.
      rollout: returns the experience of further prompts on the devices.
      data: yields further prompts.
      key: PRNG key of the first rollout.
      tries: at most so many batches more.
      put: puts prompts on the devices.
      compare: returns which groups have nothing to compare, bool[B], and the mean reward.

    Returns:
      As many prompts and their experience, and the metrics `resample/rounds` (rollouts of the
      step), `resample/dropped` (useless groups that are not learned from), `resample/surplus`
      (useful ones that did not fit), `resample/left` (useless groups that stayed) and
      `resample/reward_all` (mean reward over all rollouts).
    """
    size, first = len(prompts.ids), experience
    useless, mean = map(np.array, compare(experience))
    rounds, dropped, surplus, means = 1, 0, 0, [mean]
    while useless.any() and rounds <= tries:
        more = next(data)
        # Far from the keys that a rollout splits its own into.
        extra = rollout(put(more.batch), jax.random.fold_in(key, 2**32 - 1 - rounds))
        rounds += 1
        others, mean = map(np.array, compare(extra))
        means.append(mean)
        useful, free = np.flatnonzero(~others), useless.nonzero()[0]
        used = min(len(useful), len(free))
        dropped += size - len(useful) + used
        surplus += len(useful) - used
        if used:
            rows = np.arange(size)
            rows[free[:used]] = size + useful[:used]
            prompts = pick_prompts(prompts, more, rows)
            picked = join([experience._replace(batch=None), extra._replace(batch=None)], rows)
            experience = picked._replace(batch=experience.batch)
            useless[free[:used]] = False
    if experience is not first:
        # The questions are asked; what the judge alone reads stays on the host.
        experience = experience._replace(batch=put(prompts.batch._replace(judge_prefix=None)))
    return (
        prompts,
        experience,
        {
            "resample/rounds": float(rounds),
            "resample/dropped": float(dropped),
            "resample/surplus": float(surplus),
            "resample/left": float(useless.sum()),
            "resample/reward_all": float(np.mean(means)),
        },
    )
