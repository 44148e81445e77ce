"""Live against torch and transformers, on strong random policies."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import model_goldens as goldens  # noqa: E402

from emor3_jax import models  # noqa: E402
from emor3_jax.models import weights  # noqa: E402
from emor3_jax.models.params import leaves  # noqa: E402
from emor3_jax.rollout.engine import Engine, Plan  # noqa: E402
from emor3_jax.rollout.sampling import Sampling  # noqa: E402
from emor3_jax.rollout.slots import Admission  # noqa: E402

CASES = [(family, tied) for family in goldens.MODELS for tied in (True, False)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{'' if c[1] else 'un'}tied")
def case(request) -> tuple[str, bool]:
    """Family, and whether the head is tied."""
    return request.param


@pytest.fixture(scope="module")
def name(case) -> str:
    return f"{case[0]} {'tied' if case[1] else 'untied'}"


@pytest.fixture(scope="module")
def oracle(case):
    """The model of transformers."""
    return goldens.strong_model(*case, seed=7)


@pytest.fixture(scope="module")
def loaded(oracle, tmp_path_factory) -> models.LoadedPolicy:
    """The same policy, read from the folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("policy")
    oracle.save_pretrained(folder)
    policy = models.read_config(folder)
    return models.LoadedPolicy(policy, weights.read_params(folder, policy))


def test_committed_goldens_are_what_transformers_says_today(tmp_path):
    goldens.write(tmp_path)
    for name in (f"{family}/{head}" for family in goldens.MODELS for head in ("tied", "untied")):
        with (
            np.load(tmp_path / name / "golden.npz") as new,
            np.load(goldens.GOLDEN / name / "golden.npz") as old,
        ):
            assert set(new) == set(old)
            for key in old:
                np.testing.assert_allclose(new[key], old[key], atol=1e-4, err_msg=key)
        old_policy = models.read_config(goldens.GOLDEN / name)
        assert old_policy == models.read_config(tmp_path / name)
        jax.tree.map(
            np.testing.assert_array_equal,
            weights.read_params(tmp_path / name, old_policy),
            weights.read_params(goldens.GOLDEN / name, old_policy),
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", [1, 2])
def test_logits(oracle, loaded, name, compare, side, seed):
    batch = goldens.make_batch(seed, side)
    with torch.no_grad():
        expected = oracle(**goldens.torch_inputs(batch)).logits.numpy()
    mask = batch["attention_mask"].astype(bool)
    assert 3 < expected[mask].std() < 5
    actual = models.forward_logits(loaded, **batch)
    case = f"logits, {name}, rows with 0, 1 and 2 images, {side} padding, seed {seed}"
    compare(case, actual[mask], expected[mask], 1e-4)


def test_logits_of_text_alone(oracle, loaded, name, compare):
    ids = np.random.default_rng(5).integers(0, 70, (2, 30))
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor(ids)).logits.numpy()
    actual = models.forward_logits(loaded, ids, np.ones_like(ids))
    compare(f"logits, {name}, no image in the batch", actual, expected, 1e-4)


def test_logits_of_the_hubs_form(oracle, loaded, name, compare, tmp_path):
    """The folder in the hub's form: its config.json and names, several files."""
    models.save(loaded, tmp_path, max_file_bytes=30_000)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" in written.get("text_config", written)
    policy = models.read_config(tmp_path)
    again = models.LoadedPolicy(policy, weights.read_params(tmp_path, policy))
    batch = goldens.make_batch(3, "right")
    with torch.no_grad():
        expected = oracle(**goldens.torch_inputs(batch)).logits.numpy()
    mask = batch["attention_mask"].astype(bool)
    actual = models.forward_logits(again, **batch)
    compare(f"logits, {name}, the hub's form, several files", actual[mask], expected[mask], 1e-4)


