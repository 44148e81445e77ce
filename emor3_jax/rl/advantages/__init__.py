"""Advantage estimators: rewards relative to a baseline of the group or of the batch.

`estimate(name, …)` looks up one of `ESTIMATORS` by its name in the config:

| name | advantage of response i | paper |
|---|---|---|
| grpo | `(R_i - mean) / (std + ε)`, mean and std of the group | arXiv 2402.03300 |
| dr_grpo | `R_i - mean` | arXiv 2503.20783 |
| rloo | `R_i - mean of the others of the group` | arXiv 2402.14740 |
| reinforce_pp | `(R_i - mean) / (std + ε)`, mean and std of the batch | arXiv 2501.03262 |
| reinforce_pp_baseline | `(R_i - group mean) / (std + ε)`, batch std of the numerator | the same |
| remax | `R_i - R of the greedy response` | arXiv 2310.10505 |
| gdpo | `Σ w_n (R_n - mean) / (std + ε)` over reward terms, whitened over the batch | 2601.05242 |
| maxrl | `(R_i - mean) / (mean + ε)` | arXiv 2602.02710 |
| opo | `R_i - Σ length_j R_j / Σ length_j` | arXiv 2505.23585 |

Deviations, numbered:
 1. The paper divides by the population standard deviation, the release by the sample standard
    deviation (ddof 1); `std` selects one, set by the profile. Both use the release's ε = 1e-6.
 2. A KL penalty in the reward is one number per response (`kl.penalty`), so REINFORCE++ also gives
    all tokens of a response the same advantage; its paper subtracts from each token's only the
    KL from that token on.
 3. Batch statistics are over all prompts of a step, not over those of one update.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emor3_jax.rl.advantages.gdpo import gdpo, no_term_differs
from emor3_jax.rl.advantages.group import (
    EPSILON,
    all_equal,
    dr_grpo,
    grpo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
    zero_std_fraction,
)
from emor3_jax.rl.advantages.maxrl import maxrl
from emor3_jax.rl.advantages.opo import opo
from emor3_jax.rl.advantages.terms import RewardTerms, finite_groups

__all__ = [
    "EPSILON",
    "ESTIMATORS",
    "Estimator",
    "RewardTerms",
    "all_equal",
    "dr_grpo",
    "estimate",
    "gdpo",
    "grpo",
    "maxrl",
    "nothing_to_compare",
    "opo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rloo",
    "zero_std_fraction",
]


def _all_equal(rewards: RewardTerms) -> jax.Array:
    return all_equal(rewards.rewards)


class Estimator(NamedTuple):
    """An advantage estimator and its requirements.

    Attributes:
      function: `RewardTerms` → advantages, float32[B, G].
      responses: the smallest G for which it is not always 0.
      std: `function` takes the keyword `std`, see `grpo`.
      greedy: needs the reward of one greedy response to each prompt.
      terms: reads the reward terms apart, not what shaping adds to their sum.
      equal_is_zero: a group whose rewards are all equal always has an advantage of 0.
      negative: rewards under 0 have a meaning.
      nothing_differs: `RewardTerms` → groups in which nothing that is compared differs, bool[B].
    """

    function: Callable[..., jax.Array]
    responses: int = 1
    std: bool = False
    greedy: bool = False
    terms: bool = False
    equal_is_zero: bool = True
    negative: bool = True
    nothing_differs: Callable[[RewardTerms], jax.Array] = _all_equal


def _combined(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Adapts an estimator of the combined rewards alone to `RewardTerms`."""
    return lambda rewards, **options: function(rewards.rewards, **options)


ESTIMATORS = {
    "grpo": Estimator(_combined(grpo), responses=2, std=True),
    "dr_grpo": Estimator(_combined(dr_grpo), responses=2),
    "rloo": Estimator(_combined(rloo), responses=2),
    "reinforce_pp": Estimator(_combined(reinforce_pp), equal_is_zero=False),
    "reinforce_pp_baseline": Estimator(_combined(reinforce_pp_baseline), responses=2),
    "remax": Estimator(
        lambda rewards: remax(rewards.rewards, rewards.greedy),
        greedy=True,
        equal_is_zero=False,
        # The greedy response is one of those that are compared.
        nothing_differs=lambda x: all_equal(jnp.concatenate([x.rewards, x.greedy], axis=1)),
    ),
    "gdpo": Estimator(
        gdpo,
        responses=2,
        std=True,
        terms=True,
        equal_is_zero=False,
        nothing_differs=no_term_differs,
    ),
    "maxrl": Estimator(_combined(maxrl), responses=2, negative=False),
    "opo": Estimator(lambda rewards: opo(rewards.rewards, rewards.lengths), responses=2),
}
"""Name in the config → estimator."""


def estimate(name: str, rewards: RewardTerms, *, std: str = "population") -> jax.Array:
    """Returns the advantages by a named estimator, float32[B, G].

    They are 0 in a group with a term that is no finite number, whose rewards mean nothing.

    Args:
      name: one of `ESTIMATORS`.
      rewards: of all responses of a step.
      std: see `grpo`; other estimators ignore it.

    Raises:
      ValueError: if G is too small for the estimator, or it needs greedy rewards and has none.
    """
    estimator = ESTIMATORS[name]
    if estimator.greedy and rewards.greedy is None:
        raise ValueError(f"{name} needs the rewards of greedy responses, got None")
    found = estimator.function(rewards, **({"std": std} if estimator.std else {}))
    return jnp.where(finite_groups(rewards)[:, None], found, 0.0)


def nothing_to_compare(name: str, rewards: RewardTerms) -> jax.Array:
    """Returns the groups that dynamic sampling replaces, bool[B].

    Nothing differs in them, or a term is no finite number. REINFORCE++ gives a group of equal
    rewards an advantage over the batch; it counts as one of them nevertheless.

    Args:
      name: one of `ESTIMATORS`.
      rewards: of a rollout.
    """
    return ESTIMATORS[name].nothing_differs(rewards) | ~finite_groups(rewards)
