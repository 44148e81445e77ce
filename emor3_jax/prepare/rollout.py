"""From a config to the rollout of training, and to that of evaluation."""

import logging

from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.config import reward_terms
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.processor import Processor
from emor3_jax.parallel.mesh import num_parts
from emor3_jax.prepare.data import load_templates
from emor3_jax.prepare.judge import make_retokenizer
from emor3_jax.prepare.profile import evaluation_sampling, listed_labels, reply_tokens
from emor3_jax.prepare.reachable import check_reachable
from emor3_jax.rewards.reward import Reward
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rewards.terms import Term
from emor3_jax.rl.advantages import ESTIMATORS
from emor3_jax.rollout.engine import Plan
from emor3_jax.rollout.label_likelihood import LabelLikelihood
from emor3_jax.rollout.reflect import Reflection, prompt_questions
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.tokens import stop_ids, suppressed_tokens

logger = logging.getLogger(__name__)


def make_rollout(
    config: ConfigDict,
    policy: LoadedPolicy,
    labels: tuple[str, ...],
    mesh: Mesh,
    judge: Processor | None = None,
) -> Rollout:
    """Returns the rollout of training.

    Args:
      config: of the run.
      policy: its policy and tokenizer.
      labels: the label set.
      mesh: of the devices.
      judge: processor of a judge that shares nothing but the text; None asks in the tokens of the
        policy.
    """
    c = config.rollout
    int8 = c.weight_dtype == "int8"
    if int8 and config.policy_update.correction == "off":
        logger.warning(
            "rollout.weight_dtype='int8': samples from a policy that differs by rounding from the "
            "one that learns, and policy_update.correction='off' corrects nothing of it; set that "
            "to 'token_truncate', and policy_update.old_logprobs to 'recompute'"
        )
    return Rollout(
        policy.policy,
        _scorer(config, policy, labels, judge),
        suppressed_tokens(policy.shapes.vocab_size, policy.processor.tokenizer),
        make_sampling(config, stop_ids(policy.processor.tokenizer)),
        c.responses,
        _reflection(config, policy, labels, judge) if config.reflect.enabled else None,
        rollout_plan(config),
        ESTIMATORS[config.policy_update.advantage].greedy,
        num_parts(mesh),
        int8,
    )


def make_evaluation_rollout(
    config: ConfigDict,
    policy: LoadedPolicy,
    labels: tuple[str, ...],
    mesh: Mesh,
    judge: Processor | None = None,
) -> Rollout:
    """Returns the rollout of an evaluation.

    Args:
      config: of the run.
      policy: its policy and tokenizer.
      labels: the label set.
      mesh: of the devices.
      judge: as of `make_rollout`.

    Raises:
      ConfigError, LabelError: as `check_reachable`, for a judge of its own tokens.
    """
    asks = config.reflect.enabled or config.evaluate.reflect
    rollout = Rollout(
        policy.policy,
        _scorer(config, policy, labels, judge),
        suppressed_tokens(policy.shapes.vocab_size, policy.processor.tokenizer),
        make_evaluation_sampling(config, stop_ids(policy.processor.tokenizer)),
        config.evaluate.votes,
        _reflection(config, policy, labels, judge) if asks else None,
        evaluation_plan(config),
        num_shards=num_parts(mesh),
    )
    if judge is not None:
        check_reachable(rollout)
    return rollout


def make_label_likelihood(config: ConfigDict, rollout: Rollout) -> LabelLikelihood | None:
    """Returns what weighs the labels behind the responses of an evaluation; None if not asked."""
    return LabelLikelihood.of_rollout(rollout) if config.evaluate.likelihood else None


def make_sampling(config: ConfigDict, stop: tuple[int, ...]) -> Sampling:
    """Returns the sampler's settings in training, for the ids that end a response."""
    c = config.rollout
    return Sampling(c.max_tokens, c.temperature, c.top_p, stop)


def make_evaluation_sampling(config: ConfigDict, stop: tuple[int, ...]) -> Sampling:
    """Returns the sampler's settings in evaluation, for the ids that end a response."""
    return Sampling(config.rollout.max_tokens, *evaluation_sampling(config), stop)


def make_reply_sampling(config: ConfigDict, stop: tuple[int, ...]) -> Sampling:
    """Returns the sampler's settings for replies to the questions."""
    c = config.reflect
    return Sampling(reply_tokens(config), c.temperature, c.top_p, stop)


def make_reward(config: ConfigDict, terms: tuple[Term, ...] | None = None) -> Reward:
    """Returns the reward of `config.reward`; `terms` replaces its custom reward terms."""
    c = config.reward
    overlong = None
    if c.overlong and c.overlong_weight:
        overlong = config.rollout.max_tokens, c.overlong, c.overlong_weight
    return Reward(
        config.profile,
        c.coherence_target,
        c.lambda_reflect,
        c.lambda_format,
        reward_terms(config) if terms is None else terms,
        c.format,
        c.reflection,
        overlong,
    )


def rollout_plan(config: ConfigDict) -> Plan:
    """Returns the number of prompts and responses in flight in a training step."""
    c = config.rollout
    return Plan(c.slots, c.refill, c.lanes, c.block, c.halvings, c.unroll)


def evaluation_plan(config: ConfigDict) -> Plan:
    """Returns the same for evaluation."""
    c = config.evaluate
    return rollout_plan(config)._replace(slots=c.slots, refill=c.refill, lanes=c.lanes)


def _scorer(
    config: ConfigDict, policy: LoadedPolicy, labels: tuple[str, ...], judge: Processor | None
) -> Scorer:
    return Scorer(
        policy.processor.tokenizer,
        labels,
        reward=make_reward(config),
        cache=config.reward.table_cache,
        reply_tokenizer=judge and judge.tokenizer,
    )


def _reflection(
    config: ConfigDict, policy: LoadedPolicy, labels: tuple[str, ...], judge: Processor | None
) -> Reflection:
    tokenizer = (judge or policy.processor).tokenizer
    return Reflection(
        prompt_questions(tokenizer, load_templates(config), labels, listed_labels(config, labels)),
        make_reply_sampling(config, stop_ids(tokenizer)),
        tuple(config.reflect.text_lengths),
        config.reflect.soft,
        make_retokenizer(policy.processor, judge),
    )