def image_prompt(image_token: int, merged: tuple[int, int], seed: int = 3) -> dict[str, np.ndarray]:
    """One row with one image of so many merged cells, as transformers lays it out."""
    rng = np.random.default_rng(seed)
    rows, columns = merged
    ids = np.array([[1, 2, 72, *[image_token] * (rows * columns), 73, 3]])
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(4 * rows * columns, 96)).astype(np.float32),
        "image_grid_thw": np.array([[1, 2 * rows, 2 * columns]]),
    }


GRIDS = [(1, 1), (1, 7), (2, 2), (3, 5), (4, 4), (5, 13), (6, 2), (16, 15), (11, 23), (40, 60)]
"""Merged cells; a window is 2 x 2 of them."""


@pytest.mark.parametrize("merged", GRIDS, ids=str)
def test_image_features_and_positions_for_many_grids(oracle, loaded, name, compare, merged):
    policy, image_token = loaded.policy, loaded.shapes.image_token_id
    batch = image_prompt(image_token, merged)
    ids, grids = batch["input_ids"], torch.tensor(batch["image_grid_thw"])
    prompt, images, following = models.pack(policy, **batch)
    with torch.no_grad():
        visual = oracle.model.visual(torch.tensor(batch["pixel_values"]), grid_thw=grids)
        types = torch.tensor(ids == image_token).int()
        positions, delta = oracle.model.get_rope_index(torch.tensor(ids), types, grids)
    assert (prompt.positions[0] == positions[:, 0].T.numpy()).all()
    assert following[0] == ids.shape[1] + int(delta)
    features = np.asarray(jax.jit(policy.encode_images)(loaded.params, images))
    slots = prompt.image_slots[0][ids[0] == image_token]
    expected = [visual.pooler_output, *getattr(visual, "deepstack_features", [])]
    case = f"image features, {name}, {merged[0]} x {merged[1]} cells"
    compare(case, features[0][slots], torch.cat(expected, dim=-1).numpy(), 1e-4)


@pytest.mark.parametrize("attention", ["xla", "splash_interpret"])
def test_logits_of_a_long_prompt(oracle, loaded, name, compare, attention):
    """Long enough for the kernels: 391 image tokens, 1,564 patches."""
    policy = loaded.policy.with_compute(attention=attention)
    batch = image_prompt(policy.shapes.image_token_id, (17, 23))
    with torch.no_grad():
        expected = oracle(**goldens.torch_inputs(batch)).logits.numpy()
    actual = models.forward_logits(models.LoadedPolicy(policy, loaded.params), **batch)
    compare(f"logits, {name}, 17 x 23 cells, attention {attention}", actual, expected, 1e-4)


