"""From a config to the objects of a run: policy, data, rollout, learner."""

from emor3_jax.prepare.algorithm import (
    make_learner,
    make_meter,
    make_step_spec,
    make_update_spec,
    reference_settings,
)
from emor3_jax.prepare.data import (
    PARQUET_LABELS,
    Data,
    data_sets,
    load_templates,
    open_data,
    open_source,
    stated_values,
)
from emor3_jax.prepare.judge import (
    JudgeProcessors,
    Judges,
    judge_names,
    keeps_reference,
    load_judge,
    prefix_windows,
)
from emor3_jax.prepare.policy import (
    attention_backend,
    decode_backend,
    ensure_policy,
    load_policy,
    make_lora,
    read_policy,
    trained_params,
    with_attention,
)
from emor3_jax.prepare.profile import listed_labels
from emor3_jax.prepare.reachable import check_reachable
from emor3_jax.prepare.rollout import (
    evaluation_plan,
    make_evaluation_rollout,
    make_evaluation_sampling,
    make_label_likelihood,
    make_reply_sampling,
    make_reward,
    make_rollout,
    make_sampling,
    rollout_plan,
)

__all__ = [
    "PARQUET_LABELS",
    "Data",
    "JudgeProcessors",
    "Judges",
    "attention_backend",
    "check_reachable",
    "data_sets",
    "decode_backend",
    "ensure_policy",
    "evaluation_plan",
    "judge_names",
    "keeps_reference",
    "listed_labels",
    "load_judge",
    "load_policy",
    "load_templates",
    "make_evaluation_rollout",
    "make_evaluation_sampling",
    "make_label_likelihood",
    "make_learner",
    "make_lora",
    "make_meter",
    "make_reply_sampling",
    "make_reward",
    "make_rollout",
    "make_sampling",
    "make_step_spec",
    "make_update_spec",
    "open_data",
    "open_source",
    "prefix_windows",
    "read_policy",
    "reference_settings",
    "rollout_plan",
    "stated_values",
    "trained_params",
    "with_attention",
]
