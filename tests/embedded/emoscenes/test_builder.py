import io
import pickle

import numpy as np
import pytest
from PIL import Image

from emor3_jax.embedded.emoscenes import builder as builders
from emor3_jax.embedded.emoscenes.draw import draw
from emor3_jax.embedded.emoscenes.scene import Scene, labels

COUNTS = {"train": 12, "test": 7, "shifted_test": 5}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    builders.prepare(folder, counts=COUNTS)
    return folder


def test_splits_have_their_counts_and_styles(data_dir):
    for split, count in COUNTS.items():
        source = builders.load(split, data_dir)
        assert len(source) == count
        for i in range(count):
            scene = Scene.from_json(source[i]["scene"])
            assert scene.style == builders.STYLE_OF_SPLIT[split]
            assert source[i]["label"].decode() == scene.label in labels(scene.style)
        assert len({source[i]["image_id"] for i in range(count)}) == count


def test_images_are_encoded_and_show_the_scene(data_dir):
    record = builders.load("test", data_dir)[3]
    image = Image.open(io.BytesIO(record["image"]))
    expected = draw(Scene.from_json(record["scene"]), 112)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_prepare_finds_what_is_there(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*") if p.is_file()}
    builders.prepare(data_dir, counts=COUNTS)
    assert before == {p: p.stat().st_mtime_ns for p in data_dir.rglob("*") if p.is_file()}
    builders.prepare(tmp_path / "new", counts={"test": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "temporary folders are left"


def test_a_split_drawn_alone_has_the_same_images(data_dir, tmp_path):
    alone = builders.prepare(tmp_path, counts=COUNTS, splits=["test"])
    assert set(alone.info.splits) == {"test"}
    found, whole = builders.load("test", alone.data_dir), builders.load("test", data_dir)
    assert [found[i] for i in range(len(found))] == [whole[i] for i in range(len(whole))]
    with pytest.raises(ValueError, match="splits names 'tests'; counts has train, test"):
        builders.EmoScenesConfig(counts=COUNTS, splits=("tests",))


def test_source_travels_to_workers(data_dir):
    source = builders.load("train", data_dir)
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_no_image_is_in_two_splits_and_seeds_differ():
    counts = dict.fromkeys(builders.STYLE_OF_SPLIT, 300)
    splits = builders.sample_splits(counts, seed=0)
    keys = [scene.key for found in splits.values() for scene in found]
    assert len(set(keys)) == len(keys) == 6 * 300
    assert splits == builders.sample_splits(counts, seed=0)
    assert splits["train"] != builders.sample_splits(counts, seed=1)["train"]


def test_another_count_is_another_dataset(data_dir, tmp_path, capsys, caplog):
    builders.prepare(tmp_path, counts={"test": 2})
    # Nothing is downloaded, and nothing says so.
    assert capsys.readouterr().out == "" and "drawing, once," in caplog.text
    builders.prepare(tmp_path, counts={"test": 3})
    with pytest.raises(FileNotFoundError, match="must hold one EmoScenes dataset"):
        builders.load("test", tmp_path)
    builder = builders.prepare(tmp_path, counts={"test": 3})
    assert len(builders.load("test", builder.data_dir)) == 3


def test_errors(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'dev'.*it has"):
        builders.load("dev", data_dir)
    with pytest.raises(FileNotFoundError, match="found none"):
        builders.load("test", tmp_path)
    with pytest.raises(ValueError, match="counts names the split 'dev'"):
        builders.prepare(tmp_path, counts={"dev": 1})
    with pytest.raises(ValueError, match=r"counts\['test'\] is 0"):
        builders.prepare(tmp_path, counts={"test": 0})
    with pytest.raises(ValueError, match="size is 64"):
        builders.prepare(tmp_path, size=64)
