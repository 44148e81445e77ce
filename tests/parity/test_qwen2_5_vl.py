"""Live against torch and transformers, on strong random policies."""

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from emor3_jax import models  # noqa: E402
from emor3_jax.models.qwen2_5_vl import model, naming, weights  # noqa: E402
from emor3_jax.models.qwen2_5_vl.shapes import Config  # noqa: E402
from emor3_jax.rollout import engine  # noqa: E402
from emor3_jax.rollout.generate import SamplingRule  # noqa: E402

_spec = importlib.util.spec_from_file_location(
    "make_model_goldens", Path(__file__).with_name("make_model_goldens.py")
)
goldens = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(goldens)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def name(tied) -> str:
    return "tied" if tied else "untied"


@pytest.fixture(scope="module")
def oracle(tied):
    """The model of transformers."""
    return goldens.strong_model(goldens.hf_config(tied), seed=7)


@pytest.fixture(scope="module")
def policy(oracle, tmp_path_factory) -> models.Policy:
    """The same policy, read from the folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("policy")
    oracle.save_pretrained(folder)
    config = models.read_config(folder)
    return models.Policy(config, weights.read_params(folder, config))


def test_committed_goldens_are_what_transformers_says_today(tmp_path):
    goldens.write(tmp_path)
    for name in ("tied", "untied"):
        with (
            np.load(tmp_path / name / "golden.npz") as new,
            np.load(goldens.GOLDEN / name / "golden.npz") as old,
        ):
            assert set(new) == set(old)
            for key in old:
                np.testing.assert_allclose(new[key], old[key], atol=1e-4, err_msg=key)
        old_config = models.read_config(goldens.GOLDEN / name)
        assert old_config == models.read_config(tmp_path / name)
        jax.tree.map(
            np.testing.assert_array_equal,
            weights.read_params(tmp_path / name, old_config),
            weights.read_params(goldens.GOLDEN / name, old_config),
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", [1, 2])
def test_logits(oracle, policy, name, compare, side, seed):
    batch = goldens.make_batch(seed, side)
    with torch.no_grad():
        expected = oracle(**goldens.torch_inputs(batch)).logits.numpy()
    mask = batch["attention_mask"].astype(bool)
    assert 3 < expected[mask].std() < 5
    actual = models.forward_logits(policy, **batch)
    case = f"logits, {name}, rows with 0, 1 and 2 images, {side} padding, seed {seed}"
    compare(case, actual[mask], expected[mask], 1e-4)


def test_logits_of_text_alone(oracle, policy, name, compare):
    ids = np.random.default_rng(5).integers(0, 70, (2, 30))
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor(ids)).logits.numpy()
    actual = models.forward_logits(policy, ids, np.ones_like(ids))
    compare(f"logits, {name}, no image in the batch", actual, expected, 1e-4)


def test_logits_of_a_flat_config(oracle, policy, name, compare, tmp_path):
    """The folder in the hub's form: flat config.json, the hub's names, several files."""
    models.save(policy, tmp_path, max_file_bytes=30_000)
    assert "text_config" not in json.loads((tmp_path / "config.json").read_text())
    config = models.read_config(tmp_path)
    again = models.Policy(config, weights.read_params(tmp_path, config))
    batch = goldens.make_batch(3, "right")
    with torch.no_grad():
        expected = oracle(**goldens.torch_inputs(batch)).logits.numpy()
    mask = batch["attention_mask"].astype(bool)
    actual = models.forward_logits(again, **batch)
    compare(f"logits, {name}, flat config, several files", actual[mask], expected[mask], 1e-4)


def image_prompt(config, merged: tuple[int, int], seed: int = 3) -> dict[str, np.ndarray]:
    """One row with one image of so many merged cells, as transformers lays it out."""
    rng = np.random.default_rng(seed)
    rows, columns = merged
    ids = np.array([[1, 2, 72, *[config.image_token_id] * (rows * columns), 73, 3]])
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(4 * rows * columns, 96)).astype(np.float32),
        "image_grid_thw": np.array([[1, 2 * rows, 2 * columns]]),
    }


GRIDS = [(1, 1), (1, 7), (2, 2), (3, 5), (4, 4), (5, 13), (6, 2), (16, 15), (11, 23), (40, 60)]
"""Merged cells; a window is 2 x 2 of them."""


@pytest.mark.parametrize("merged", GRIDS, ids=str)
def test_image_features_and_positions_for_many_grids(oracle, policy, name, compare, merged):
    config = policy.config
    batch = image_prompt(config, merged)
    ids, grids = batch["input_ids"], torch.tensor(batch["image_grid_thw"])
    prompt, images, following = models.pack(config, **batch)
    with torch.no_grad():
        visual = oracle.model.visual(torch.tensor(batch["pixel_values"]), grid_thw=grids)
        types = torch.tensor(ids == config.image_token_id).int()
        positions, delta = oracle.model.get_rope_index(torch.tensor(ids), types, grids)
    assert (prompt.positions[0] == positions[:, 0].T.numpy()).all()
    assert following[0] == ids.shape[1] + int(delta)
    features = np.asarray(
        jax.jit(model.encode_images, static_argnums=0)(config, policy.params, images)
    )
    slots = prompt.image_slots[0][ids[0] == config.image_token_id]
    case = f"image features, {name}, {merged[0]} x {merged[1]} cells"
    compare(case, features[0][slots], visual.pooler_output.numpy(), 1e-4)


@pytest.mark.parametrize("attention", ["xla", "splash_interpret"])
def test_logits_of_a_long_prompt(oracle, policy, name, compare, attention):
    """Long enough for the kernels: 391 image tokens, 1,564 patches."""
    config = dataclasses.replace(policy.config, attention=attention)
    batch = image_prompt(config, (17, 23))
    with torch.no_grad():
        expected = oracle(**goldens.torch_inputs(batch)).logits.numpy()
    actual = models.forward_logits(models.Policy(config, policy.params), **batch)
    compare(f"logits, {name}, 17 x 23 cells, attention {attention}", actual, expected, 1e-4)


def test_bfloat16(oracle, policy, name, enter):
    """Our bfloat16 is no further from float32 than that of transformers, over eight batches."""
    half = copy.deepcopy(oracle).bfloat16()

    @jax.jit
    def logits(params, prompt, images):
        features = model.encode_images(policy.config, params, images, dtype=jnp.bfloat16)
        hidden, _ = model.forward_prompt(
            policy.config, params, prompt, features, dtype=jnp.bfloat16
        )
        return model.logits(policy.config, params, hidden)

    ours, theirs = [], []
    for seed in range(8):
        batch = goldens.make_batch(seed, "right")
        inputs = goldens.torch_inputs(batch)
        mask = batch["attention_mask"].astype(bool)
        prompt, images, _ = models.pack(policy.config, **batch)
        with torch.no_grad():
            exact = oracle(**inputs).logits.numpy()[mask]
            theirs.append(np.abs(half(**inputs).logits.float().numpy()[mask] - exact))
        ours.append(np.abs(np.asarray(logits(policy.params, prompt, images))[prompt.mask] - exact))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    mean, largest = ours.mean() / theirs.mean(), ours.max() / theirs.max()
    case = f"bfloat16, {name}, error over that of transformers' bfloat16"
    enter(case, float(max(mean, largest)), float(mean), 1.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_rollout(oracle, policy, name, enter, seed):
    """The sampler of the rollout against `generate` of transformers, 32 tokens."""
    config, params = policy.config, policy.params
    batch = goldens.make_batch(seed, "left")
    banned = list(range(config.image_token_id, config.vocab_size))
    with torch.no_grad():
        expected = oracle.generate(
            **goldens.torch_inputs(batch),
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            suppress_tokens=banned,
        )[:, -32:].numpy()
    prompt, images, following = models.pack(config, **batch)
    lengths = prompt.mask.sum(axis=1)
    rows = np.arange(len(lengths))
    prompt.mask[rows, lengths - 1] = False
    features = model.encode_images(config, params, images)
    _, prefix = model.forward_prompt(config, params, prompt, features)
    last = prompt.tokens[rows, lengths - 1]
    (found,) = engine.roll_out(
        iter([engine.Opening(np.int32(rows), last, following - 1, prefix)]),
        len(rows),
        jax.random.key(0),
        params,
        jnp.isin(jnp.arange(config.vocab_size), jnp.array(banned)),
        config=config,
        responses=2,
        rule=SamplingRule(max_tokens=32, temperature=0.0, top_p=1.0, stop=()),
        plan=engine.Plan(block=8),
    )
    samples = found.samples
    different = np.asarray(samples.tokens) != expected[:, None]
    case = f"greedy tokens that differ, {name}, 3 rows x 32, seed {seed}"
    enter(case, float(different.sum()), float(different.mean()), 0.0)


def test_gradients(oracle, policy, name, enter):
    """Of the mean log-probability of the text, by every parameter, vision tower included."""
    config = policy.config
    batch = goldens.make_batch(1, "right")
    mask = batch["attention_mask"].astype(bool)
    wanted = mask[:, 1:] & (batch["input_ids"][:, 1:] < config.image_token_id)

    inputs = goldens.torch_inputs(batch)
    logp = oracle(**inputs).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    oracle.zero_grad()
    logp[torch.tensor(wanted)].mean().backward()
    expected = {
        naming.hub_name(name): parameter.grad.numpy()
        for name, parameter in oracle.named_parameters()
    }

    prompt, images, _ = models.pack(config, **batch)

    @jax.jit
    @jax.grad
    def gradient(params):
        features = model.encode_images(config, params, images)
        hidden, _ = model.forward_prompt(config, params, prompt, features)
        logprobs, _ = model.token_logprobs(
            config, params, hidden[:, :-1], prompt.tokens[:, 1:], chunk=16
        )
        return jnp.sum(jnp.where(wanted, logprobs, 0.0)) / wanted.sum()

    actual = {
        tensor.name: weights.fetch(path, leaf, tensor)
        for path, leaf in naming.leaves(gradient(policy.params))
        for tensor in naming.hub_tensors(path, leaf.shape, config)
    }
    assert set(actual) == set(expected)
    relative = {
        key: np.abs(actual[key] - tensor).max() / np.abs(tensor).max()
        for key, tensor in expected.items()
    }
    worst, mean = max(relative.values()), float(np.mean(list(relative.values())))
    case = f"gradients of {len(relative)} tensors, {name}, over the tensor's largest"
    enter(case, float(worst), mean, 3e-5)


def test_transformers_loads_what_is_saved(oracle, policy, tmp_path):
    models.save(policy, tmp_path)
    loaded, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = oracle.state_dict()
    for name, tensor in loaded.float().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_configs_of_both_forms_agree_with_transformers(tied, policy):
    ours = transformers.Qwen2_5_VLConfig(**policy.config.to_hf())
    assert Config.from_hf(ours.to_dict()) == policy.config
    theirs = goldens.hf_config(tied)
    for part in ("text_config", "vision_config"):
        a, b = getattr(ours, part).to_dict(), getattr(theirs, part).to_dict()
        for config in (a, b):  # The hub's files name the kind of rope a second time.
            config["rope_parameters"].pop("type", None)
        ignored = {"dtype", "max_window_layers", "tokens_per_second", "tie_word_embeddings"}
        different = {key for key in set(a) & set(b) if a[key] != b[key]} - ignored
        assert not different, (part, different)
