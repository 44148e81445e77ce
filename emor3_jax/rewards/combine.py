"""From readings to scores, and from scores to the reward, in both profiles (docs/method.md)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from emor3_jax.rewards.rules import NO_REPLY

PROFILES = ("paper", "release")


def check_profile(profile: str) -> None:
    """Raises ValueError if `profile` is not one of `PROFILES`."""
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}: must be one of {PROFILES}")


def graded_accuracy(answer: jax.Array, grades: jax.Array) -> jax.Array:
    """Returns the accuracy of each answer, float32[B, G].

    With grades of 1 for the true label and 0 for the others this is the method's accuracy.

    Args:
      answer: int32[B, G], index of the boxed label; a negative one is worth 0.
      grades: float32[B, K], the accuracy of each label for each prompt, in [0, 1].
    """
    chosen = answer[..., None] == jnp.arange(grades.shape[-1])
    return jnp.sum(jnp.where(chosen, grades[:, None], 0.0), axis=-1)


def coherence_score(
    reply_label: jax.Array, target: jax.Array, found: jax.Array, profile: str
) -> jax.Array:
    """Returns R_coh, float32[...]: 1 if the reply is the target label.

    Args:
      reply_label: int32[...], as `read_reply` gives it.
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
      yes_no: int32[...], as `read_reply` gives it.
      found: bool[...], whether there was a text to judge. Where there was none, the score is 0: by
        the paper's rule, and because the release's stand-in "None" contains `no`.
      profile: "paper" or "release".
    """
    check_profile(profile)
    neither = 0.5 if profile == "release" else 0.0
    score = jnp.where(yes_no == 1, 1.0, jnp.where(yes_no == 0, 0.0, neither))
    return jnp.where(found, score, 0.0)


def coherence_probability(
    probs: jax.Array, target: jax.Array, found: jax.Array, profile: str
) -> jax.Array:
    """Returns R_coh, float32[...], from reflection probabilities: that of the target label.

    Not part of the method: the mean score of sampled replies that are a label, at temperature 1.

    Args:
      probs: float32[..., K], of each label among all.
      target, found, profile: as in `coherence_score`.
    """
    check_profile(profile)
    chosen = jnp.arange(probs.shape[-1]) == target[..., None]
    likely = jnp.sum(jnp.where(chosen, probs, 0.0), axis=-1)
    return jnp.where(found, likely, 0.5 if profile == "release" else 0.0)


def consistency_probability(probs: jax.Array, found: jax.Array, profile: str) -> jax.Array:
    """Returns R_cons, float32[...], from reflection probabilities: that of yes beside no.

    Args:
      probs: float32[..., 2], of yes and no.
      found, profile: as in `consistency_score`.
    """
    check_profile(profile)
    return jnp.where(found, probs[..., 0], 0.0)


def combine(
    format: jax.Array,
    accuracy: jax.Array,
    reflections: Sequence[jax.Array],
    *,
    profile: str,
    lambda_reflect: float = 0.1,
    lambda_format: float = 0.1,
    reflect: bool = True,
) -> jax.Array:
    """Returns the reward, float32[...].

    Paper: `(1 - λ1 - λ2) accuracy + λ1 mean(reflections) + λ2 format`; without reflection λ1 goes
    back to accuracy. Release: `0.8 accuracy + 0.1 (coherence + consistency) + 0.1 format` at its
    weights; without reflection both scores count as 1.

    Args:
      format, accuracy: float32[...] in [0, 1].
      reflections: likewise, the score of each question.
      profile: "paper" or "release".
      lambda_reflect: λ1.
      lambda_format: λ2.
      reflect: the questions were asked.
    """
    check_profile(profile)
    base = (1 - lambda_reflect - lambda_format) * accuracy + lambda_format * format
    if profile == "paper":
        if not reflect:
            return base + lambda_reflect * accuracy
        return base + lambda_reflect * sum(reflections[1:], reflections[0]) / len(reflections)
    if not reflect:
        return base + len(reflections) * lambda_reflect
    return base + lambda_reflect * sum(reflections[1:], reflections[0])
