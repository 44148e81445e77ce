"""A whole policy, tokenizer and image settings included, through a folder."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from emor3_jax import models
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.processor import ImageSettings, Processor


@pytest.fixture(scope="module")
def folder(policy, params, tmp_path_factory):
    tokenizer = train_tokenizer(["a quiet street in the rain"] * 4, 300)
    settings = ImageSettings(patch_size=4, min_pixels=64, max_pixels=32 * 32)
    folder = tmp_path_factory.mktemp("policy") / "made" / "on" / "the" / "way"
    processor = Processor(tokenizer, settings, policy.layout)
    models.save(models.LoadedPolicy(policy, params, processor), folder)
    return folder


def test_load_gives_back_what_was_saved(folder, policy, params):
    loaded = models.load(folder)
    assert loaded.policy == policy
    ids = np.array([[5, 6, 7]])
    before = models.forward_logits(models.LoadedPolicy(policy, params), ids, np.ones_like(ids))
    assert (models.forward_logits(loaded, ids, np.ones_like(ids)) == before).all()
    text = "a quiet é street"
    tokenizer = loaded.processor.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_transformers_reads_the_same_text_and_images(folder):
    policy = models.load(folder)
    text = "a street in the rain"
    theirs = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert policy.processor.tokenizer(text).input_ids == theirs

    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    patches, grid = policy.processor.patches(encoded.getvalue())
    reader = Qwen2VLImageProcessorPil.from_pretrained(folder)
    theirs = reader(Image.fromarray(pixels), return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=1e-5)


def test_config_is_in_the_naming_of_the_hub(folder):
    data = json.loads((folder / "config.json").read_text())
    assert data["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert data["num_hidden_layers"] == 2 and data["vision_config"]["in_chans"] == 3


def test_what_a_folder_has_besides_goes_along(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"top_p": 0.8}')
    (folder / "LICENSE").write_text("Apache 2.0")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "model.safetensors.index.json").write_text("{}")
    models.save(models.load(folder), tmp_path)
    assert (tmp_path / "generation_config.json").read_text() == '{"top_p": 0.8}'
    assert (tmp_path / "LICENSE").read_text() == "Apache 2.0"
    assert not (tmp_path / "modeling_own.py").exists()
    assert not (tmp_path / "model.safetensors.index.json").exists()