def test_bfloat16(oracle, loaded, name, enter):
    """Our bfloat16 is no further from float32 than that of transformers, over eight batches."""
    half = copy.deepcopy(oracle).bfloat16()
    policy = loaded.policy.with_compute(dtype=jnp.bfloat16)

    @jax.jit
    def logits(params, prompt, images):
        features = policy.encode_images(params, images)
        hidden, _ = policy.read_prompt(params, prompt, features)
        return policy.logits(params, hidden)

    ours, theirs = [], []
    for seed in range(8):
        batch = goldens.make_batch(seed, "right")
        inputs = goldens.torch_inputs(batch)
        mask = batch["attention_mask"].astype(bool)
        prompt, images, _ = models.pack(policy, **batch)
        with torch.no_grad():
            exact = oracle(**inputs).logits.numpy()[mask]
            theirs.append(np.abs(half(**inputs).logits.float().numpy()[mask] - exact))
        ours.append(np.abs(np.asarray(logits(loaded.params, prompt, images))[prompt.mask] - exact))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    mean, largest = ours.mean() / theirs.mean(), ours.max() / theirs.max()
    case = f"bfloat16, {name}, error over that of transformers' bfloat16"
    enter(case, float(max(mean, largest)), float(mean), 1.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_rollout(oracle, loaded, name, enter, seed):
    """The sampler of the rollout against `generate` of transformers, 32 tokens."""
    policy, params, shapes = loaded.policy, loaded.params, loaded.shapes
    batch = goldens.make_batch(seed, "left")
    suppressed = list(range(shapes.image_token_id, shapes.vocab_size))
    with torch.no_grad():
        expected = oracle.generate(
            **goldens.torch_inputs(batch),
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            suppress_tokens=suppressed,
        )[:, -32:].numpy()
    prompt, images, following = models.pack(policy, **batch)
    lengths = prompt.mask.sum(axis=1)
    rows = np.arange(len(lengths))
    prompt.mask[rows, lengths - 1] = False
    prefix = jax.jit(policy.prefill)(params, prompt, images)
    last = prompt.tokens[rows, lengths - 1]
    engine = Engine(
        policy,
        Sampling(max_tokens=32, temperature=0.0, top_p=1.0, stop=()),
        Plan(block=8),
        group_size=2,
        num_shards=1,
        suppressed=np.isin(np.arange(shapes.vocab_size), suppressed),
    )
    admission = Admission(np.int32(rows), last, following - 1, prefix)
    (found,) = engine.run(params, iter([admission]), len(rows), jax.random.key(0))
    samples = found.samples
    different = np.asarray(samples.tokens) != expected[:, None]
    case = f"greedy tokens that differ, {name}, 3 rows x 32, seed {seed}"
    enter(case, float(different.sum()), float(different.mean()), 0.0)


def test_gradients(oracle, loaded, name, enter):
    """Of the mean log-probability of the text, by every parameter, vision tower included."""
    policy = loaded.policy
    batch = goldens.make_batch(1, "right")
    mask = batch["attention_mask"].astype(bool)
    wanted = mask[:, 1:] & (batch["input_ids"][:, 1:] < policy.shapes.image_token_id)

    inputs = goldens.torch_inputs(batch)
    logp = oracle(**inputs).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    oracle.zero_grad()
    logp[torch.tensor(wanted)].mean().backward()
    expected = {
        policy.family.hub_name(name): parameter.grad.numpy()
        for name, parameter in oracle.named_parameters()
    }

    prompt, images, _ = models.pack(policy, **batch)

    @jax.jit
    @jax.grad
    def gradient(params):
        features = policy.encode_images(params, images)
        hidden, _ = policy.read_prompt(params, prompt, features)
        logprobs, _ = policy.logprobs(params, hidden[:, :-1], prompt.tokens[:, 1:], chunk=16)
        return jnp.sum(jnp.where(wanted, logprobs, 0.0)) / wanted.sum()

    actual = {
        tensor.name: weights.fetch(path, leaf, tensor)
        for path, leaf in leaves(gradient(loaded.params))
        for tensor in policy.family.hub_tensors(path, leaf.shape, policy.shapes)
    }
    assert set(actual) == set(expected)
    relative = {
        key: np.abs(actual[key] - tensor).max() / np.abs(tensor).max()
        for key, tensor in expected.items()
    }
    worst, mean = max(relative.values()), float(np.mean(list(relative.values())))
    case = f"gradients of {len(relative)} tensors, {name}, over the tensor's largest"
    enter(case, float(worst), mean, 3e-5)


def test_transformers_loads_what_is_saved(oracle, loaded, tmp_path):
    models.save(loaded, tmp_path)
    theirs, info = type(oracle).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = oracle.state_dict()
    for name, tensor in theirs.float().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_configs_of_both_forms_agree_with_transformers(case, oracle, loaded):
    ours = type(oracle.config)(**loaded.shapes.to_hf())
    assert models.parse_config(ours.to_dict()).shapes == loaded.shapes
    theirs = goldens.hf_config(*case)
    for part in ("text_config", "vision_config"):
        a, b = getattr(ours, part).to_dict(), getattr(theirs, part).to_dict()
        for config in (a, b):  # The hub's files name the kind of rope a second time.
            config["rope_parameters"].pop("type", None)
        ignored = {"dtype", "max_window_layers", "tokens_per_second", "tie_word_embeddings"}
        different = {key for key in set(a) & set(b) if a[key] != b[key]} - ignored
        assert not different, (part, different)
