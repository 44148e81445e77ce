"""Policies by folder and by id on the hub: a cache in its layout, without a network."""

import json

import pytest
from support import tiny

from emor3_jax import models
from emor3_jax.models.errors import ShapesError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch, policy, params):
    """A cache of huggingface_hub with one policy that was downloaded once."""
    repository = tmp_path / "models--Someone--Tiny-VL"
    snapshot = repository / "snapshots" / REVISION
    models.save(models.LoadedPolicy(policy, params), snapshot)
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = blobs / f"{number:040x}"
        file.rename(blob)
        file.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("name", ["Someone/Tiny-VL", "Someone/Tiny-VL@main"])
def test_an_id_on_the_hub_is_found_in_the_cache(cache, name, policy):
    folder = models.find(name)
    assert folder.resolve() == cache.resolve()
    assert models.read_config(folder) == policy


def test_a_revision_is_found_by_its_commit(cache):
    assert models.find(f"Someone/Tiny-VL@{REVISION}").resolve() == cache.resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, r"Someone/Tiny-VL on the hub: .*\(Qwen3-VL-MoE\), which"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"on the hub: .*config \(fp8\): quant"),
    ],
)
def test_what_cannot_be_loaded_is_not_downloaded(cache, monkeypatch, changes, message):
    def download(*_: object, **__: object) -> None:
        pytest.fail("weights are downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    file = cache / "config.json"
    data = json.loads(file.read_text()) | changes
    file.unlink()
    file.write_text(json.dumps(data))
    with pytest.raises(ShapesError, match=message):
        models.find("Someone/Tiny-VL")


def test_what_is_neither_folder_nor_on_the_hub_is_named(cache):
    with pytest.raises(FileNotFoundError, match="no folder Someone/Else, and the hub gave no"):
        models.find("Someone/Else")
    with pytest.raises(FileNotFoundError, match="no folder runs/some/policy, and an id on the hub"):
        models.find("runs/some/policy")


def test_a_folder_of_the_name_wins(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Someone" / "Tiny-VL").mkdir(parents=True)
    (tmp_path / "Someone" / "Tiny-VL" / "config.json").write_text(json.dumps({}))
    assert str(models.find("Someone/Tiny-VL")) == "Someone/Tiny-VL"


def test_a_folder_with_an_adapter_alone_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds an adapter alone: merge it"):
        models.read_config(tmp_path)


def test_an_adapter_beside_a_policy_is_named_since_transformers_would_read_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.make_policy("qwen3_vl").shapes.to_hf()))
    assert models.read_config(tmp_path) == tiny.make_policy("qwen3_vl")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ShapesError, match=r"adapter_config\.json lies beside .* merge it into"):
        models.read_config(tmp_path)
