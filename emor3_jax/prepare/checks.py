"""Rules for the values of a config and their combinations, checked before any compile."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.config import (
    EMBEDDED,
    ConfigError,
    check_numbers,
    dataset,
    default,
    field_value,
    no_field,
    reward_term,
    reward_terms,
)
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import label_set
from emor3_jax.files import is_file, is_folder, is_utf8
from emor3_jax.io.sinks import SINKS, missing_library
from emor3_jax.models import FAMILIES, is_hub_id
from emor3_jax.models.attention import BACKENDS, DECODE_BACKENDS
from emor3_jax.models.decode_attention import BLOCK
from emor3_jax.models.images import MOST_DECODED_PIXELS
from emor3_jax.parallel.mesh import check_batch
from emor3_jax.prepare.algorithm_checks import check_algorithm, check_comparison, check_reference
from emor3_jax.prepare.data import PARQUET_LABELS, data_sets
from emor3_jax.prepare.profile import evaluation_sampling
from emor3_jax.prepare.sources import check_kind

_AT_LEAST = {
    "steps": 0,
    "seed": 0,
    "policy.lora_rank": 0,
    "data.min_pixels": 0,
    "data.max_pixels": 0,
    "data.max_decoded_pixels": 1,
    "data.workers": 0,
    "data.read_ahead": 1,
    "rollout.prompts": 1,
    "rollout.responses": 1,
    "rollout.max_tokens": 1,
    "rollout.slots": 0,
    "rollout.refill": 0,
    "rollout.lanes": 0,
    "rollout.block": 1,
    "rollout.halvings": 0,
    "rollout.resample": 0,
    "rollout.temperature": 0,
    "reflect.temperature": 0,
    "reflect.max_tokens": 0,
    "reward.overlong_weight": 0,
    "policy_update.warmup_steps": 0,
    "policy_update.weight_decay": 0,
    "policy_update.clip_high": 0,
    "policy_update.kl_coef": 0,
    "policy_update.kl_target": 0,
    "policy_update.off_policy": 0,
    "policy_update.correction_low": 0,
    "policy_update.select_low": 0,
    "policy_update.select_coef": 0,
    "policy_update.entropy_coef": 0,
    "policy_update.entropy_target": 0,
    "policy_update.entropy_delta": 0,
    "policy_update.entropy_most": 0,
    "policy_update.logprob_chunk": 1,
    "reference.every": 1,
    "reference.image_cache": 0,
    "sft.responses": 1,
    "evaluate.before": -1,
    "evaluate.every": 1,
    "evaluate.during": 1,
    "evaluate.prompts": 1,
    "evaluate.slots": 0,
    "evaluate.refill": 0,
    "evaluate.lanes": 0,
    "evaluate.votes": 1,
    "evaluate.temperature": -1,
    "checkpoint.every": 1,
    "checkpoint.minutes": 0,
    "checkpoint.keep": 1,
    "checkpoint.stop_seconds": 0,
    "log.every": 1,
    "log.samples_every": 1,
    "log.profile_steps": 0,
    "guard.warn_after": 0,
    "guard.stop_after": 0,
    "guard.max_kl": 0,
}
"""Field → the least that it may be."""

_OVER_0 = (
    "rollout.temperature",
    "policy.lora_alpha",
    "policy_update.learning_rate",
    "policy_update.max_grad_norm",
    "policy_update.kl_horizon",
    "policy_update.sapo_positive",
    "policy_update.sapo_negative",
    "policy_update.correction_high",
    "policy_update.select_high",
    "policy_update.select_share",
)

_NO_BOUND = tuple(
    f"policy_update.{key}"
    for key in (
        *("clip_high", "clip_dual", "max_grad_norm", "off_policy", "correction_high"),
        "select_high",
    )
)
"""Fields that may be infinite: then they clip nothing."""


def validate(config: ConfigDict, *, imitate: bool = False) -> None:
    """Checks what can be checked without loading anything, before any compile.

    Args:
      config: of the run.
      imitate: supervised fine-tuning, which samples nothing and compares nothing.

    Raises:
      ConfigError: naming the field, its value, the rule and the way out.
      DataError: naming the data set whose labels are none.
      UserError: if a field is missing.
    """

    def need(ok: bool, field: str, rule: str) -> None:
        if not ok:
            raise ConfigError(field, field_value(config, field), rule)

    _check_types(config, default(), "")
    check_numbers(config, _AT_LEAST, _OVER_0, _NO_BOUND)
    need(config.seed < 2**32, "seed", "must be under 2**32")
    need(config.profile in ("paper", "release"), "profile", "must be 'paper' or 'release'")
    dtypes = ("float32", "bfloat16")
    need(config.policy.dtype in dtypes, "policy.dtype", f"must be one of {dtypes}")
    kept = config.rollout.weight_dtype
    need(kept in ("", "int8"), "rollout.weight_dtype", "must be '' (policy.dtype) or 'int8'")
    kept = config.policy_update.mu_dtype
    need(kept in dtypes, "policy_update.mu_dtype", f"must be one of {dtypes}")
    backends = ("auto", *BACKENDS)
    need(config.policy.attention in backends, "policy.attention", f"must be one of {backends}")
    decoding = ("auto", *DECODE_BACKENDS)
    need(
        config.policy.decode_attention in decoding,
        "policy.decode_attention",
        f"must be one of {decoding}",
    )
    lengths = (*config.data.prompt_lengths, config.rollout.max_tokens)
    need(
        config.policy.decode_attention != "ragged" or not any(n % BLOCK for n in lengths),
        "policy.decode_attention",
        f"reads blocks of {BLOCK} places: data.prompt_lengths and rollout.max_tokens must be "
        "multiples of that, or decode_attention 'auto'",
    )
    need(
        config.policy.attention != "cudnn" or config.policy.dtype == "bfloat16",
        "policy.attention",
        "cuDNN has no kernel for float32; set policy.dtype=bfloat16, or attention to 'xla'",
    )
    families = tuple(FAMILIES)
    family = config.policy.embedded_family
    need(family in families, "policy.embedded_family", f"must be one of {families}")
    if config.policy.path != EMBEDDED:
        path = Path(config.policy.path)
        need(
            not config.policy.path or not _is_run(path),
            "policy.path",
            f"is the folder of a run; give its policy, {str(path / 'policy')!r}, which a run "
            "writes at its end and emor3_jax.export from its newest checkpoint",
        )
        need(
            is_file(path / "config.json")
            or (not os.path.exists(path) and is_hub_id(config.policy.path)),
            "policy.path",
            "must be a Hugging Face folder with a config.json, an id on the hub ('owner/name'), or "
            "'embedded'",
        )
    least, most = config.data.min_pixels, config.data.max_pixels
    need(
        not most or least <= most,
        "data.min_pixels",
        f"must not be over data.max_pixels={most}",
    )
    decoded = config.data.max_decoded_pixels
    rule = f"must be at most {MOST_DECODED_PIXELS}, what PIL opens"
    need(decoded <= MOST_DECODED_PIXELS, "data.max_decoded_pixels", rule)
    rules = ("drop", "cut")
    need(config.data.long_prompts in rules, "data.long_prompts", f"must be one of {rules}")
    for field, each in data_sets(config).values():
        check_kind(field, each)
        try:
            label_set(each.labels or PARQUET_LABELS)
        except DataError as error:
            raise DataError(f"config.{field}: {error}") from error
        for key in ("subset", "limit"):
            need(each[key] >= 0, f"{field}.{key}", "must be 0 (all rows) or more")
        seed = each.subset_seed
        need(-1 <= seed < 2**32, f"{field}.subset_seed", "must be -1 (the run's seed) or more")
        need(each.balance in ("", "class"), f"{field}.balance", "must be 'class', or '' for none")
        need(each.weight > 0, f"{field}.weight", "must be over 0")
    trained = {"data.train": config.data.train}
    trained |= {f"data.mix.{name}": each for name, each in config.data.mix.items()}
    for field, each in trained.items():
        same = each.graded == config.data.train.graded
        rule = "is of evaluation sets alone; subset takes so many rows of a training set"
        need(not each.limit, f"{field}.limit", rule)
        need(same, f"{field}.graded", "must be that of data.train: rewards are graded or not")
    for name in config.data.mix:
        need("/" not in name and name != "train", "data.mix", "names hold no '/', nor are 'train'")
    size = config.data.scene_size
    need(112 <= size <= 224, "data.scene_size", "must lie between 112 and 224 pixels")
    for field in ("data.prompt_lengths", "data.image_windows", "reflect.text_lengths"):
        _need_buckets(config, field)
    _need_buckets(config, "policy_update.response_lengths")
    if config.reflect.judge_windows:
        _need_buckets(config, "reflect.judge_windows")
    for section in ("rollout", "reflect"):
        need(0 < config[section].top_p <= 1, f"{section}.top_p", "must lie in (0, 1]")
    need(0 <= config.evaluate.top_p <= 1, "evaluate.top_p", "must lie in (0, 1], or be 0")
    stated = config.evaluate.temperature
    rule = "must be 0 (greedy) or more, or -1 (the profile's)"
    need(stated == -1 or stated >= 0, "evaluate.temperature", rule)
    _check_in_flight("rollout", config.rollout, need)
    _check_in_flight("evaluate", config.evaluate, need)
    need(
        config.reward.coherence_target in ("label", "answer"),
        "reward.coherence_target",
        "must be 'label' or 'answer'",
    )
    weights = config.reward.lambda_reflect + config.reward.lambda_format
    need(
        min(config.reward.lambda_reflect, config.reward.lambda_format) >= 0 and weights <= 1,
        "reward.lambda_reflect",
        "the weights must not be negative, nor be over 1 with reward.lambda_format",
    )
    reward_terms(config)
    update = config.policy_update
    need(
        update.prompts >= 1 and config.rollout.prompts % update.prompts == 0,
        "policy_update.prompts",
        f"must divide rollout.prompts={config.rollout.prompts}",
    )
    need(
        update.micro_prompts >= 1 and update.prompts % update.micro_prompts == 0,
        "policy_update.micro_prompts",
        f"must divide policy_update.prompts={update.prompts}",
    )
    schedules = ("constant", "linear")
    need(update.schedule in schedules, "policy_update.schedule", f"must be one of {schedules}")
    need(0 <= update.clip_low <= 1, "policy_update.clip_low", "must lie in [0, 1]")
    need(update.clip_dual > 1, "policy_update.clip_dual", "must be over 1; inf is none")
    check_algorithm(config, need)
    if not imitate:
        check_comparison(config, need)
    check_reference(config, need)
    remats = ("none", "activations", "layers")
    need(update.remat in remats, "policy_update.remat", f"must be one of {remats}")
    sources = ("sampler", "recompute")
    need(update.old_logprobs in sources, "policy_update.old_logprobs", f"must be one of {sources}")
    known = all(name in SINKS for name in config.log.sinks)
    need(known, "log.sinks", f"must be some of {', '.join(map(repr, SINKS))}")
    for name in config.log.sinks:
        if package := missing_library(name):
            need(False, "log.sinks", f"{name!r} is not installed here: pip install {package}")
    need("jsonl" in config.log.sinks, "log.sinks", "must hold 'jsonl', by which a run resumes")
    sets = tuple(config.evaluate.sets)
    for name in sets:
        need("/" not in name, "evaluate.sets", "names are those of files and hold no '/'")
    for group, names in config.evaluate.groups.items():
        field = f"evaluate.groups.{group}"
        need(group not in sets, field, "has the name of a set; give the group another")
        known = isinstance(names, tuple | list) and len(names) > 0
        known = known and all(isinstance(name, str) and name in sets for name in names)
        need(known, field, f"must be a tuple of names of evaluate.sets: {', '.join(sets)}")
    need(
        config.evaluate.votes == 1 or evaluation_sampling(config)[0] > 0,
        "evaluate.votes",
        "at a temperature of 0 all responses to a row are the same; raise evaluate.temperature, or "
        "ask once",
    )


_FREE = {"data.mix": dataset(), "evaluate.sets": dataset(), "reward.terms": reward_term()}
"""Sections whose fields have any names, and what each is described by."""


def _is_run(folder: Path) -> bool:
    """Recognises the folder of a run, whose config.json is none of a policy."""
    has_parts = is_folder(folder / "checkpoints") or is_file(folder / "policy" / "config.json")
    return has_parts and not any(folder.glob("*.safetensors"))


def _check_types(config: ConfigDict, defaults: ConfigDict, prefix: str) -> None:
    """Checks that each field has the type that its default has, and that there are no others.

    Raises:
      ConfigError: naming the field, its value, and the type or the nearest field.
    """
    for key in defaults:
        if key not in config:
            rule = "is missing; start from emor3_jax.config.default()"
            raise ConfigError(f"{prefix}{key}", None, rule)
    for key in config:
        if key not in defaults:
            raise ConfigError(f"{prefix}{key}", config[key], no_field(key, defaults))
    for key, usual in defaults.items():
        field = f"{prefix}{key}"
        value = config[key]
        if isinstance(usual, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise ConfigError(field, value, "must be a section of fields, a ConfigDict")
            if field in _FREE:
                for name, each in value.items():
                    if not isinstance(each, ConfigDict):
                        raise ConfigError(f"{field}.{name}", each, "must be a description")
                    _check_types(each, _FREE[field], f"{field}.{name}.")
            elif field != "evaluate.groups":
                _check_types(value, usual, f"{field}.")
        elif not isinstance(value, _types_of(usual)) or (
            isinstance(value, bool) and not isinstance(usual, bool)
        ):
            named = " or ".join(dict.fromkeys(x.__name__ for x in _types_of(usual)))
            raise ConfigError(field, value, f"must be of type {named}")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(field, "a number of over 63 bits", "must be smaller")
        elif isinstance(value, str) and not is_utf8(value):
            # Pages, JSON and tokenizers could not hold it.
            raise ConfigError(field, value, "must be text in UTF-8; rename what it names")


def _types_of(usual: object) -> tuple[type, ...]:
    if isinstance(usual, float):
        return float, int
    return (tuple, list) if isinstance(usual, tuple) else (type(usual),)


_BATCHES = {
    "rollout": ("prompts", "slots", "refill", "lanes"),
    "evaluate": ("prompts", "slots", "refill", "lanes"),
    "policy_update": ("prompts", "micro_prompts"),
}
"""Section of the config → its fields whose rows the devices cut into parts."""


def check_batches(mesh: Mesh, config: ConfigDict, sections: Iterable[str] = _BATCHES) -> None:
    """Checks that the batches of a config divide over a mesh.

    Args:
      mesh: of the devices.
      config: of the run.
      sections: of the config whose batches there are.

    Raises:
      MeshError: naming the field, its value, the rule and what would do.
    """
    for section in sections:
        for field in _BATCHES[section]:
            check_batch(mesh, f"{section}.{field}", config[section][field])


def _check_in_flight(
    name: str, section: ConfigDict, need: Callable[[bool, str, str], None]
) -> None:
    """Checks the prompts and responses in flight of the rollout or of evaluation."""
    prompts = section.prompts
    slots = section.slots or prompts
    need(section.slots <= prompts, f"{name}.slots", f"must be 0 (all) to {name}.{prompts=}")
    refill = section.refill or slots
    need(
        slots % refill == 0 and prompts % refill == 0,
        f"{name}.refill",
        f"must be 0 (all slots) or divide both the {slots} slots and {name}.{prompts=}",
    )


def _need_buckets(config: ConfigDict, field: str) -> None:
    section, key = field.split(".")
    value = config[section][key]
    whole = all(isinstance(size, int) and size > 0 for size in value)
    if not value or not whole or list(value) != sorted(set(value)):
        raise ConfigError(
            field, value, "must be rising sizes, at least one, each a whole number over 0"
        )
