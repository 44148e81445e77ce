"""From a config to the policy of a run."""

import importlib.util
from pathlib import Path

import pytest

from emor3_jax import prepare
from emor3_jax.config import ConfigError, default
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import Policy, save
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor
from emor3_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = Path(__file__).parent / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("models_conftest", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = tiny.make_config()
    processor = Processor(
        train_tokenizer(["a street"], 300),
        ImageSettings(patch_size=4, min_pixels=256, max_pixels=1024),
    )
    folder = tmp_path_factory.mktemp("policy")
    save(Policy(config, tiny.strong_params(config), processor), folder)
    return folder


def load(folder, **data) -> Policy:
    config = default()
    config.policy.path = str(folder)
    config.data.update(data)
    return prepare.load_policy(config, print, make_mesh())


def test_picture_sizes_are_the_folders_unless_the_config_says_others(folder):
    images = load(folder).processor.images
    assert (images.min_pixels, images.max_pixels) == (256, 1024)
    images = load(folder, max_pixels=512).processor.images
    assert (images.min_pixels, images.max_pixels) == (256, 512)
    assert images.patch_size == 4
    with pytest.raises(ConfigError, match=r"data\.min_pixels=2000: is over data\.max_pixels=1024"):
        load(folder, min_pixels=2000)


def test_parameters_lie_on_the_mesh(folder):
    policy = load(folder)
    assert policy.params["model"]["norm"]["scale"].sharding.mesh.shape["fsdp"] == 1
    assert policy.config.attention == "xla"


@pytest.mark.parametrize(
    ("chosen", "dtype", "platform", "found"),
    [
        ("auto", "bfloat16", "tpu", "splash"),
        ("auto", "float32", "tpu", "splash"),
        ("auto", "bfloat16", "gpu", "cudnn"),
        ("auto", "float32", "gpu", "xla"),
        ("auto", "bfloat16", "cpu", "xla"),
        ("xla", "bfloat16", "tpu", "xla"),
        ("splash", "bfloat16", "tpu", "splash"),
    ],
)
def test_attention_of_a_platform(chosen, dtype, platform, found):
    config = default()
    config.policy.attention, config.policy.dtype = chosen, dtype
    assert prepare.attention_backend(config, platform) == found


def test_a_kernel_of_another_platform_is_refused():
    config = default()
    config.policy.attention = "splash"
    with pytest.raises(ConfigError, match=r"policy\.attention='splash': .*'tpu', this is 'cpu'"):
        prepare.attention_backend(config, "cpu")
