"""Configs: every file loads, wrong values are refused by name, and no key is without a reader."""

import ast
import importlib
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from support import program

import emor3_jax
from configs import gpu, qwen_vl, table
from emor3_jax.config import ConfigError, base_policy, dataset, default, reward_term
from emor3_jax.data.datasets.catalog import BUILDERS
from emor3_jax.data.labels import label_set
from emor3_jax.embedded.base_policy import train as train_base_policy
from emor3_jax.errors import UserError
from emor3_jax.models import published
from emor3_jax.prepare.checks import validate

ROOT = Path(emor3_jax.__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def _leaves(
    config: ConfigDict, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """A folder that looks like a policy's to `validate`."""
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_every_config_file_loads_and_is_valid(name: str, policy: str) -> None:
    config = importlib.import_module(f"configs.{name}").get_config()
    known = {path for path, _ in _leaves(base_policy() if "model" in config else default())}
    sets = {path for path, _ in _leaves(config) if path[:2] == ("evaluate", "sets")}
    assert {path for path, _ in _leaves(config)} - sets == known
    assert {path[3:] for path in sets} <= {path for path, _ in _leaves(dataset())}
    if "model" in config:
        return
    if not config.policy.path:
        with pytest.raises(ConfigError, match=r"policy\.path"):
            validate(config)
        config.policy.path = policy
    validate(config)
    assert max(config.policy_update.response_lengths) >= config.rollout.max_tokens


def test_the_papers_protocol(policy: str) -> None:
    from configs import paper

    for name, rows in (("emoset", 2000), ("emotion6", 0)):
        config = paper.get_config(name)
        assert (config.steps, config.rollout.prompts, config.rollout.responses) == (60, 512, 8)
        train, sets = config.data.train, config.evaluate.sets
        assert (train.kind, train.split, train.subset) == (name, "train", rows)
        assert list(sets) == ["emoset", "emotion6", "webemo"]
        assert {each.split for each in sets.values()} == {"test"}
        assert [each.subset for each in sets.values()] == [2000, 0, 2000]
        assert sets.webemo.labels == "webemo7" and sets.emotion6.label == "keyword"
        drawn = [each for each in (train, *sets.values()) if each.subset]
        assert {(each.subset_mix, each.subset_seed) for each in drawn} == {("natural", 0)}
        config.policy.path = policy
        validate(config)
    # As many prompts on a smaller machine.
    config = paper.get_config("emoset,h100-8")
    assert config.steps * config.rollout.prompts == 60 * 512
    with pytest.raises(ValueError, match="'fi' must be one of emoset, emotion6"):
        paper.get_config("fi")


def test_the_base_policy_of_faces_is_a_config_of_its_own() -> None:
    from configs import fer2013

    config = fer2013.get_config("base")
    assert config.data.kind == "faces"
    assert {path for path, _ in _leaves(config)} == {path for path, _ in _leaves(base_policy())}


def test_faces_have_the_rows_of_the_table(policy: str) -> None:
    from configs import fer2013

    for row in ("emo_r3", "grpo", "sft"):
        config = fer2013.get_config(row)
        config.policy.path = policy
        validate(config)
        assert config.data.train.labels == "fer7"
        assert config.reflect.enabled == (row == "emo_r3")
    with pytest.raises(ValueError, match=r"'ppo'.*must be one of .*grpo"):
        fer2013.get_config("ppo")


@pytest.mark.parametrize("row", table.ROWS)
def test_every_row_of_the_table_is_a_config(row: str) -> None:
    config, whole = table.get_config(row), table.get_config("emo_r3")
    validate(config)
    # One budget, one test: what differs is the algorithm. The cold start comes before a budget,
    # and labels are learned at a rate of their own.
    same = ("rollout.prompts", "rollout.max_tokens", "evaluate.sets", "evaluate.temperature")
    if row != "cold_start":
        same += ("steps", "rollout.responses", "data.train")
    if row not in ("cold_start", "sft"):
        same += ("policy_update.learning_rate",)
    for field in same:
        *sections, key = field.split(".")
        one, other = config, whole
        for name in sections:
            one, other = one[name], other[name]
        assert one[key] == other[key], field
    steps = config.data.templates.set == "tiny"
    assert (config.evaluate.reflect or config.reflect.enabled) == steps
    # Only where the question asks for steps can they be rewarded.
    assert steps or config.reward.format == "boxed"


def test_an_unknown_row_of_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="'ppo': must be one of base, sft, cold_start, grpo"):
        table.get_config("ppo")


OPTIONS = [
    ("tpu_v5e", "4b", "--config=…:4b: must be of 3b, 7b, qwen3_vl_2b"),
    ("tpu_v5e", "qwen3_vl_4b,3b", "--config=…:3b: the policy is given twice"),
    ("tpu_v5e", "chips=64,chips=16", "chips=16: chips is given twice"),
    (
        "tpu_v5e",
        "qwen3_vl_4b,slices=3",
        "slices=3: must be a power of two that divides the 16 chips",
    ),
    ("tpu_v7x", "chips=0", "--config=…:chips=0"),
    ("gpu", "7b,lora,3b", "the policy is given twice"),
    ("gpu", "gpus=2", "gpus must be 1 or 8"),
    ("emoset", "v5e-64,4b", "--config=…:4b"),
    ("paper", "webemo", "'webemo' must be one of emoset, emotion6"),
    ("paper", "emoset,qwen3_vl_4b", "machine 'qwen3_vl_4b'"),
]


def test_labels_that_are_none_name_their_data_set(policy: str) -> None:
    for field in ("data.train", "evaluate.sets.emoscenes"):
        config = importlib.import_module("configs.cpu_demo").get_config()
        config.policy.path = policy
        config.update_from_flattened_dict({f"{field}.labels": "nonsense"})
        with pytest.raises(UserError, match=rf"config\.{field}: labels='nonsense' is no label set"):
            validate(config)


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS, ids=lambda x: str(x)[:24])
def test_wrong_options_of_a_file_are_refused_by_name(name: str, options: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        importlib.import_module(f"configs.{name}").get_config(options)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("tpu", "gpu"))])
def test_every_policy_has_a_config_of_every_machine(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    for policy, path in qwen_vl.POLICIES.items():
        for options in (policy, f"{policy},lora"):
            config = module.get_config(options)
            validate(config)
            assert config.policy.path == path and bool(config.policy.lora_rank) == ("," in options)
            shapes = published(path).shapes
            assert not any(size % config.mesh.tensor for size in shapes.cut_by_tensor.values())


def test_what_one_gpu_cannot_hold_is_trained_by_adapters() -> None:
    ranks = {name: gpu.get_config(f"gpus=1,memory=141,{name}") for name in qwen_vl.POLICIES}
    assert [name for name, config in ranks.items() if config.policy.lora_rank] == [
        "7b",
        "qwen3_vl_8b",
    ]


def test_a_config_of_another_program_is_refused_by_the_field_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is missing; start from emor3_jax.config.default\(\)"):
        validate(base_policy())
    with pytest.raises(UserError, match=r"no field batch,.*from emor3_jax.config.base_policy\(\)"):
        train_base_policy(default(), tmp_path)


def test_every_data_set_of_the_docs_is_a_config() -> None:
    text = "".join((ROOT / name).read_text() for name in ("docs/your_data.md", "docs/data.md"))
    lines = re.findall(r"dataset\(\s*kind=[^…]*?\)", text)
    assert len(lines) >= 15
    known = {"emoscenes", "parquet", "folders", "jsonl", "huggingface", *BUILDERS}
    kinds = set()
    for line in lines:
        described = eval(line, {"dataset": dataset})
        kinds.add(described.kind)
        assert not described.labels or label_set(described.labels)
    assert kinds == known


def test_an_unknown_field_of_a_description_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"subst=2000: there is no .* nearest one is subset"):
        dataset(kind="emoset", subst=2000)
    with pytest.raises(UserError, match=r"weigth=1.0: there is no .* nearest one is weight"):
        reward_term(weigth=1.0)


