"""From a config to the algorithm: rewards, advantages, losses, the optimizer, and the account."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from emor3_jax import account
from emor3_jax.config import uses_reference
from emor3_jax.data.batch import Batch
from emor3_jax.episode import Actor, Judgement, Replies, Scores
from emor3_jax.learner import LossOptions, ScoreOptions
from emor3_jax.models import Policy
from emor3_jax.parallel import hosts
from emor3_jax.rl.kl import adapt
from emor3_jax.rl.shaping import overlong
from emor3_jax.rl.update import make_optimizer
from emor3_jax.rollout.generate import Samples


def group_std(config: ConfigDict) -> str:
    """Returns which standard deviation of a group the profile divides by."""
    return "sample" if config.profile == "release" else "population"


def make_shaping(config: ConfigDict) -> Callable[[Scores, Samples], jax.Array]:
    """Returns a function from scores and responses to the rewards that advantages compare."""
    buffer, weight = config.reward.overlong, config.reward.overlong_weight
    if not buffer or not weight:
        return lambda scores, samples: scores.overall
    limit = config.rollout.max_tokens

    def shaped(scores: Scores, samples: Samples) -> jax.Array:
        return scores.overall + weight * overlong(samples.lengths, limit=limit, buffer=buffer)

    return jax.jit(shaped)


def make_kl_control(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Returns a function from coefficient and KL of a step to the coefficient of the next.

    None where the coefficient is fixed.
    """
    c = config.policy_update
    if not c.kl_target:
        return None
    responses = config.rollout.prompts * config.rollout.responses
    return jax.jit(partial(adapt, target=c.kl_target, responses=responses, horizon=c.kl_horizon))


def make_update(config: ConfigDict) -> tuple[optax.GradientTransformation, LossOptions]:
    """Returns the optimizer and the loss of `config.policy_update`."""
    c = config.policy_update
    updates = max(config.steps * (config.rollout.prompts // c.prompts), 1)
    final = c.learning_rate if c.schedule == "constant" else 0.0
    rate = optax.linear_schedule(c.learning_rate, final, max(updates - c.warmup_steps, 1))
    if c.warmup_steps:
        rise = optax.linear_schedule(
            c.learning_rate / c.warmup_steps, c.learning_rate, c.warmup_steps
        )
        rate = optax.join_schedules([rise, rate], [c.warmup_steps])

    def in_vision_tower(path: tuple) -> bool:
        return getattr(path[0], "key", None) == "visual"

    factors = c.rates.to_dict()

    def rate_of(path: tuple) -> float:
        return factors[_group(path)]

    optimizer = make_optimizer(
        rate,
        weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm,
        frozen=in_vision_tower if config.policy.freeze_vision_tower else None,
        rate_of=None if set(factors.values()) == {1.0} else rate_of,
    )
    return optimizer, LossOptions(
        c.clip_low,
        c.clip_high,
        c.clip_dual,
        c.kl_coef,
        c.mean,
        c.entropy,
        c.ratio,
        # In the reward it needs no estimate in the loss; the name would only compile anew.
        "k3" if c.kl == "off" else c.kl,
        config.rollout.max_tokens if c.mean == "constant" else None,
        c.mask_truncated,
    )


def _group(path: tuple) -> str:
    """Returns which of `policy_update.rates` a parameter belongs to."""
    keys = [getattr(part, "key", None) for part in path]
    if keys[0] == "visual":
        return "merger" if keys[1] == "merger" else "tower"
    return "embedding" if "embed_tokens" in keys or keys[0] == "lm_head" else "decoder"


def score_options(config: ConfigDict) -> ScoreOptions:
    """Returns how reference and update score responses."""
    return ScoreOptions(
        config.rollout.temperature,
        jnp.dtype(config.policy.dtype),
        config.policy_update.remat,
        config.policy_update.logprob_chunk,
    )


def make_meter(
    config: ConfigDict, policy: Policy, actor: Actor
) -> Callable[[Batch, np.ndarray, Replies | Judgement | None], float]:
    """Returns a function from what a step did to the FLOPs that the model needs for it.

    It takes this host's prompts as host arrays, and of all hosts the lengths of the responses
    int[B, G] and the replies.
    """
    parts = actor.coherence_parts, actor.consistency_parts

    def questions(replies: Replies | Judgement) -> Iterator[account.Question]:
        texts = replies.coherence_length, replies.consistency_length
        soft = isinstance(replies, Judgement)
        said = actor.candidates if soft else (replies.coherence, replies.consistency)
        for (head, tail), text, reply in zip(parts, texts, said, strict=True):
            yield account.Question(
                len(head),
                float(np.mean(text)),
                len(tail),
                float(np.mean(reply.lengths)),
                len(reply.lengths) if soft else 1,
            )

    def flops(batch: Batch, lengths: np.ndarray, replies: Replies | Judgement | None) -> float:
        asked = () if replies is None else questions(replies)
        shapes = account.shapes_of(batch, lengths, *asked)
        # Hosts hold as many rows each, so the mean over all rows is that of their means.
        names = "prompt_tokens", "patches", "shared_tokens"
        means = hosts.exchange([getattr(shapes, name) for name in names])
        shapes = shapes._replace(**dict(zip(names, np.mean(means, axis=0), strict=True)))
        recompute = config.policy_update.old_logprobs == "recompute"
        return account.step_flops(
            policy.config,
            shapes,
            reference=uses_reference(config),
            # As in all epochs but the first.
            kept=config.reference.image_cache > 0,
            old=recompute,
        )

    return flops
