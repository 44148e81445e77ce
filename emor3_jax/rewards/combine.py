"""From readings to scores, and from scores to the reward, in both profiles (METHOD, "Rewards")."""

import jax
import jax.numpy as jnp

from emor3_jax.rewards.rules import NO_REPLY

PROFILES = ("paper", "release")


def check_profile(profile: str) -> None:
    """Raises ValueError if `profile` is not one of `PROFILES`."""
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}: must be one of {PROFILES}")


def graded_accuracy(answer: jax.Array, grades: jax.Array) -> jax.Array:
    """Returns what each answer is worth, float32[B, G].

    With grades of 1 for the true label and 0 for the others this is the method's accuracy.

    Args:
      answer: int32[B, G], index of the boxed label; a negative one is worth 0.
      grades: float32[B, K], what each label is worth for each prompt, in [0, 1].
    """
    chosen = answer[..., None] == jnp.arange(grades.shape[-1])
    return jnp.sum(jnp.where(chosen, grades[:, None], 0.0), axis=-1)


def coherence_score(
    reply_label: jax.Array, target: jax.Array, found: jax.Array, profile: str
) -> jax.Array:
    """Returns R_coh, float32[...]: 1 if the reply is the target label.

    Args:
      reply_label: int32[...], as `read_label` gives it.
      target: int32[...], index of the wanted label; negative: none can be right.
      found: bool[...], whether there was a text to judge. Where there was none, the paper's score
        is 0; the release asks for the reply "None", which scores 0.5.
      profile: "paper" or "release"; the release gives an empty reply or `none` 0.5.
    """
    check_profile(profile)
    score = ((reply_label == target) & (target >= 0)).astype(jnp.float32)
    if profile == "paper":
        return jnp.where(found, score, 0.0)
    return jnp.where(found & (reply_label != NO_REPLY), score, 0.5)


def consistency_score(yes_no: jax.Array, found: jax.Array, profile: str) -> jax.Array:
    """Returns R_cons, float32[...]: 1 for yes, 0 for no, else 0 (paper) or 0.5 (release).

    Args:
      yes_no: int32[...], as `read_yes_no` gives it.
      found: bool[...], whether there was a text to judge. Where there was none, the score is 0: by
        the paper's rule, and because the release's stand-in "None" contains `no`.
      profile: "paper" or "release".
    """
    check_profile(profile)
    neither = 0.5 if profile == "release" else 0.0
    score = jnp.where(yes_no == 1, 1.0, jnp.where(yes_no == 0, 0.0, neither))
    return jnp.where(found, score, 0.0)


def soft_scores(
    labels: jax.Array,
    yes: jax.Array,
    target: jax.Array,
    coherence_found: jax.Array,
    consistency_found: jax.Array,
    profile: str,
) -> tuple[jax.Array, jax.Array]:
    """Returns R_coh and R_cons, float32[...], from probabilities instead of replies.

    Not part of the method: coherence is the target's probability among the labels, consistency that
    of yes beside no. They are what the scores of sampled replies are in the mean over replies that
    are a label, or yes or no, at temperature 1. Where there was no text to judge, as for replies.

    Args:
      labels: float32[..., K].
      yes: float32[...].
      target: int32[...], index of the wanted label; negative: none can be right.
      coherence_found, consistency_found: bool[...], whether there was a text to judge.
      profile: "paper" or "release".
    """
    check_profile(profile)
    chosen = jnp.arange(labels.shape[-1]) == target[..., None]
    likely = jnp.sum(jnp.where(chosen, labels, 0.0), axis=-1)
    missing = 0.5 if profile == "release" else 0.0
    return (
        jnp.where(coherence_found, likely, missing),
        jnp.where(consistency_found, yes, 0.0),
    )


def combine(
    format: jax.Array,
    accuracy: jax.Array,
    coherence: jax.Array,
    consistency: jax.Array,
    *,
    profile: str,
    lambda_reflect: float = 0.1,
    lambda_format: float = 0.1,
    reflect: bool = True,
) -> jax.Array:
    """Returns the reward, float32[...].

    Paper: `(1 - λ1 - λ2) accuracy + λ1 (coherence + consistency) / 2 + λ2 format`; without
    reflection λ1 goes back to accuracy. Release: `0.8 accuracy + 0.1 (coherence + consistency) +
    0.1 format` at its weights; without reflection both scores count as 1.

    Args:
      format, accuracy, coherence, consistency: float32[...] in [0, 1].
      profile: "paper" or "release".
      lambda_reflect: λ1.
      lambda_format: λ2.
      reflect: whether the two questions were asked.
    """
    check_profile(profile)
    base = (1 - lambda_reflect - lambda_format) * accuracy + lambda_format * format
    if profile == "paper":
        if not reflect:
            return base + lambda_reflect * accuracy
        return base + lambda_reflect * (coherence + consistency) / 2
    if not reflect:
        return base + 2 * lambda_reflect
    return base + lambda_reflect * (coherence + consistency)
