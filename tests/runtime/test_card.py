"""The model card: where a policy comes from, what it learned, how to ask it; no path."""

import ast
import re

import pytest

from emor3_jax.config import dataset, default
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io.card import step_of
from emor3_jax.runtime.card import card_of_run

SETTINGS = InferenceSettings().changed(labels="joy,fear", question='say "why" ?', template="tiny")


@pytest.fixture
def config():
    config = default()
    config.policy.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    config.data.train = dataset(kind="parquet", path="/home/someone/train.parquet", labels="fer7")
    config.evaluate.sets.test = dataset(kind="fi", path="/home/someone/fi", split="test")
    config.data.templates.set = "/home/someone/own.txt"
    config.policy_update.learning_rate = 1e-5
    config.reflect.judge, config.evaluate.judge = "reference", "/home/someone/judge"
    return config


def test_a_card_says_where_a_policy_comes_from(config):
    results = {"test": Evaluation({"accuracy": 0.5, "rows": 8.0}, [])}
    card = card_of_run(
        "demo", "train", config, "qwen2_5_vl", 100, SETTINGS, {"train": 1234}, ({}, results)
    )
    assert "base_model: Qwen/Qwen2.5-VL-3B-Instruct\n" in card
    assert "`emor3 train`, to step\n100 of 100." in card
    assert step_of(card) == 100 and step_of("# Mine\nto step 3 of 4.") is None
    odd = "trained by emor3_jax, to step 7 of 9."
    renamed = card.replace("# ", f"# {odd} ", 1).replace("started from ", f"started from {odd} ")
    assert step_of(renamed) == 100
    assert "| train | parquet | – | fer7 | 1234 |" in card
    assert "| test | fi | test | of the data | – |" in card
    assert "| policy_update.learning_rate | 1e-05 |" in card
    assert '| data.templates.set | "own.txt" |' in card
    assert "asked of the policy that it started from in training, and of judge in eval" in card
    assert "| test | accuracy | – | 50.0 |" in card
    assert "/home" not in card


def test_its_snippet_is_python_with_the_prompt_as_it_is_asked(config):
    card = card_of_run("demo", "", config, "qwen2_5_vl", 7, SETTINGS)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(assigned["prompt"]) == SETTINGS.prompt
    assert "mm_token_type_ids" in code and "max_new_tokens=512" in code
    # Transformers 4 takes neither these ids nor, in 4.49, this argument.
    assert '"mm_token_type_ids" in inspect.signature(model.forward)' in code
    assert "dtype=" not in code
    assert "No evaluation of this step came with" in card and "emor3 train" not in card
    without_sets = card_of_run("demo", "", config, "qwen2_5_vl", 7, SETTINGS, results=({}, {}))
    assert without_sets == card


def test_a_run_without_reflections_asks_nobody():
    config = default()
    said = "asked of {} in training, and of {} in evaluation"
    for program, enabled, evaluated, who in (
        ("train", True, False, ("the policy itself", "the policy itself")),
        ("train", False, True, ("nobody", "the policy itself")),
        ("sft", True, True, ("nobody", "the policy itself")),
        ("train", False, False, ("nobody", "nobody")),
    ):
        config.reflect.enabled, config.evaluate.reflect = enabled, evaluated
        card = card_of_run("demo", program, config, "qwen2_5_vl", 7, SETTINGS)
        assert said.format(*who) in card


def test_a_folder_is_no_id_on_the_hub(config, tmp_path):
    config.policy.path = str(tmp_path / "mine")
    card = card_of_run("demo", "sft", config, "qwen2_5_vl", 7, SETTINGS)
    assert "base_model" not in card and "It started from mine," in card
    config.policy.path = "embedded"
    assert "the embedded base policy" in card_of_run("d", "", config, "q", 1, SETTINGS)
