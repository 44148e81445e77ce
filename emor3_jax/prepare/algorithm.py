"""From a config to the learner: optimizer, loss, reference, adapters; and to its FLOPs."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.config import ConfigError, uses_reference
from emor3_jax.flops import QuestionTokens, mean_judge_shapes, mean_shapes, step_flops
from emor3_jax.learner.gradients import UpdateSpec
from emor3_jax.learner.learner import Learner, StepSpec
from emor3_jax.learner.logprobs import LogprobSpec
from emor3_jax.learner.micro_batches import Buckets
from emor3_jax.learner.reference import FeatureCache, Reference
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import param_shardings
from emor3_jax.prepare.judge import judge_names, keeps_reference
from emor3_jax.prepare.policy import make_lora, trained_params
from emor3_jax.prepare.rollout import make_reward
from emor3_jax.rl import entropy
from emor3_jax.rl.correction import Correction
from emor3_jax.rl.entropy import EntropyBonus
from emor3_jax.rl.kl import adapt
from emor3_jax.rl.losses import ImitationLoss, PolicyLoss
from emor3_jax.rl.selection import Selection
from emor3_jax.rl.surrogates import SURROGATES, Surrogate
from emor3_jax.rl.update import Frozen, TrainState, make_optimizer
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.rollout.tokens import suppressed_tokens
from emor3_jax.types import Observed, ReplyProbs


def make_learner(
    config: ConfigDict, loaded: LoadedPolicy, mesh: Mesh, *, imitate: bool = False
) -> tuple[Learner, TrainState]:
    """Returns the learner and the state before the first update.

    Args:
      config: of the run.
      loaded: the policy that training starts from.
      mesh: of the devices.
      imitate: supervised fine-tuning, which has no reference.

    Raises:
      ConfigError: if a rate of `policy_update.rates` is of parameters that are not trained.
    """
    lora = make_lora(config, loaded.params)
    asked = judge_names(config)[1] == "reference"
    # Fine-tuning has no KL, but its evaluations may ask what it started from.
    kept = asked if imitate else keeps_reference(config)
    reference = make_reference(config, loaded) if kept else Reference({}, "none")
    trained = trained_params(config, loaded.params)
    _check_rates(config, trained, loaded.policy.shapes.vision.mergers)
    if lora is not None:
        trained = jax.device_put(jax.device_get(trained), param_shardings(trained, mesh))
    if reference.params is trained:
        # The state is donated to each update, so it starts as a copy of what the reference keeps.
        trained = jax.tree.map(jnp.copy, trained)
    learner = Learner(
        make_update_spec(config, loaded.policy, imitate=imitate),
        make_step_spec(config, imitate=imitate),
        mesh,
        suppressed_tokens(loaded.shapes.vocab_size, loaded.processor.tokenizer),
        reference=reference,
        lora=lora,
    )
    return learner, learner.init(trained)


def make_reference(config: ConfigDict, loaded: LoadedPolicy) -> Reference:
    """Returns the reference of a run that starts from a policy; without a KL it keeps nothing."""
    cache, settings = None, reference_settings(config)
    if config.reference.image_cache and settings["kind"] != "none":
        micro_prompts = config.policy_update.micro_prompts
        cache = FeatureCache(loaded.policy, config.reference.image_cache, micro_prompts)
    return Reference(loaded.params, cache=cache, **settings)


def reference_settings(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `Reference` that the config names."""
    c = config.reference
    if not keeps_reference(config):
        return {"kind": "none"}
    # Rounded as each use of it would be; but an average would not move any more, and adapters
    # share their base.
    whole = c.kind == "average" or config.policy.lora_rank
    dtype = c.dtype or ("float32" if whole else config.policy.dtype)
    return {"kind": c.kind, "every": c.every, "decay": c.decay, "dtype": jnp.dtype(dtype)}


def make_update_spec(config: ConfigDict, policy: Policy, *, imitate: bool = False) -> UpdateSpec:
    """Returns the settings of an update; `imitate` takes the loss of supervised fine-tuning."""
    c = config.policy_update
    temperature = 1.0 if imitate else config.rollout.temperature
    return UpdateSpec(
        policy.with_compute(remat=c.remat),
        make_optimizer_of(config, policy.shapes.vision.mergers),
        make_loss(config, imitate=imitate),
        LogprobSpec(temperature, c.logprob_chunk),
        c.kl_coef,
        frozen_params(config),
        c.entropy_coef,
    )


