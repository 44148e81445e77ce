"""Guards of a run: what a step's metrics say that learns nothing, or is running away.

Each guard warns by its name, value and way out once it has held for `guard.warn_after` steps in a
row, and ends the run after `guard.stop_after`.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from emor3_jax.errors import UserError
from emor3_jax.rl.advantages import ESTIMATORS

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]


class GuardError(UserError):
    """A run that went on for too many steps without use."""


class Guard(NamedTuple):
    """One thing to watch.

    Attributes:
      name: of the guard.
      value: returns the value to show where the guard holds in a step, else None.
      says: what it means, and what to do about it.
    """

    name: str
    value: Callable[[Metrics], str | None]
    says: str


def _at_least(metric: str, least: float) -> Callable[[Metrics], str | None]:
    """Holds where a metric is `least` or more; 0 is never reached."""

    def value(metrics: Metrics) -> str | None:
        found = metrics.get(metric)
        holds = found is not None and least > 0 and found >= least
        return f"{metric}={found:g}" if holds else None

    return value


def _not_finite(metrics: Metrics) -> str | None:
    """Holds where a reward or a loss is no number."""
    watched = ("reward/", "policy/loss", "policy/kl")
    for name, value in metrics.items():
        if name.startswith(watched) and not math.isfinite(value):
            return f"{name}={value}"
    return None


def make_guards(config: ConfigDict) -> tuple[Guard, ...]:
    """Returns the guards of a config's `guard`."""
    limits = config.guard
    # With others, groups of equal rewards may have an advantage: of one response, each is such.
    equal_is_zero = ESTIMATORS[config.policy_update.advantage].equal_is_zero
    return (
        Guard(
            "not_finite",
            _not_finite,
            "a reward or a loss is no number; look at your reward terms, and for a loss lower "
            "policy_update.learning_rate",
        ),
        Guard(
            "skipped_updates",
            _at_least("policy/skipped", 1.0),
            "every update was skipped, since its gradient was not finite: nothing is learned; look "
            "at your reward terms, lower policy_update.learning_rate, or take policy.dtype=float32",
        ),
        Guard(
            "equal_rewards",
            _at_least("group/zero_std_fraction", 1.0 if equal_is_zero else 0.0),
            "the responses of every prompt have one reward, so nothing is learned; raise "
            "rollout.temperature or rollout.responses, or look at samples/ for what is scored",
        ),
        Guard(
            "truncated",
            _at_least("response/truncated_fraction", 1.0),
            "no response ended within rollout.max_tokens; raise it, or look at samples/",
        ),
        Guard(
            "kl",
            _at_least("policy/kl", limits.max_kl),
            "the policy has gone far from its reference (guard.max_kl); lower "
            "policy_update.learning_rate or raise policy_update.kl_coef",
        ),
    )


class Watch:
    """Counts for how many steps in a row each guard has held."""

    def __init__(self, config: ConfigDict) -> None:
        """Watches for the guards of a config."""
        self._guards = make_guards(config)
        self._warn, self._stop = config.guard.warn_after, config.guard.stop_after
        self._count = dict.fromkeys((guard.name for guard in self._guards), 0)

    def see(self, step: int, metrics: Metrics) -> list[str]:
        """Looks at the metrics of a step; returns the warnings, which are logged too.

        Args:
          step: its number.
          metrics: by name, as they are logged.

        Raises:
          GuardError: if a guard has held for `guard.stop_after` steps in a row.
        """
        said = []
        for name, value, says in self._guards:
            shown = value(metrics)
            self._count[name] = 0 if shown is None else self._count[name] + 1
            count = self._count[name]
            message = f"guard {name}: {shown} for {count} steps in a row, to step {step}: {says}"
            if self._stop and count >= self._stop:
                raise GuardError(f"{message}. Stopped by guard.stop_after={self._stop}")
            if count and count == self._warn:
                logger.warning("%s", message)
                said.append(message)
        return said
