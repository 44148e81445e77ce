"""Rules for the choices that make an algorithm, and for what is trained and measured from where."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from emor3_jax.config import EMBEDDED, uses_reference
from emor3_jax.data.prompts import PLAIN_STYLES
from emor3_jax.models import is_hub_id
from emor3_jax.models.lora import TOWER
from emor3_jax.prepare.algorithm import make_surrogate
from emor3_jax.prepare.judge import judge_names
from emor3_jax.prepare.rollout import make_reward
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rl.advantages import ESTIMATORS
from emor3_jax.rl.correction import CORRECTIONS
from emor3_jax.rl.kl import ESTIMATES
from emor3_jax.rl.losses import MEANS
from emor3_jax.rl.selection import SELECTIONS
from emor3_jax.rl.surrogates import SURROGATES

Need = Callable[[bool, str, str], None]
"""Raises ConfigError unless a condition holds: takes it, the field, and the rule."""


def check_algorithm(config: ConfigDict, need: Need) -> None:
    """Checks the choices that make an algorithm, and that they go together."""
    update, responses = config.policy_update, config.rollout.responses
    choices = {
        "policy_update.advantage": (update.advantage, tuple(ESTIMATORS)),
        "policy_update.surrogate": (update.surrogate, tuple(SURROGATES)),
        "policy_update.correction": (update.correction, ("off", *CORRECTIONS)),
        "policy_update.select": (update.select, ("all", *SELECTIONS)),
        "policy_update.mean": (update.mean, MEANS),
        "policy_update.kl": (update.kl, (*ESTIMATES, "off")),
        "policy_update.kl_place": (update.kl_place, ("loss", "reward")),
        "reward.format": (config.reward.format, ("set", "boxed")),
        "reward.reflection": (config.reward.reflection, ("both", *QUESTIONS)),
    }
    for field, (value, known) in choices.items():
        need(value in known, field, f"must be one of {', '.join(map(repr, known))}")

    conflict = make_surrogate(config).conflict(update.mean)
    need(conflict is None, "policy_update.surrogate", conflict or "")
    _check_tokens(config, need)
    need(
        not update.kl_target or uses_reference(config),
        "policy_update.kl_target",
        f"needs a KL, but policy_update.kl={update.kl!r} and policy_update.kl_coef="
        f"{update.kl_coef}; choose an estimate and a weight to start from, or a target of 0",
    )
    # The controller's factor must stay over 0.
    need(
        not update.kl_target or config.rollout.prompts * responses <= update.kl_horizon,
        "policy_update.kl_horizon",
        f"must be at least the {config.rollout.prompts * responses} responses of a step "
        "(rollout.prompts * rollout.responses)",
    )
    need(
        update.kl != "k1" or update.kl_place == "reward" or update.kl_ratio,
        "policy_update.kl",
        "has a gradient that knows nothing of the reference, so that policy_update.kl_place='loss' "
        "is of no use; set the place to 'reward', policy_update.kl_ratio to True, or the estimate "
        "to 'k2', 'k3' or 'abs'",
    )

    reward, limit = config.reward, config.rollout.max_tokens
    rule = f"must be 0 (none) to rollout.max_tokens={limit}"
    need(0 <= reward.overlong <= limit, "reward.overlong", rule)
    need(
        config.reflect.enabled or reward.reflection == "both",
        "reward.reflection",
        "chooses among reflections that reflect.enabled=False does not ask; enable them, or set "
        "this to 'both'",
    )
    plain = config.data.templates.set in PLAIN_STYLES
    need(
        not plain or not config.reflect.enabled,
        "data.templates.set",
        "asks for no steps to reflect on, but reflect.enabled=True; set it to false",
    )
    need(
        not plain or reward.format == "boxed" or not reward.lambda_format,
        "data.templates.set",
        "asks for no steps, which reward.format='set' looks for; set it to 'boxed', or "
        "reward.lambda_format to 0",
    )
    targets = ("label", "response")
    need(config.sft.target in targets, "sft.target", f"must be one of {targets}")


def _check_tokens(config: ConfigDict, need: Need) -> None:
    """Checks what weighs, masks and selects tokens, and what advantages read."""
    update = config.policy_update
    recomputed = update.old_logprobs == "recompute"
    need(
        update.correction == "off" or recomputed,
        "policy_update.correction",
        "weighs the learner's log-probabilities against the sampler's, but "
        "policy_update.old_logprobs='sampler' has the sampler's alone; set that to 'recompute', or "
        "the correction to 'off'",
    )
    need(
        update.correction_low < update.correction_high,
        "policy_update.correction_low",
        f"must be under policy_update.correction_high={update.correction_high}",
    )
    need(update.select_share <= 1, "policy_update.select_share", "must lie in (0, 1]")
    need(
        update.select_low < update.select_high,
        "policy_update.select_low",
        f"must be under policy_update.select_high={update.select_high}",
    )
    per_token = SURROGATES[update.surrogate].per_token
    need(
        update.select == "all" or per_token,
        "policy_update.select",
        f"leaves out tokens, but policy_update.surrogate={update.surrogate!r} has one loss for all "
        "tokens of a response; take 'clip', 'cispo', 'sapo' or another with a loss per token",
    )
    need(
        update.select != "top_entropy" or recomputed,
        "policy_update.select",
        "needs the entropy of each distribution, which the sampler does not record; set "
        "policy_update.old_logprobs to 'recompute'",
    )
    need(
        not update.kl_ratio or (uses_reference(config) and update.kl_place == "loss"),
        "policy_update.kl_ratio",
        f"multiplies a KL of the loss, but policy_update.kl={update.kl!r}, policy_update.kl_coef="
        f"{update.kl_coef} and policy_update.kl_place={update.kl_place!r} have none there",
    )
    need(
        update.entropy_coef <= update.entropy_most or not update.entropy_target,
        "policy_update.entropy_coef",
        f"must be at most policy_update.entropy_most={update.entropy_most}, within which it adapts",
    )
    _check_advantage(config, need)


def _check_advantage(config: ConfigDict, need: Need) -> None:
    """Checks that the advantage has the rewards that it is meant for."""
    update, reward = config.policy_update, config.reward
    estimator = ESTIMATORS[update.advantage]
    need(
        estimator.equal_is_zero or not update.mask_equal,
        "policy_update.mask_equal",
        "leaves out groups whose rewards are all equal, but policy_update.advantage="
        f"{update.advantage!r} gives such groups one too; set it to False, or the advantage to "
        "'grpo'",
    )
    need(
        not config.rollout.resample or config.rollout.responses > 1 or estimator.greedy,
        "rollout.resample",
        "replaces groups with nothing to compare, which is every group where "
        f"rollout.responses={config.rollout.responses}; set it to 0, or raise rollout.responses",
    )
    penalised = bool(reward.overlong and reward.overlong_weight)
    in_reward = update.kl_place == "reward" and uses_reference(config)
    if not estimator.negative:
        rule = "measures rewards by their mean, which must not be negative, but "
        fields = {
            f"reward.overlong={reward.overlong} is taken off them; set it to 0": penalised,
            "policy_update.kl_place='reward' takes the KL off them; set it to 'loss'": in_reward,
        }
        for name, term in reward.terms.items():
            taken = f"reward.terms.{name}.weight={term.weight} takes a term off them; leave it out"
            fields[taken] = term.weight < 0
        for taken, used in fields.items():
            need(not used, "policy_update.advantage", f"{rule}{taken}, or take another advantage")
    if not estimator.terms:
        return
    weights = make_reward(config).weights(config.reflect.enabled)
    named = [name for name, weight in weights.items() if weight]
    need(
        len(named) >= 2,
        "policy_update.advantage",
        f"normalises each reward term by itself, but {', '.join(named) or 'none'} alone has a "
        "weight; give another term one, or take 'reinforce_pp_baseline', which is the same for one",
    )
    need(
        not penalised,
        "policy_update.advantage",
        f"normalises each reward term by itself, but reward.overlong={reward.overlong} is taken "
        "off their sum; set it to 0, or take another advantage",
    )
    need(
        not in_reward,
        "policy_update.advantage",
        "normalises each reward term by itself, but policy_update.kl_place='reward' takes the KL "
        "off their sum; set it to 'loss', or take another advantage",
    )


def check_comparison(config: ConfigDict, need: Need) -> None:
    """Checks that there are responses to compare: else all advantages are 0."""
    name, rollout = config.policy_update.advantage, config.rollout
    need(
        config.profile != "release" or rollout.responses >= 2,
        "rollout.responses",
        "profile='release' divides by the sample standard deviation and needs at least 2",
    )
    least = ESTIMATORS[name].responses
    need(
        rollout.responses >= least,
        "policy_update.advantage",
        f"compares the responses of a group and needs at least {least}, but rollout.responses="
        f"{rollout.responses}; raise it, or take 'reinforce_pp' or 'remax'",
    )
    need(
        ESTIMATORS[name].greedy or rollout.prompts * rollout.responses >= 2,
        "rollout.prompts",
        f"policy_update.advantage={name!r} compares the responses of a step, but there is one; "
        "raise it, or rollout.responses",
    )


def _untrained_groups(policy: ConfigDict) -> dict[str, str]:
    """Returns group of `policy_update.rates` → the field by which it is not trained.

    Which modules are a merger's depends on the family: with an adapter in the tower, the mergers
    count as trained.
    """
    found = {}
    if policy.lora_rank:
        of_tower = [str(name).startswith(TOWER) for name in policy.lora_modules]
        trained = {"decoder": not all(of_tower), "tower": any(of_tower), "merger": any(of_tower)}
        adapted = f"policy.lora_modules={tuple(policy.lora_modules)!r}"
        groups = ("embedding", *(name for name, is_trained in trained.items() if not is_trained))
        found = dict.fromkeys(groups, adapted)
    if policy.freeze_vision_tower:
        found |= dict.fromkeys(("tower", "merger"), "policy.freeze_vision_tower=True")
    return found


def check_reference(config: ConfigDict, need: Need) -> None:
    """Checks what is trained, by which rates, and from where the KL is measured."""
    policy, reference = config.policy, config.reference
    untrained = _untrained_groups(policy)
    for name, rate in config.policy_update.rates.items():
        rule = "must be over 0; policy.freeze_vision_tower freezes the tower"
        need(rate > 0, f"policy_update.rates.{name}", rule)
        rule = f"is of parameters that are not trained ({untrained.get(name)}); leave it at 1"
        need(rate == 1 or name not in untrained, f"policy_update.rates.{name}", rule)
    need(
        not policy.lora_rank or bool(policy.lora_modules),
        "policy.lora_rank",
        "needs modules to adapt, but policy.lora_modules=()",
    )
    names = all(isinstance(name, str) for name in policy.lora_modules)
    need(names, "policy.lora_modules", "must be names, such as 'q_proj' or 'visual/qkv'")
    tower = [name for name in policy.lora_modules if name.startswith(TOWER)]
    need(
        not (policy.lora_rank and policy.freeze_vision_tower and tower),
        "policy.lora_modules",
        f"names {tower[:1]} of the vision tower, but policy.freeze_vision_tower=True",
    )
    kinds = ("frozen", "refresh", "average", "none")
    need(reference.kind in kinds, "reference.kind", f"must be one of {kinds}")
    judges = dict(zip(("reflect.judge", "evaluate.judge"), judge_names(config), strict=True))
    for field, judge in judges.items():
        need(
            judge != "reference" or reference.kind != "none",
            field,
            "is 'reference', but reference.kind='none' keeps none; set the kind to 'frozen', or "
            "name another judge",
        )
        path = Path(judge)
        known = judge in ("policy", "reference", EMBEDDED) or (path / "config.json").is_file()
        need(
            known or (not path.exists() and is_hub_id(judge)),
            field,
            "must be 'policy', 'reference', 'embedded' (the base policy), a Hugging Face folder "
            "with a config.json, or an id on the hub ('owner/name')",
        )
    need(
        reference.kind != "none" or not uses_reference(config),
        "reference.kind",
        f"leaves nothing to measure policy_update.kl={config.policy_update.kl!r} from; set that to "
        "'off', or the kind to 'frozen'",
    )
    follows = reference.kind in ("refresh", "average")
    need(
        not follows or not policy.lora_rank,
        "reference.kind",
        f"would need weights of its own, but with policy.lora_rank={policy.lora_rank} the "
        "reference is the base without adapters; set the kind to 'frozen'",
    )
    need(0 <= reference.decay < 1, "reference.decay", "must lie in [0, 1)")
    dtypes = ("", "float32", "bfloat16")
    need(reference.dtype in dtypes, "reference.dtype", f"must be one of {dtypes}")
    need(
        reference.kind != "average" or reference.dtype != "bfloat16",
        "reference.dtype",
        "would round away the small steps of reference.kind='average'; keep it in float32",
    )
    need(
        not policy.lora_rank or reference.dtype != "bfloat16",
        "reference.dtype",
        f"would be a second copy of the base that policy.lora_rank={policy.lora_rank} shares; set "
        "it to 'float32'",
    )
    need(
        not reference.image_cache or not follows or policy.freeze_vision_tower,
        "reference.image_cache",
        f"needs a tower that does not change, but reference.kind={reference.kind!r} follows a "
        "policy with policy.freeze_vision_tower=False; set it to 0, or freeze the tower",
    )