def frozen_params(config: ConfigDict) -> Frozen | None:
    """Returns which of the trained parameters stay as they are; None if none does."""
    return _in_vision_tower if config.policy.freeze_vision_tower else None


def _in_vision_tower(path: tuple) -> bool:
    return getattr(path[0], "key", None) == "visual"


def make_loss(config: ConfigDict, *, imitate: bool = False) -> PolicyLoss | ImitationLoss:
    """Returns the loss of `config.policy_update`, or that of supervised fine-tuning."""
    c = config.policy_update
    limit = config.rollout.max_tokens if c.mean == "constant" else None
    if imitate:
        return ImitationLoss(
            mean=c.mean, limit=limit, mask_truncated=c.mask_truncated, entropy=c.entropy
        )
    return PolicyLoss(
        surrogate=make_surrogate(config),
        # In the reward it needs no estimate in the loss.
        kl=c.kl if uses_reference(config) and c.kl_place == "loss" else "off",
        mean=c.mean,
        limit=limit,
        mask_truncated=c.mask_truncated,
        mask_equal=c.mask_equal,
        entropy=c.entropy or uses_entropy(config),
        kl_ratio=c.kl_ratio,
        correction=make_correction(config),
        off_policy=c.off_policy,
        selection=make_selection(config),
    )


def make_surrogate(config: ConfigDict) -> Surrogate:
    """Returns the surrogate of `config.policy_update`."""
    c = config.policy_update
    settings = {
        "clip_low": c.clip_low,
        "clip_high": c.clip_high,
        "clip_dual": c.clip_dual,
        "sapo_positive": c.sapo_positive,
        "sapo_negative": c.sapo_negative,
    }
    kind = SURROGATES[c.surrogate]
    return kind(*(settings[field] for field in kind.fields))


def make_correction(config: ConfigDict) -> Correction | None:
    """Returns the correction of the sampler's mismatch, or None."""
    c = config.policy_update
    if c.correction == "off":
        return None
    return Correction(c.correction, c.correction_low, c.correction_high)


def make_selection(config: ConfigDict) -> Selection | None:
    """Returns the selection of tokens, or None."""
    c = config.policy_update
    if c.select == "all":
        return None
    return Selection(c.select, c.select_share, c.select_low, c.select_high, c.select_coef)


def uses_entropy(config: ConfigDict) -> bool:
    """Returns whether the loss has an entropy bonus."""
    return config.policy_update.entropy_coef > 0 or config.policy_update.entropy_target > 0


def make_step_spec(config: ConfigDict, *, imitate: bool = False) -> StepSpec:
    """Returns the settings of a step around its updates."""
    c = config.policy_update
    num_updates = config.rollout.prompts // c.prompts
    prompt, windows = config.data.prompt_lengths, config.data.image_windows
    common = (
        num_updates,
        c.micro_prompts,
        Buckets(tuple(prompt), tuple(windows), tuple(c.response_lengths)),
        c.pack,
        c.balance,
    )
    if imitate:
        return StepSpec(*common)
    return StepSpec(
        *common,
        advantage=c.advantage,
        std="sample" if config.profile == "release" else "population",
        weights=tuple(make_reward(config).weights(config.reflect.enabled).items()),
        use_reference=uses_reference(config),
        recompute=c.old_logprobs == "recompute",
        kl_penalty=c.kl if c.kl_place == "reward" else "",
        adapt_kl=make_kl_control(config),
        adapt_entropy=make_entropy_control(config),
    )


