"""Whole runs of the second family: all programs, by the seam alone."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support import tiny_run
from support.tiny_run import make_folder, read_metrics

from emor3_jax import evaluate, sft
from emor3_jax.config import ConfigError, reward_term
from emor3_jax.data.labels import label_set
from emor3_jax.export import export
from emor3_jax.infer import answer
from emor3_jax.models import load
from emor3_jax.prepare import policy as prepare_policy
from emor3_jax.train import train

FAMILY = "qwen3_vl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp(FAMILY), FAMILY)


def make_config(folder: Path) -> ConfigDict:
    """A run of three steps whose rewards differ, however random the policy."""
    config = tiny_run.make_config(folder)
    config.reward.terms.letters = reward_term(weight=0.05, text="support.tiny_run:letters")
    return config


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    config = make_config(folder)
    config.policy_update.remat = "layers"
    train(config, folder / "whole")
    return folder / "whole"


def moved(after: Path, before: Path) -> dict:
    return jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), load(after).params, load(before).params
    )


def test_training_moves_every_part_of_the_policy_and_leaves_a_folder(folder, whole):
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(row["policy/loss"]) and row["policy/grad_norm"] > 0 for row in rows[1:])
    # The sampler and the update see the same policy, features of several layers included.
    assert rows[1]["policy/sampler_gap"] < 1e-4
    distance = moved(whole / "policy", folder / "policy")
    assert distance["visual"]["deepstack_0"]["linear_fc2"]["kernel"] > 0
    assert distance["visual"]["pos_embed"]["embedding"] > 0
    assert min(jax.tree.leaves(distance["model"])) > 0
    written = json.loads((whole / "policy" / "preprocessor_config.json").read_text())
    assert written["processor_class"] == "Qwen3VLProcessor"


def test_a_checkpoint_is_evaluated_as_training_did(folder, whole):
    config = make_config(folder)
    config.evaluate.checkpoint = str(whole)
    evaluate.main(config, folder / "evaluation")
    said = (folder / "evaluation" / "predictions" / "test.jsonl").read_text()
    assert said == (whole / "predictions" / "000003" / "test.jsonl").read_text()


def test_prompts_in_turns_train_as_all_at_once(folder, whole):
    config = make_config(folder)
    config.policy_update.remat = "layers"
    config.rollout.slots, config.rollout.refill, config.rollout.block = 2, 1, 3
    train(config, folder / "turns")
    for name in ("policy/loss", "reward/overall"):
        found, wanted = (read_metrics(run)[-1][name] for run in (folder / "turns", whole))
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5), name


def test_adapters_with_kept_features_and_soft_reflections(folder):
    config = make_config(folder)
    config.policy.lora_rank, config.policy.freeze_vision_tower = 2, True
    config.reference.image_cache = 10**6
    config.reflect.soft = True
    train(config, folder / "lora")
    rows = read_metrics(folder / "lora")
    assert rows[-1]["reference/cache_hits"] == 2
    distance = moved(export(config, folder / "lora"), folder / "policy")
    projections = distance["model"]["layers"]["self_attn"]
    assert min(projections[name]["kernel"] for name in config.policy.lora_modules) > 0
    assert max(jax.tree.leaves(distance["visual"])) == 0


def test_supervised_fine_tuning_learns_the_labels(folder):
    config = make_config(folder)
    config.sft.target, config.reflect.enabled, config.steps = "label", False, 6
    config.policy_update.learning_rate, config.policy_update.warmup_steps = 2e-2, 0
    config.policy_update.entropy, config.policy_update.schedule = False, "constant"
    sft.train(config, folder / "sft")
    losses = [row["policy/loss"] for row in read_metrics(folder / "sft")[1:]]
    assert losses[-1] < losses[0]


def test_a_policy_is_asked_about_an_image(whole):
    out = io.BytesIO()
    Image.new("RGB", (160, 120), (200, 40, 90)).save(out, "PNG")
    found = answer(
        load(whole / "policy"),
        out.getvalue(),
        question="How does it feel?",
        labels=label_set("mikels8"),
        templates="tiny",
        max_tokens=4,
    )
    assert found.response and found.label in ("", *label_set("mikels8"))


def test_an_embedded_policy_of_another_family_is_named(folder, monkeypatch):
    config = make_config(folder)
    config.policy.path, config.policy.embedded_folder = "embedded", str(folder / "policy")
    config.policy.embedded_family = "qwen2_5_vl"
    with pytest.raises(ConfigError, match=r"embedded_family.*holds a policy of family 'qwen3_vl'"):
        prepare_policy.ensure_policy(config, print)
    config.policy.embedded_family = FAMILY
    assert prepare_policy.ensure_policy(config, print) == folder / "policy"
