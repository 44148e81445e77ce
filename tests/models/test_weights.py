import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emor3_jax import models
from emor3_jax.models.qwen2_5_vl import weights


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def policy(request, build_config, build_params):
    config = build_config(tie_word_embeddings=request.param)
    return models.Policy(config, build_params(config))


def _equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and (x == y).all(), a, b)
    return all(jax.tree.leaves(same))


def test_folder_round_trip_is_bit_exact(policy, tmp_path):
    models.save(policy, tmp_path)
    assert models.read_config(tmp_path) == policy.config
    assert _equal(weights.params_from_hf(tmp_path, policy.config), policy.params)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"visual.patch_embed.proj.weight", "visual.merger.mlp.2.bias"} <= names
    assert {"model.layers.1.self_attn.q_proj.bias", "model.norm.weight"} <= names
    assert ("lm_head.weight" in names) != policy.config.tie_word_embeddings


def test_layout_of_a_tensor_on_disk(policy):
    tensors = weights.params_to_hf(policy.params, policy.config)
    kernel = policy.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (tensors["model.layers.1.mlp.up_proj.weight"] == kernel[1].T).all()
    embed = tensors["visual.patch_embed.proj.weight"]
    assert embed.shape == (16, 3, 2, 4, 4)
    assert embed[5, 2, 1, 3, 0] == policy.params["visual"]["patch_embed"]["kernel"][92, 5]


def test_other_names_several_files_and_bfloat16_are_read(policy, tmp_path):
    tensors = {}
    for name, tensor in weights.params_to_hf(policy.params, policy.config).items():
        if name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        elif name.startswith("visual."):
            name = f"model.{name}"
        tensors[name] = tensor.astype(ml_dtypes.bfloat16)
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps({"weight_map": where}))
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), policy.params)
    assert _equal(weights.params_from_hf(tmp_path, policy.config), rounded)


def test_saving_one_file_over_several_leaves_no_index(policy, tmp_path):
    (tmp_path / weights.INDEX_FILE).write_text("{}")
    models.save(policy, tmp_path)
    assert _equal(weights.params_from_hf(tmp_path, policy.config), policy.params)


def test_a_tied_checkpoint_may_repeat_its_head(config, params, tmp_path):
    tensors = weights.params_to_hf(params, config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert _equal(weights.params_from_hf(tmp_path, config), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "lm_head.weight; probably config.json says .* not tied"),
        ({"num_layers": 3}, "model.layers.2.*of a larger model"),
        ({"num_layers": 1}, "model.layers.1.*of a smaller model"),
        ({"intermediate_size": 40}, r"shape \[32, 48\], but config.json implies \[32, 40\]"),
        ({"vocab_size": 81}, r"embed_tokens.weight has shape \[80, 32\].*\[81, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    build_config, config, params, tmp_path, changes, message
):
    models.save(models.Policy(config, params), tmp_path)
    with pytest.raises(weights.WeightsError, match=message):
        weights.params_from_hf(tmp_path, build_config(**changes))


def test_missing_files_are_named(tmp_path, config):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        weights.params_from_hf(tmp_path, config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(models.ConfigError, match="not JSON"):
        models.read_config(tmp_path)