def make_kl_control(
    config: ConfigDict,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """Returns `rl.kl.adapt` with the settings of a config; None where the coefficient is fixed."""
    c = config.policy_update
    if not c.kl_target:
        return None
    responses = config.rollout.prompts * config.rollout.responses
    return jax.jit(partial(adapt, target=c.kl_target, responses=responses, horizon=c.kl_horizon))


def make_entropy_control(
    config: ConfigDict,
) -> Callable[[EntropyBonus, jax.Array, jax.Array], EntropyBonus] | None:
    """Returns `rl.entropy.adapt` with the settings of a config; None where the weight is fixed."""
    c = config.policy_update
    if not c.entropy_target:
        return None
    how = {"target": c.entropy_target, "delta": c.entropy_delta, "most": c.entropy_most}
    return jax.jit(partial(entropy.adapt, **how))


def make_optimizer_of(config: ConfigDict, mergers: tuple[str, ...]) -> optax.GradientTransformation:
    """Returns the optimizer of `config.policy_update`.

    Args:
      config: of the run.
      mergers: modules of the policy's tower, see `VisionShapes.mergers`.
    """
    c = config.policy_update
    updates = max(config.steps * (config.rollout.prompts // c.prompts), 1)
    final = c.learning_rate if c.schedule == "constant" else 0.0
    return _find_optimizer(
        (c.learning_rate, final, max(updates - c.warmup_steps, 1)),
        c.warmup_steps,
        tuple(c.rates.to_dict().items()),
        mergers,
        weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm,
        mu_dtype=c.mu_dtype,
        frozen=frozen_params(config),
    )


# Equal settings are one object, so that a second run of a process compiles nothing anew.
@cache
def _find_optimizer(
    decay: tuple[float, float, int],
    warmup: int,
    rates: tuple[tuple[str, float], ...],
    mergers: tuple[str, ...],
    **settings: Any,
) -> optax.GradientTransformation:
    rate = optax.linear_schedule(*decay)
    if warmup:
        rise = optax.linear_schedule(decay[0] / warmup, decay[0], warmup)
        rate = optax.join_schedules([rise, rate], [warmup])

    factors = dict(rates)

    def rate_of(path: tuple) -> float:
        return factors[_group(path, mergers)]

    even = set(factors.values()) == {1.0}
    return make_optimizer(rate, rate_of=None if even else rate_of, **settings)


def _check_rates(config: ConfigDict, trained: dict, mergers: tuple[str, ...]) -> None:
    """Refuses a rate that no trained parameter has; which have it depends on the family."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    groups = {_group(path, mergers) for path in paths}
    for name, rate in config.policy_update.rates.items():
        if rate != 1 and name not in groups:
            modules = tuple(config.policy.lora_modules)
            rule = f"is of no parameter that policy.lora_modules={modules!r} trains; leave it at 1"
            raise ConfigError(f"policy_update.rates.{name}", rate, rule)


def _group(path: tuple, mergers: tuple[str, ...]) -> str:
    """Returns the field of `policy_update.rates` that holds for the parameter at a key path."""
    keys = [getattr(part, "key", None) for part in path]
    if keys[0] == "visual":
        return "merger" if keys[1] in mergers else "tower"
    return "embedding" if "embed_tokens" in keys or keys[0] == "lm_head" else "decoder"


def make_meter(
    config: ConfigDict, rollout: Rollout, judge: Policy | None = None
) -> Callable[[Observed], float]:
    """Returns a function from the arrays of a step to the FLOPs that the model needs for it.

    Args:
      config: of the run.
      rollout: of its steps.
      judge: who is asked; None is the policy itself.
    """

    def questions(replies: object) -> Iterator[tuple[str, QuestionTokens]]:
        for prompted in rollout.reflection.questions:
            name, candidates = prompted.question.name, prompted.candidates
            soft = isinstance(replies, ReplyProbs)
            lengths = candidates.lengths if soft else replies.samples[name].lengths
            yield (
                name,
                QuestionTokens(
                    len(prompted.head),
                    float(np.mean(replies.lengths[name])),
                    len(prompted.tail),
                    float(np.mean(lengths)),
                    len(lengths) if soft else 1,
                    prompted.question.with_image,
                ),
            )

    def flops(observed: Observed) -> float:
        # On the host: else a mean would wait behind the running update.
        replies = jax.device_get(observed.experience.replies)
        asked = {} if replies is None else dict(questions(replies))
        shapes = mean_shapes(observed.batch, observed.lengths, asked)
        # Hosts hold as many rows each, so the mean over all rows is that of their means.
        names = "prompt_tokens", "patches", "shared_tokens"
        shapes = _mean_over_hosts(shapes, names)
        if judge is not None and asked:
            seen = mean_judge_shapes(config.reflect.judge, judge.shapes, observed.batch)
            seen = _mean_over_hosts(seen, ("tokens", "patches", "shared_tokens"))
            shapes = shapes._replace(judge=seen)
        recompute = config.policy_update.old_logprobs == "recompute"
        return step_flops(
            rollout.policy.shapes,
            shapes,
            reference=uses_reference(config),
            # As in all epochs but the first.
            kept=config.reference.image_cache > 0,
            old=recompute,
            frozen_tower=config.policy.freeze_vision_tower,
        )

    return flops


def _mean_over_hosts(shapes: Any, names: tuple[str, ...]) -> Any:
    """Returns a named tuple with the means of some of its fields over all hosts."""
    means = hosts.exchange([getattr(shapes, name) for name in names])
    return shapes._replace(**dict(zip(names, np.mean(means, axis=0), strict=True)))
