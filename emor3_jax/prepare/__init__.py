"""From a config to the objects of a run: policy, data, actors, optimizer."""

from emor3_jax.prepare.algorithm import (
    group_std,
    make_kl_control,
    make_meter,
    make_shaping,
    make_update,
    score_options,
)
from emor3_jax.prepare.data import (
    PARQUET_LABELS,
    Data,
    data_sets,
    load_templates,
    open_data,
    open_source,
    place_batch,
)
from emor3_jax.prepare.job import (
    CompileCounter,
    check_hosts,
    keep_config,
    start_jax,
)
from emor3_jax.prepare.policy import (
    attention_backend,
    find_policy,
    load_policy,
    make_lora,
    read_policy,
    trained_params,
)
from emor3_jax.prepare.rollout import (
    evaluation_plan,
    evaluation_rule,
    make_actor,
    plan_packing,
    rollout_plan,
    rollout_rule,
)

__all__ = [
    "PARQUET_LABELS",
    "CompileCounter",
    "Data",
    "attention_backend",
    "check_hosts",
    "data_sets",
    "evaluation_plan",
    "evaluation_rule",
    "find_policy",
    "group_std",
    "keep_config",
    "load_policy",
    "load_templates",
    "make_actor",
    "make_kl_control",
    "make_lora",
    "make_meter",
    "make_shaping",
    "make_update",
    "open_data",
    "open_source",
    "place_batch",
    "plan_packing",
    "read_policy",
    "rollout_plan",
    "rollout_rule",
    "score_options",
    "start_jax",
    "trained_params",
]