def test_a_field_that_nothing_reads_is_refused_with_the_nearest_one() -> None:
    config = default()
    config.rollout.promts = 4
    with pytest.raises(ConfigError, match=r"config.rollout.promts=4: .* one is prompts$"):
        validate(config)
    config = default()
    config.evaluate.sets.test = dataset()
    config.evaluate.sets.test.spilt = "test"
    with pytest.raises(ConfigError, match=r"evaluate.sets.test.spilt='test': .* one is split$"):
        validate(config)


WRONG = [
    ("steps", -1, "0 or more"),
    ("profile", "papr", "'paper' or 'release'"),
    ("policy.dtype", "float16", "bfloat16"),
    ("policy.attention", "flash", "'splash'"),
    ("policy.decode_attention", "paged", "'ragged'"),
    ("policy.path", "no/such/folder", "config.json"),
    ("data.min_pixels", -1, "0 or more"),
    ("data.read_ahead", 0, "at least 1"),
    ("data.long_prompts", "trim", "'cut'"),
    ("data.train.balance", "label", "'class'"),
    ("data.train.weight", 0.0, "over 0"),
    ("data.scene_size", 64, "between 112 and 224"),
    ("data.prompt_lengths", (1024, 512), "rising"),
    ("data.image_windows", (), "at least one"),
    ("reflect.judge_windows", (2, 1), "rising sizes"),
    ("reflect.text_lengths", (0, 8), "over 0"),
    ("rollout.responses", 0, "at least 1"),
    ("rollout.temperature", 0.0, "over 0"),
    ("reflect.temperature", -0.5, "0 or more"),
    ("evaluate.top_p", 1.5, "(0, 1]"),
    ("evaluate.votes", 0, "at least 1"),
    ("evaluate.votes", 3, "all responses to a row are the same"),
    ("reflect.max_tokens", -1, "0 or more"),
    ("evaluate.temperature", -0.5, "-1 (the profile's)"),
    ("reward.coherence_target", "image", "'answer'"),
    ("reward.lambda_reflect", -0.1, "reward.lambda_format"),
    ("policy_update.prompts", 100, "rollout.prompts=512"),
    ("policy_update.micro_prompts", 7, "policy_update.prompts=256"),
    ("policy_update.learning_rate", 0.0, "over 0"),
    ("policy_update.clip_low", 1.5, "[0, 1]"),
    ("policy_update.clip_dual", 1.0, "over 1"),
    ("policy_update.kl_coef", -1.0, "0 or more"),
    ("policy_update.mean", "batch", "'seq'"),
    ("policy_update.advantage", "gae", "'rloo'"),
    ("policy_update.surrogate", "batch", "'gspo'"),
    ("policy_update.mu_dtype", "float16", "'bfloat16'"),
    ("policy_update.kl", "k4", "'off'"),
    ("policy_update.kl_place", "advantage", "'reward'"),
    ("policy_update.kl_target", -0.1, "0 or more"),
    ("policy_update.kl_horizon", 0.0, "over 0"),
    ("reward.format", "json", "'boxed'"),
    ("reward.reflection", "none", "'both'"),
    ("reward.overlong_weight", -1.0, "0 or more"),
    ("rollout.resample", -1, "0 or more"),
    ("policy.lora_rank", -1, "0 or more"),
    ("policy.lora_modules", (1,), "'q_proj'"),
    ("seed", -1, "0 or more"),
    ("seed", 2**32, "under 2**32"),
    ("data.min_pixels", 200_704, "data.max_pixels=100352"),
    ("data.prompt_lengths", (512.5,), "whole number"),
    ("data.image_windows", ("64",), "whole number"),
    ("data.workers", -1, "0 or more"),
    ("data.train.subset", -1, "0 (all rows)"),
    ("data.train.limit", -1, "0 (all rows)"),
    ("data.train.limit", 10, "subset takes so many rows"),
    ("data.train.outside_files", True, "only parquet, jsonl, huggingface"),
    ("data.train.path", None, "must be of type str"),
    ("data.train.question", "caf\udce9", "must be text in UTF-8"),
    ("data.max_decoded_pixels", 0, "at least 1"),
    ("data.max_decoded_pixels", 2**28, "at most 178956970"),
    ("steps", "ten", "must be of type int"),
    ("steps", True, "must be of type int"),
    ("rollout", 3, "must be a section"),
    ("log.sinks", "jsonl", "must be of type tuple or list"),
    ("evaluate.during", 0, "at least 1"),
    ("evaluate.prompts", 0, "at least 1"),
    ("evaluate.lanes", -1, "0 or more"),
    ("rollout.lanes", -8, "0 or more"),
    ("rollout.slots", 1024, "rollout.prompts=512"),
    ("rollout.refill", 7, "the 512 slots"),
    ("rollout.halvings", -1, "0 or more"),
    ("rollout.weight_dtype", "int4", "'' (policy.dtype) or 'int8'"),
    ("policy_update.logprob_chunk", 0, "at least 1"),
    ("policy_update.warmup_steps", -1, "0 or more"),
    ("policy_update.max_grad_norm", 0.0, "over 0"),
    ("policy_update.learning_rate", math.inf, "finite"),
    ("policy_update.weight_decay", math.nan, "finite"),
    ("policy.lora_alpha", 0.0, "over 0"),
    ("policy_update.rates.tower", 0.0, "freeze_vision_tower"),
    ("reference.kind", "moving", "'average'"),
    ("reference.every", 0, "at least 1"),
    ("reference.decay", 1.0, "[0, 1)"),
    ("reference.dtype", "float16", "'bfloat16'"),
    ("reference.image_cache", -1, "0 or more"),
    ("sft.target", "answer", "'response'"),
    ("sft.responses", 0, "at least 1"),
    ("data.train.kind", "csv", "huggingface"),
    ("checkpoint.keep", 0, "at least 1"),
    ("checkpoint.minutes", -1.0, "0 or more"),
    ("checkpoint.minutes", math.inf, "finite"),
    ("checkpoint.stop_seconds", -1.0, "0 or more"),
    ("log.every", 0, "at least 1"),
    ("log.sinks", ("jsonl", "neptune"), "'tensorboard'"),
    ("log.sinks", ("tensorboard",), "must hold 'jsonl'"),
]


