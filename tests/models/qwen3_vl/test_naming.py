import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from emor3_jax import models
from emor3_jax.models import weights
from emor3_jax.models.qwen3_vl.naming import hub_name


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def loaded(request) -> models.LoadedPolicy:
    policy = tiny.make_policy("qwen3_vl", tie_word_embeddings=request.param)
    return models.LoadedPolicy(policy, tiny.strong_params(policy))


def test_folder_round_trip_is_bit_exact(loaded, tmp_path):
    models.save(loaded, tmp_path, max_file_bytes=20_000)
    assert models.read_config(tmp_path) == loaded.policy
    read = weights.read_params(tmp_path, loaded.policy)
    jax.tree.map(np.testing.assert_array_equal, read, loaded.params)
    names = set().union(*map(load_file, tmp_path.glob("model*.safetensors")))
    assert {
        "model.visual.patch_embed.proj.bias",
        "model.visual.pos_embed.weight",
        "model.visual.blocks.1.mlp.linear_fc2.weight",
        "model.visual.blocks.0.norm2.bias",
        "model.visual.merger.norm.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.bias",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "model.language_model.norm.weight",
    } <= names
    assert ("lm_head.weight" in names) != loaded.shapes.tie_word_embeddings


def test_names_without_the_first_part_are_read(loaded, tmp_path):
    models.save(loaded, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        name.replace("model.visual", "visual").replace("model.language_model", "model"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    read = weights.read_params(tmp_path, loaded.policy)
    jax.tree.map(np.testing.assert_array_equal, read, loaded.params)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.visual.pos_embed.weight", "model.visual.pos_embed.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_canonical_names(key, name):
    assert hub_name(key) == name
