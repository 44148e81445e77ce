import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from emor3_jax import models
from emor3_jax.models import weights
from emor3_jax.models.errors import ShapesError, WeightsError
from emor3_jax.models.params import count_params, leaves


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def loaded(request):
    policy = tiny.make_policy(tie_word_embeddings=request.param)
    return models.LoadedPolicy(policy, tiny.strong_params(policy))


def _equal(a, b) -> bool:
    a, b = jax.device_get((a, b))
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and (x == y).all(), a, b)
    return all(jax.tree.leaves(same))


def to_hub(params, policy) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by their name on the hub."""
    return {
        tensor.name: weights.fetch(path, leaf, tensor)
        for path, leaf in leaves(params)
        for tensor in policy.family.hub_tensors(path, leaf.shape, policy.shapes)
    }


def test_folder_round_trip_is_bit_exact(loaded, tmp_path):
    models.save(loaded, tmp_path)
    assert models.read_config(tmp_path) == loaded.policy
    assert _equal(weights.read_params(tmp_path, loaded.policy), loaded.params)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"visual.patch_embed.proj.weight", "visual.merger.mlp.2.bias"} <= names
    assert {"model.layers.1.self_attn.q_proj.bias", "model.norm.weight"} <= names
    assert ("lm_head.weight" in names) != loaded.shapes.tie_word_embeddings


def test_layout_of_a_tensor_on_disk(loaded):
    tensors = to_hub(loaded.params, loaded.policy)
    kernel = loaded.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (tensors["model.layers.1.mlp.up_proj.weight"] == kernel[1].T).all()
    embed = tensors["visual.patch_embed.proj.weight"]
    assert embed.shape == (16, 3, 2, 4, 4)
    assert embed[5, 2, 1, 3, 0] == loaded.params["visual"]["patch_embed"]["kernel"][92, 5]


def test_other_names_several_files_and_bfloat16_are_read(loaded, tmp_path):
    tensors = {}
    for name, tensor in to_hub(loaded.params, loaded.policy).items():
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
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), loaded.params)
    assert _equal(weights.read_params(tmp_path, loaded.policy), rounded)


def test_many_files_and_their_index_as_transformers_writes_them(loaded, tmp_path):
    models.save(loaded, tmp_path, max_file_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[1].name == f"model-00002-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 30_000 for path in files)
    index = json.loads((tmp_path / weights.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * count_params(loaded.params)
    found = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == found
    assert _equal(weights.read_params(tmp_path, loaded.policy), loaded.params)


def test_saving_leaves_no_file_of_an_earlier_policy(loaded, tmp_path):
    models.save(loaded, tmp_path, max_file_bytes=20_000)
    models.save(loaded, tmp_path)
    left = [path.name for path in tmp_path.iterdir()]
    assert sorted(left) == ["config.json", "model.safetensors"]
    assert _equal(weights.read_params(tmp_path, loaded.policy), loaded.params)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_types_are_kept_where_asked_for(loaded, tmp_path, kind):
    rounded = jax.tree.map(lambda x: x.astype(kind), loaded.params)
    models.save(models.LoadedPolicy(loaded.policy, rounded), tmp_path)
    stored = load_file(tmp_path / weights.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(kind)}
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["torch_dtype"] == np.dtype(kind).name
    assert _equal(weights.read_params(tmp_path, loaded.policy, dtype=None), rounded)
    narrow = weights.read_params(tmp_path, loaded.policy, dtype=jnp.bfloat16)
    assert _equal(narrow, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), rounded))


def test_layers_of_several_types_are_read_as_the_widest(policy, params, tmp_path):
    tensors = to_hub(params, policy)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {
        key: tensor.astype(np.float64 if key == name else ml_dtypes.bfloat16)
        for key, tensor in tensors.items()
    }
    save_file(tensors, tmp_path / weights.WEIGHTS_FILE)
    read = weights.read_params(tmp_path, policy, dtype=None)
    kernel = read["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == np.float32
    assert (kernel[1] == params["model"]["layers"]["mlp"]["up_proj"]["kernel"][1]).all()
    assert read["model"]["layers"]["mlp"]["down_proj"]["kernel"].dtype == jnp.bfloat16


def test_a_tied_checkpoint_may_repeat_its_head(policy, params, tmp_path):
    tensors = to_hub(params, policy)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert _equal(weights.read_params(tmp_path, policy), params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from the embedding.*to false"):
        weights.read_params(tmp_path, policy)


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
def test_tensors_that_do_not_fit_are_named(policy, params, tmp_path, changes, message):
    models.save(models.LoadedPolicy(policy, params), tmp_path)
    with pytest.raises(WeightsError, match=message):
        weights.read_params(tmp_path, tiny.make_policy(**changes))


def test_quantised_weights_are_refused(policy, params, tmp_path):
    tensors = to_hub(params, policy)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, tmp_path / weights.WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=f"{name} is stored as I8; only F64, F32"):
        weights.read_params(tmp_path, policy)
    tensors["model.layers.0.mlp.up_proj.qweight"] = tensors.pop(name)
    save_file(tensors, tmp_path / weights.WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=r"a tensor .*up_proj\.qweight: quantised weights"):
        weights.read_params(tmp_path, policy)


@pytest.mark.parametrize("end", ["scales", "weight_scale_inv", "weight_scale_2", "SCB"])
def test_quantised_weights_are_known_by_the_names_beside_them(policy, params, tmp_path, end):
    name = f"model.layers.0.mlp.up_proj.{end}"
    save_file(to_hub(params, policy) | {name: np.ones(4)}, tmp_path / weights.WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=f"a tensor {name}: quantised weights"):
        weights.check(tmp_path, policy)


def test_names_of_another_program_are_shown(policy, params, tmp_path):
    tensors = {f"tower.{name}": tensor for name, tensor in to_hub(params, policy).items()}
    save_file(tensors, tmp_path / weights.WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=r"no tensor .*another program.*, tower\..*the hub"):
        weights.check(tmp_path, policy)


def test_two_tensors_for_one_parameter_are_named(policy, params, tmp_path):
    models.save(models.LoadedPolicy(policy, params), tmp_path, max_file_bytes=20_000)
    twice = {"model.language_model.norm.weight": np.ones(32, np.float32)}
    save_file(twice, tmp_path / "model-0.safetensors")
    index = json.loads((tmp_path / weights.INDEX_FILE).read_text())
    index["weight_map"]["model.language_model.norm.weight"] = "model-0.safetensors"
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"two tensors for model\.norm\.weight: .*model-0\.safe"):
        weights.check(tmp_path, policy)


def test_files_of_weights_may_be_read_by_whom_the_others_may(policy, params, tmp_path):
    models.save(models.LoadedPolicy(policy, params), tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_torn_or_missing_file_is_named(policy, params, tmp_path):
    models.save(models.LoadedPolicy(policy, params), tmp_path, max_file_bytes=20_000)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=f"{file.name} is not a whole safetensors file"):
        weights.read_params(tmp_path, policy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} does not exist.*incomplete"):
        weights.read_params(tmp_path, policy)


def test_missing_files_are_named(tmp_path, policy):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        weights.read_params(tmp_path, policy)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShapesError, match="is no JSON"):
        models.read_config(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_the_tensors_name(loaded, tmp_path, value):
    models.save(loaded, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = value
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=rf"^{name} holds numbers that are not finite"):
        weights.read_params(tmp_path, loaded.policy)


def test_a_single_file_goes_before_an_index_as_in_transformers(loaded, tmp_path, caplog):
    models.save(loaded, tmp_path, max_file_bytes=20_000)
    other = jax.tree.map(lambda x: x + 1, loaded.params)
    models.save(models.LoadedPolicy(loaded.policy, other), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert _equal(weights.read_params(tmp_path, loaded.policy), other)
    assert "the first is read" in caplog.text


def test_a_damaged_index_is_named(loaded, tmp_path):
    models.save(loaded, tmp_path, max_file_bytes=20_000)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'):
        (tmp_path / weights.INDEX_FILE).write_text(text)
        with pytest.raises(WeightsError, match=r"index.json (is damaged|is no JSON|must hold)"):
            weights.read_params(tmp_path, loaded.policy)
