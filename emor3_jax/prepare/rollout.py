"""From a config to the actor, and to how it samples."""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emor3_jax.config import reward_terms
from emor3_jax.episode import Actor, stop_ids
from emor3_jax.models import Policy
from emor3_jax.prepare.data import load_templates
from emor3_jax.rollout import packing
from emor3_jax.rollout.engine import Plan
from emor3_jax.rollout.generate import Samples, SamplingRule
from emor3_jax.rollout.packing import Packing


def make_actor(
    config: ConfigDict, policy: Policy, labels: tuple[str, ...], *, training: bool = False
) -> Actor:
    """Returns the actor for a label set.

    Args:
      config: of the run.
      policy: its config and tokenizer.
      labels: the label set.
      training: whether it answers to learn; evaluation may reflect where training does not.
    """
    asks = config.reflect.enabled or (config.evaluate.reflect and not training)
    rule = SamplingRule(
        config.reflect.max_tokens,
        config.reflect.temperature,
        config.reflect.top_p,
        stop_ids(policy.processor.tokenizer),
    )
    return Actor(
        policy.config,
        policy.processor.tokenizer,
        labels,
        load_templates(config),
        profile=config.profile,
        coherence_target=config.reward.coherence_target,
        lambda_reflect=config.reward.lambda_reflect,
        lambda_format=config.reward.lambda_format,
        reflect_rule=rule if asks else None,
        text_lengths=tuple(config.reflect.text_lengths),
        dtype=jnp.dtype(config.policy.dtype),
        soft=config.reflect.soft,
        terms=reward_terms(config),
        format=config.reward.format,
        reflection=config.reward.reflection,
        table_cache=config.reward.table_cache,
    )


def rollout_rule(config: ConfigDict, policy: Policy) -> SamplingRule:
    """Returns how training samples responses."""
    stop = stop_ids(policy.processor.tokenizer)
    return SamplingRule(
        config.rollout.max_tokens, config.rollout.temperature, config.rollout.top_p, stop
    )


def rollout_plan(config: ConfigDict) -> Plan:
    """Returns how much of a training step's rollout is in flight at once."""
    c = config.rollout
    return Plan(c.slots, c.refill, c.block, c.halvings, c.unroll)


def evaluation_rule(config: ConfigDict, policy: Policy) -> SamplingRule:
    """Returns how evaluation samples responses."""
    return rollout_rule(config, policy)._replace(
        temperature=config.evaluate.temperature, top_p=config.evaluate.top_p
    )


def evaluation_plan(config: ConfigDict) -> Plan:
    """Returns the same for evaluation: a batch of it is in flight all at once."""
    c = config.rollout
    return Plan(block=c.block, halvings=c.halvings, unroll=c.unroll)


def plan_packing(
    config: ConfigDict, policy: Policy, lengths: np.ndarray, scored: Samples
) -> Packing | None:
    """Returns how a step's responses share rows, or None if each has one of its own.

    Args:
      config: of the run.
      policy: kernels of its attention know nothing of responses within a row.
      lengths: int[B, G].
      scored: the responses, trimmed to T.
    """
    c = config.policy_update
    if not c.pack or policy.config.attention != "xla":
        return None
    return packing.plan(lengths, scored.tokens.shape[-1], c.response_lengths)