@pytest.mark.parametrize(("field", "value", "rule"), WRONG, ids=[field for field, *_ in WRONG])
def test_an_error_names_field_value_and_rule(field: str, value: object, rule: str) -> None:
    config = default()
    *sections, key = field.split(".")
    section = config
    for name in sections:
        section = section[name]
    if field == "data.min_pixels":
        config.data.max_pixels = 100_352
    with section.ignore_type():
        section[key] = value
    with pytest.raises(ConfigError) as error:
        validate(config)
    message = str(error.value)
    assert message.startswith(f"config.{field}={value!r}: ")
    assert rule in message


def _numbers(config: ConfigDict) -> list[tuple[str, float]]:
    return [
        (".".join(path), value)
        for path, value in _leaves(config)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _with(config: ConfigDict, field: str, value: object) -> ConfigDict:
    *sections, key = field.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    return config


@pytest.mark.parametrize("field", [field for field, _ in _numbers(default())])
def test_no_number_may_be_negative_or_nan(field: str) -> None:
    # The axes of the mesh are checked with the devices; -1 is "the rest" there.
    wrong = [] if field.startswith("mesh.") else [-1]
    # There -1 is the run's own seed, the profile's temperature, or all rows.
    special = "subset_seed", "evaluate.temperature", "evaluate.before"
    wrong = [-2] if field.endswith(special) else wrong
    if isinstance(dict(_numbers(default()))[field], float):
        wrong.append(math.nan)
    for value in wrong:
        with pytest.raises(ConfigError, match=re.escape(field)):
            validate(_with(default(), field, value))


@pytest.mark.parametrize("field", [field for field, _ in _numbers(base_policy())])
def test_no_number_of_the_base_policy_may_be_negative_or_nan(field: str, tmp_path: Path) -> None:
    config = base_policy()
    config.compile_cache = ""
    wrong = (-1, math.nan) if isinstance(dict(_numbers(config))[field], float) else (-1,)
    for value in wrong:
        with pytest.raises(ConfigError, match=re.escape(field)):
            train_base_policy(_with(config.copy_and_resolve_references(), field, value), tmp_path)


TOGETHER = [
    # What is set, and the fields that the message names.
    ({"policy_update.advantage": "rloo", "rollout.responses": 1}, "rollout.responses=1"),
    ({"policy_update.advantage": "dr_grpo", "rollout.responses": 1}, "rollout.responses=1"),
    ({"policy_update.advantage": "grpo", "rollout.responses": 1}, "rollout.responses=1"),
    (
        {
            "rollout.prompts": 1,
            "rollout.responses": 1,
            "policy_update.prompts": 1,
            "policy_update.micro_prompts": 1,
            "policy_update.advantage": "reinforce_pp",
        },
        "policy_update.advantage='reinforce_pp' compares the responses of a step",
    ),
    ({"policy_update.surrogate": "gspo"}, "policy_update.mean='token'"),
    ({"policy_update.surrogate": "gepo", "policy_update.mean": "constant"}, "policy_update.mean"),
    (
        {"policy_update.surrogate": "gspo", "policy_update.mean": "seq"},
        "policy_update.clip_low=0.2",
    ),
    (
        {"policy_update.surrogate": "gepo", "policy_update.mean": "seq"},
        "policy_update.clip_high=0.3",
    ),
    ({"policy_update.kl": "k1"}, "policy_update.kl_place='loss'"),
    ({"policy_update.surrogate": "gmpo"}, "policy_update.mean='token'"),
    (
        {
            "reflect.judge": "reference",
            "reference.kind": "none",
            "policy_update.kl": "off",
        },
        "reference.kind='none'",
    ),
    ({"evaluate.judge": "somebody"}, "evaluate.judge='somebody'"),
    ({"policy_update.correction": "token_mask"}, "policy_update.old_logprobs='sampler'"),
    ({"policy_update.correction_low": 3.0}, "policy_update.correction_high=2.0"),
    ({"policy_update.select": "top_entropy"}, "policy_update.old_logprobs"),
    (
        {
            "policy_update.select": "kl_cov",
            "policy_update.surrogate": "gmpo",
            "policy_update.mean": "seq",
        },
        "policy_update.surrogate='gmpo'",
    ),
    ({"policy_update.select_low": 6.0}, "policy_update.select_high=5.0"),
    ({"policy_update.kl_ratio": True, "policy_update.kl": "off"}, "policy_update.kl='off'"),
    (
        {"policy_update.entropy_coef": 2.0, "policy_update.entropy_target": 0.1},
        "policy_update.entropy_most=1.0",
    ),
    ({"policy_update.advantage": "gdpo", "reward.overlong": 16}, "reward.overlong=16"),
    ({"policy_update.advantage": "maxrl", "reward.overlong": 16}, "reward.overlong=16"),
    (
        {
            "policy_update.advantage": "maxrl",
            "policy_update.kl": "k2",
            "policy_update.kl_place": "reward",
        },
        "policy_update.kl_place='reward'",
    ),
    (
        {
            "policy_update.advantage": "maxrl",
            "reward.terms": {"swears": reward_term(weight=-0.5, pattern="damn")},
        },
        "reward.terms.swears.weight=-0.5",
    ),
    (
        {"policy_update.mask_equal": True, "policy_update.advantage": "gdpo"},
        "policy_update.advantage='gdpo'",
    ),
    (
        {
            "rollout.resample": 1,
            "rollout.responses": 1,
            "policy_update.advantage": "reinforce_pp",
        },
        "rollout.responses=1; set it to 0",
    ),
    (
        {
            "policy_update.advantage": "gdpo",
            "policy_update.kl": "k2",
            "policy_update.kl_place": "reward",
        },
        "policy_update.kl_place='reward'",
    ),
    (
        {
            "policy_update.advantage": "gdpo",
            "reward.lambda_format": 0.0,
            "reward.lambda_reflect": 0.0,
        },
        "accuracy alone has a weight",
    ),
    ({"policy_update.kl_target": 0.1, "policy_update.kl": "off"}, "policy_update.kl='off'"),
    ({"policy_update.kl_target": 0.1, "policy_update.kl_coef": 0.0}, "policy_update.kl_coef=0.0"),
    ({"policy_update.kl_horizon": 10.0, "policy_update.kl_target": 0.1}, "rollout.prompts"),
    ({"reward.overlong": 4096}, "rollout.max_tokens=2048"),
    ({"reward.reflection": "coherence", "reflect.enabled": False}, "reflect.enabled=False"),
    ({"data.templates.set": "direct"}, "reflect.enabled=True"),
    ({"reference.kind": "none"}, "policy_update.kl='k3'"),
    ({"reference.kind": "refresh", "policy.lora_rank": 4}, "policy.lora_rank=4"),
    ({"reference.dtype": "bfloat16", "reference.kind": "average"}, "reference.kind='average'"),
    ({"reference.dtype": "bfloat16", "policy.lora_rank": 4}, "policy.lora_rank=4"),
    ({"reference.image_cache": 10, "reference.kind": "refresh"}, "policy.freeze_vision_tower"),
    ({"policy.lora_rank": 4, "policy.lora_modules": ()}, "policy.lora_modules=()"),
    (
        {
            "policy.lora_modules": ("visual/qkv",),
            "policy.lora_rank": 4,
            "policy.freeze_vision_tower": True,
        },
        "policy.freeze_vision_tower=True",
    ),
    (
        {"policy_update.rates.merger": 2.0, "policy.freeze_vision_tower": True},
        "policy.freeze_vision_tower=True",
    ),
    (
        {"policy_update.rates.tower": 2.0, "policy.lora_rank": 4},
        "policy.lora_modules=('q_proj', 'k_proj', 'v_proj', 'o_proj')",
    ),
    (
        {
            "policy_update.rates.decoder": 2.0,
            "policy.lora_rank": 4,
            "policy.lora_modules": ("visual/qkv",),
        },
        "policy.lora_modules=('visual/qkv',)",
    ),
    ({"policy_update.rates.embedding": 2.0, "policy.lora_rank": 4}, "leave it at 1"),
    ({"data.templates.set": "think", "reflect.enabled": False}, "reward.format='set'"),
]


@pytest.mark.parametrize(("fields", "named"), TOGETHER)
def test_what_does_not_go_together_is_refused_naming_both(fields: dict, named: str) -> None:
    config = default()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError) as error:
        validate(config)
    first = next(iter(fields))
    assert str(error.value).startswith(f"config.{first}={fields[first]!r}: ")
    assert named in str(error.value)


