"""Shapes of the longest step of a config, from its templates and its policy's folder."""

import dataclasses
import json
from pathlib import Path

import pytest
from support.tiny_flops import TINY, policy_of

from emor3_jax.config import default
from emor3_jax.data.prompts import PromptTemplates, render_prompt, shared_length
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.models import published, read_processor
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.prepare.shapes import QWEN_TEMPLATE_TOKENS, make_step_shapes, read_policy_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with a tokenizer, but without weights."""
    path = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["which emotion ? yes or no: awe, fear"] * 4, 300)
    policy = policy_of(dataclasses.replace(TINY, vocab_size=len(tokenizer)))
    tower = policy.shapes.vision
    images = ImageSettings(
        patch_size=tower.patch_size,
        temporal_patch_size=tower.temporal_patch_size,
        merge_size=tower.spatial_merge_size,
    )
    Processor(tokenizer, images, policy.layout).save(path)
    data = policy.shapes.to_hf() | special_ids(tokenizer)
    (path / "config.json").write_text(json.dumps(data))
    return path


def test_the_tokens_of_the_templates_are_counted(folder: Path) -> None:
    config = default()
    config.policy.path = str(folder)
    config.data.train.labels = "awe, fear"
    policy, texts = read_policy_shapes(config)
    shapes = make_step_shapes(config, policy.shapes, texts, prompt_tokens=600, response_tokens=90)
    tokenizer = read_processor(folder, policy).tokenizer
    image = shapes.patches // 4
    prompt = render_prompt(tokenizer, PromptTemplates.load().set, QUESTION, ("awe", "fear"), image)
    assert shapes.prompt_tokens == len(prompt) == 600
    assert shapes.shared_tokens == shared_length(tokenizer, prompt)
    assert shapes.response_tokens == 90
    assert tuple(q.text for q in shapes.questions.values()) == (60, 30)
    assert shapes.questions["coherence"].tail > 1 and shapes.questions["consistency"].head > 1
    config.reflect.soft = True
    soft = make_step_shapes(config, policy.shapes, texts, 600, 90)
    assert [q.replies for q in soft.questions.values()] == [4, 4]
    config.reflect.enabled = False
    plain = make_step_shapes(config, policy.shapes, texts, 600, 90)
    assert plain == shapes._replace(questions={})


def test_a_config_without_labels_counts_those_of_the_default(folder: Path) -> None:
    config = default()
    config.policy.path, config.data.train.labels = str(folder), ""
    policy, texts = read_policy_shapes(config)
    config.reflect.soft = True
    # Two spellings of each of the eight labels of mikels8.
    found = make_step_shapes(config, policy.shapes, texts, 2000, 90).questions
    assert found["coherence"].replies == 16


def test_without_lengths_it_is_the_longest_step_of_the_config() -> None:
    config = default()
    config.policy.path = "Qwen/Qwen2.5-VL-7B-Instruct@main"
    policy, texts = read_policy_shapes(config)
    assert policy == published("Qwen/Qwen2.5-VL-7B-Instruct") and texts is QWEN_TEMPLATE_TOKENS
    config.data.train.kind = "parquet"
    shapes = make_step_shapes(config, policy.shapes, texts)
    assert (shapes.prompts, shapes.prompt_tokens, shapes.response_tokens) == (512, 2048, 2048)
    # A drawn scene of 112 pixels takes 4 x 4 tokens.
    config.data.train.kind = "emoscenes"
    assert make_step_shapes(config, policy.shapes, texts).prompt_tokens == 16 + 154 + 16
