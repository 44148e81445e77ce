"""What all builders share: building once, finding again, copying, splitting, naming faults."""

import concurrent.futures
import io
import json
import logging
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emor3_jax.data.datasets.base import build_dataset
from emor3_jax.data.datasets.catalog import BUILDERS, open_dataset
from emor3_jax.data.datasets.checks import Checks, tolerated
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS


@pytest.fixture
def folder(tmp_path, write):
    root = tmp_path / "EmoSet"
    write["emoset"](root, {"train": 16, "val": 8, "test": 8})
    return root


def test_a_folder_is_built_once_and_found_again(folder, tmp_path):
    data = tmp_path / "data"
    first = open_dataset("emoset", str(folder), "train", data)
    stamps = {p: p.stat().st_mtime_ns for p in data.rglob("*.array_record*")}
    again = open_dataset("emoset", str(folder), "train", data)
    assert len(first) == len(again) == 16 and len(stamps) == 3
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*.array_record*")} == stamps
    # Records refer to the images, which stay where they are.
    image = (folder / "image/awe/awe_00001.jpg").read_bytes()
    assert again[1].images == [image] and again[1].texts.id == "awe_00001"
    assert not [p for p in stamps if "pictures" in p.name]


def test_another_list_makes_another_build(folder, tmp_path):
    data = tmp_path / "data"
    open_dataset("emoset", str(folder), "train", data)
    rows = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(rows[:-1]))
    assert len(open_dataset("emoset", str(folder), "train", data)) == 15


def test_copied_images_need_the_folder_no_more(folder, tmp_path):
    source = open_dataset("emoset", str(folder), "test", tmp_path / "data", copy=True)
    wanted = (folder / "image/amusement/amusement_00024.jpg").read_bytes()
    shutil.rmtree(folder / "image")
    assert source[0].images == [wanted]
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    assert list((tmp_path / "data").rglob("*test_pictures*"))


def test_a_source_keeps_order_finds_ids_and_knows_sizes(folder, tmp_path):
    source = open_dataset("emoset", str(folder), "val", tmp_path / "data")
    texts = list(source.texts())
    assert texts == [source[i].texts for i in range(8)]
    assert [t.answer for t in texts] == list(LABEL_SETS["mikels8"])
    assert [source.find(t.id) for t in texts] == list(range(8))
    assert source.sizes().tolist() == [[24, 32]] * 8 and source.sizes().dtype == np.int32
    assert Image.open(io.BytesIO(source[0].images[0])).size == (32, 24)
    assert pickle.loads(pickle.dumps(source))[5] == source[5]
    with pytest.raises(KeyError):
        source.find("awe_99999")


def test_the_question_can_be_another(folder, tmp_path):
    source = open_dataset("emoset", str(folder), "val", tmp_path / "data", question="which ?")
    assert source[0].texts.question == "which ?"


def test_an_unknown_split_names_those_there(folder, tmp_path):
    with pytest.raises(DataError, match="split='dev': emoset has train, validation, test"):
        open_dataset("emoset", str(folder), "dev", tmp_path / "data")


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_missing_folder_gives_the_instructions(kind, tmp_path):
    with pytest.raises(DataError, match=r"no such folder.*https?://.*path"):
        open_dataset(kind, str(tmp_path / "gone"), "train", tmp_path / "data")


def test_damaged_and_missing_files_stay_counted_and_named(folder, tmp_path, caplog):
    (folder / "image/awe/awe_00001.jpg").write_bytes(b"no image")
    (folder / "image/fear/fear_00006.jpg").unlink()
    (folder / "annotation/anger/anger_00004.json").unlink()
    with caplog.at_level(logging.WARNING):
        source = open_dataset("emoset", str(folder), "train", tmp_path / "data")
    assert len(source) == 16
    assert source[1].images == [b"no image"] and source[6].images == [None]
    assert source.sizes()[1].tolist() == [0, 0]
    (path,) = (tmp_path / "data").rglob("checks.json")
    assert json.loads(path.read_text()) == {
        "unreadable": ["train/awe_00001"],
        "missing_file": ["train/fear_00006"],
        "missing_annotation": ["train/anger_00004"],
        "count": [
            "train: 16 rows, published are 94481",
            "validation: 8 rows, published are 5905",
            "test: 8 rows, published are 17716",
        ],
    }
    for line in ("1 x unreadable", "train/fear_00006", "published are 94481"):
        assert line in caplog.text


def test_a_folder_that_lacks_most_of_its_images_is_refused(folder, tmp_path):
    for path in list(folder.glob("image/*/*.jpg"))[: tolerated(32) + 1]:
        path.unlink()
    with pytest.raises(DataError, match=r"11 of 32 rows have the fault 'missing_file'.*unpack"):
        open_dataset("emoset", str(folder), "train", tmp_path / "data")


def test_equal_images_are_told_apart_by_where_they_are(folder, tmp_path):
    def copy(a: str, b: str) -> None:
        shutil.copy(folder / f"image/{a}.jpg", folder / f"image/{b}.jpg")

    copy("awe/awe_00001", "awe/awe_00009")
    copy("fear/fear_00006", "anger/anger_00004")
    copy("disgust/disgust_00005", "disgust/disgust_00029")
    built = build_dataset(BUILDERS["emoset"], folder, tmp_path / "data")
    found = json.loads(
        (tmp_path / "data/emoset" / built.builder_config.name / "1.1.0" / "checks.json").read_text()
    )
    assert found["duplicate"] == ["train/awe_00001 = train/awe_00009"]
    assert found["duplicate_other_label"] == ["train/anger_00004 = train/fear_00006"]
    assert found["duplicate_other_split"] == ["train/disgust_00005 = test/disgust_00029"]


def test_images_of_equal_size_and_end_need_not_be_equal(tmp_path, write):
    write["classes"](tmp_path / "FI", LABEL_SETS["mikels8"], 1)
    end = b"x" * 5000
    for label, start in (("awe", b"a"), ("fear", b"b"), ("anger", b"a")):
        (tmp_path / "FI" / label / "0.jpg").write_bytes(start + end)
    built = build_dataset(BUILDERS["fi"], tmp_path / "FI", tmp_path / "data")
    found = json.loads((Path(built.data_dir) / "checks.json").read_text())
    assert found["duplicate_other_label"] == ["whole/anger/0.jpg = whole/awe/0.jpg"]
    assert "duplicate" not in found


def test_rows_with_a_fault_are_tolerated_up_to_one_percent(tmp_path):
    checks = Checks("x", tmp_path)
    for i in range(20):
        checks.note("unreadable", str(i))
    checks.finish(2000)
    with pytest.raises(DataError, match="20 of 1999 rows"):
        checks.finish(1999)
    with pytest.raises(DataError, match="it has no rows"):
        checks.finish(0)


def test_another_program_waits_for_a_build(folder, tmp_path):
    data = str(tmp_path / "data")
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        opened = [pool.submit(_rows_of, str(folder), data) for _ in range(2)]
        assert [each.result() for each in opened] == [16, 16]


def _rows_of(root: str, data: str) -> int:
    return len(open_dataset("emoset", root, "train", data))