def test_rates_of_what_is_trained_are_valid() -> None:
    config = default()
    config.policy.lora_rank, config.policy.lora_modules = 4, ("q_proj", "visual/linear_fc1")
    for name in ("tower", "merger", "decoder"):
        config.policy_update.rates[name] = 2.0
    validate(config)


def test_published_algorithms_are_valid() -> None:
    for fields in (
        {"advantage": "dr_grpo", "mean": "constant", "kl": "off", "clip_dual": math.inf},
        {"surrogate": "gspo", "mean": "seq", "clip_low": 3e-4, "clip_high": 4e-4, "kl": "off"},
        {"surrogate": "gepo", "mean": "seq", "clip_low": 1.0, "clip_high": math.inf},
        {"advantage": "rloo", "kl": "k1", "kl_place": "reward", "mean": "seq"},
        {"advantage": "remax", "kl_target": 0.02},
    ):
        config = default()
        config.policy_update.update(fields)
        validate(config)


def test_the_sample_deviation_needs_two_responses() -> None:
    config = default()
    config.rollout.responses, config.policy_update.advantage = 1, "reinforce_pp"
    validate(config)
    config.profile = "release"
    with pytest.raises(ConfigError, match=r"rollout\.responses=1: .*at least 2"):
        validate(config)
    # Supervised fine-tuning compares nothing.
    validate(config, imitate=True)


