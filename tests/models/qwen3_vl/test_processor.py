"""Images and folders as the hub's Qwen3-VL policies have them."""

import json

import numpy as np
import pytest
from PIL import Image
from support import tiny
from transformers import Qwen2VLImageProcessorPil

from emor3_jax import models
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.processor import ImageSettings, Processor

HUB = {
    "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def test_settings_of_the_hubs_file():
    settings = ImageSettings.from_hf(HUB)
    assert (settings.min_pixels, settings.max_pixels) == (65_536, 16_777_216)
    assert settings.patch_size == 16 and settings.mean == settings.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (500, 333), (70, 900)])
def test_patches_are_those_of_transformers(height, width):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    layout = models.published("Qwen/Qwen3-VL-4B-Instruct").layout
    processor = Processor(None, ImageSettings.from_hf(HUB), layout)
    patches, grid = processor.patches(image)
    theirs = Qwen2VLImageProcessorPil(**HUB)(image, return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    np.testing.assert_allclose(patches, theirs["pixel_values"], atol=1e-6, rtol=0)
    _, tokens, windows = processor.read_sizes(height, width)
    assert tokens == len(patches) // 4 and windows == -(-len(patches) // 64)
    assert len(processor.encode(image).slots) == tokens


def test_a_folder_says_whose_processor_reads_it(tmp_path):
    policy = tiny.make_policy("qwen3_vl")
    tokenizer = train_tokenizer(["a quiet street in the rain"] * 4, 300)
    settings = ImageSettings(64, 32 * 32, patch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    processor = Processor(tokenizer, settings, policy.layout)
    loaded = models.LoadedPolicy(policy, tiny.strong_params(policy), processor)
    models.save(loaded, tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["processor_class"] == "Qwen3VLProcessor"
    again = models.load(tmp_path)
    assert again.policy == policy and again.processor.images == settings


def test_a_folder_of_transformers_5_keeps_its_settings_of_videos(tmp_path):
    """They lie in `processor_config.json` beside those of images, which are written anew."""
    policy = tiny.make_policy("qwen3_vl")
    tokenizer = train_tokenizer(["a quiet street in the rain"] * 4, 300)
    settings = ImageSettings(64, 32 * 32, patch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    processor = Processor(tokenizer, settings, policy.layout)
    source, folder = tmp_path / "source", tmp_path / "folder"
    models.save(models.LoadedPolicy(policy, tiny.strong_params(policy), processor), source)
    images = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").unlink()
    videos = {"size": {"longest_edge": 25_165_824}, "video_processor_type": "Qwen3VLVideoProcessor"}
    whole = {"image_processor": images, "video_processor": videos}
    (source / "processor_config.json").write_text(json.dumps(whole))
    models.save(models.load(source), folder)
    assert json.loads((folder / "video_preprocessor_config.json").read_text()) == videos
    assert not (folder / "processor_config.json").exists()
    assert models.load(folder).processor.images == settings
