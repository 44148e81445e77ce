"""The base policy of faces, in small: both stages, the saved folder, refused configs."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support.tiny_faces import COUNT

from emor3_jax.config import ConfigError
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.embedded import base_policy
from emor3_jax.embedded.faces import tasks
from emor3_jax.embedded.loader import ExampleLoader
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import LoadedPolicy, load, save
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import make_mesh


@pytest.mark.long
def test_a_base_policy_of_faces_trains_its_vision_then_on_examples(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # As a run that finds none trains it: on a device of its own, with a mesh set.
    with jax.set_mesh(make_mesh()), hosts.on_own_devices():
        scores = base_policy.train(config, tmp_path / "policy")
    assert set(scores) == {"look", "begin", "describe", "consistency", "coherence"}
    # Brightness alone tells the label; by chance it would be 1 in 7.
    assert scores["look"] > 0.3 and scores["begin"] > 0.2
    told = capsys.readouterr().out
    assert "vision pretraining: step 24/24" in told and "QA examples: step 3/3" in told
    assert f"{COUNT} images" in told
    policy = load(tmp_path / "policy")
    settings = InferenceSettings.read(tmp_path / "policy")
    assert (settings.labels, settings.question) == (tasks.LABELS, "which emotion ?")
    assert "<step1> seen" in settings.prompt and settings.max_tokens == 64
    assert policy.shapes.vision.patch_size == 4 and policy.shapes.vision.window_size == 16
    _, grid = policy.processor.patches(Image.new("L", (48, 48)))
    assert grid == (1, 4, 4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(policy.params))


def test_a_stopped_run_continues_after_its_vision_pretraining(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokenizer of that policy, whatever the corpus says by now."""
    words = ["which emotion ?", *tasks.LABELS, *tasks.BROWS.values()]
    tokenizer = train_tokenizer([f"{word} {word}" for word in words], 400)
    policy = base_policy.small_policy(config, tokenizer)
    params = policy.init(jax.random.key(7))
    processor = Processor(tokenizer, ImageSettings(256, 256, patch_size=4), policy.layout)
    save(LoadedPolicy(policy, params, processor), tmp_path / "looked")

    def no_examples(config: ConfigDict, loader: ExampleLoader, params: dict, say: object) -> tuple:
        assert loader.processor.tokenizer.get_vocab() == tokenizer.get_vocab()
        return params, {}

    monkeypatch.setattr(base_policy, "pretrain_qa", no_examples)
    assert set(base_policy.train(config, tmp_path)) == {"look", "begin"}
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path).params, params)

    other = ConfigDict(config.to_dict())
    other.model.layers = 2
    with pytest.raises(ConfigError, match=r"(?s)model.*looked; delete that folder"):
        base_policy.train(other, tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    (
        ({"data.kind": "cats"}, r"data\.kind.*emoscenes, faces"),
        ({"model.window": 12}, r"model\.window.*12.*multiple of 8"),
        ({"model.vision_heads": 3}, r"model\.vision_heads.*3.*vision_width=32.*multiple of 4"),
        ({"model.vision_heads": 0}, r"model\.vision_heads.*0.*at least 1"),
        ({"model.vision_heads": 8}, r"model\.vision_heads.*8.*8 or more"),
        ({"model.heads": 5}, r"model\.heads.*5.*model\.width=.* a multiple of 2"),
        ({"model.heads": 4, "model.kv_heads": 3}, r"model\.kv_heads.*3.*divide model\.heads=4"),
        ({"model.vocab_size": 100}, r"model\.vocab_size.*100.*at least 270"),
        ({"look.mix": -0.1}, r"look\.mix.*-0\.1.*0 or more"),
        ({"look.erase": 1.5}, r"look\.erase.*1\.5.*a chance"),
        ({"rates.tower": 0.0}, r"rates\.tower.*0\.0.*over 0"),
        ({"steps": 1}, r"steps.*over warmup_steps=1"),
        ({"look.steps": 2}, r"look\.steps.*over look\.warmup_steps=2"),
    ),
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    config: ConfigDict, tmp_path: Path, changes: dict, named: str
) -> None:
    wrong = ConfigDict(config.to_dict())
    wrong.update_from_flattened_dict(changes)
    wrong.data.path = "nowhere.parquet"
    with pytest.raises(ConfigError, match=named):
        base_policy.train(wrong, tmp_path)


def test_images_that_are_all_held_out_leave_nothing_to_learn_from(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = base_policy.DATASETS[config.data.kind](config)
    less = dataset._replace(held_out=len(dataset.images) - 1)
    monkeypatch.setitem(base_policy.DATASETS, config.data.kind, lambda config: less)
    with pytest.raises(
        ConfigError, match=r"data\.limit.*leaves 1 images to learn from, under batch"
    ):
        base_policy.train(config, tmp_path)