def _train(*arguments: str) -> subprocess.CompletedProcess:
    return program.run("emor3_jax.train", "--config=configs/cpu_demo.py", *arguments)


def test_the_folder_of_a_run_is_no_policy_and_its_policy_is_named(tmp_path: Path) -> None:
    config = table.get_config()
    config.policy.path = str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"is the folder of a run; give its policy, '.*/policy'"):
        validate(config)
    # A policy may have a folder of that name beside its weights.
    (tmp_path / "model.safetensors").write_text("")
    validate(config)


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    done = _train("--config.stepz=3", f"--workdir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert (
        done.stderr == "error: --config.stepz: there is no such field; the nearest one is steps\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_wrong_value_ends_the_program_with_its_message_alone(tmp_path: Path) -> None:
    done = _train("--config.profile=papr", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "error: config.profile='papr': must be 'paper' or 'release'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# No key without a reader. A reader is an expression such as `config.policy_update.mean`, or
# `c.mean` after `c = config.policy_update`. `validate` checks keys and does not count, nor do
# assignments to a key.


def _chain(node: ast.AST, aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of `a.b["c"].d`, a leading alias replaced by what it stands for; () for others."""
    names: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Constant):
                names.append(str(node.slice.value))
            node = node.value
        elif isinstance(node, ast.Name):
            return (*aliases.get(node.id, (node.id,)), *reversed(names))
        else:
            return ()


def _chains(source: str) -> set[tuple[str, ...]]:
    """All chains of names that a module reads."""
    found: set[tuple[str, ...]] = set()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        aliases: dict[str, tuple[str, ...]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                chain = _chain(node.value, {})
                if len(chain) > 1 and chain[0] == "config":
                    aliases[node.targets[0].id] = chain
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(_chain(node, aliases))
    return found


def _unread(keys: Sequence[tuple[str, ...]], sources: Sequence[str]) -> list[str]:
    """The keys, joined by dots, that no source reads."""
    chains = set().union(*map(_chains, sources))
    unread = []
    for key in keys:
        wanted = ("config", *key)
        # One data set is handed on as `dataset`; those of an evaluation are found by name.
        one_of_sets = {("dataset", key[-1]), ("config", "evaluate", "sets", key[-1])}
        section = ("config", *key[:-1], "to_dict")
        if wanted in chains or section in chains:
            continue
        if any(chain[: len(wanted)] == wanted for chain in chains):
            continue
        if key[:2] == ("data", "train") and one_of_sets & chains:
            continue
        unread.append(".".join(key))
    return unread


def _sources(*folders: str, without: Sequence[str] = ()) -> list[str]:
    package = ROOT / "emor3_jax"
    files = [file for folder in folders for file in sorted((package / folder).glob("*.py"))]
    return [file.read_text() for file in files if file.name not in without]


_RULES = ("config.py", "checks.py", "algorithm_checks.py")
"""Files that look at every field, whether anything uses it or not."""


def test_every_key_of_the_programs_is_read() -> None:
    keys = [path for path, _ in _leaves(default())]
    assert len(keys) > 50
    assert _unread(keys, _sources(".", "prepare", "runtime", without=_RULES)) == []


def test_every_key_of_the_base_policy_is_read() -> None:
    keys = [path for path, _ in _leaves(base_policy())]
    assert len(keys) > 15
    assert _unread(keys, _sources("embedded", "embedded/emoscenes", "embedded/faces")) == []


def test_the_search_for_readers_finds_a_key_that_nothing_reads() -> None:
    source = """
def program(config):
    c = config.policy_update
    config.log.every = 3
    return c.mean, config.steps, config.data.templates.to_dict()
"""
    keys = [
        ("steps",),
        ("policy_update", "mean"),
        ("policy_update", "learning_rate"),
        ("log", "every"),
        ("data", "templates", "set"),
        ("data", "mean"),
    ]
    assert _unread(keys, [source]) == ["policy_update.learning_rate", "log.every", "data.mean"]
