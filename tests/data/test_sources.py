import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emor3_jax.data import sources
from emor3_jax.data.errors import DataError
from emor3_jax.data.sources import ParquetSource, sizes_of


@pytest.fixture
def folder(tmp_path, make):
    make["parquet"](tmp_path / "a.parquet", [make["row"](i) for i in range(10)])
    make["parquet"](tmp_path / "b.parquet", [make["row"](i) for i in range(10, 13)])
    return tmp_path


def test_rows_of_several_files_in_order(folder, make):
    source = ParquetSource(folder / "*.parquet")
    assert len(source) == 13
    for index in (12, 0, 9, 10, 5):
        row = source[index]
        assert row.images == [make["png"](index)]
        assert row.texts.question == f"which emotion is number {index} ?"
    assert source[9].texts.id == "a.parquet:9" and source[10].texts.id == "b.parquet:0"
    assert [source.find(texts.id) for texts in source.texts()] == list(range(13))
    assert list(source.texts()) == [source[i].texts for i in range(13)]
    with pytest.raises(IndexError):
        source[13]


def test_files_joined_by_commas_keep_their_order(folder):
    source = ParquetSource(f"{folder}/b.parquet, {folder}/a.parquet")
    assert [source[i].texts.id for i in (0, 3)] == ["b.parquet:0", "a.parquet:0"]


def test_files_of_equal_names_are_told_apart(folder, make):
    (folder / "more").mkdir()
    make["parquet"](folder / "more" / "a.parquet", [make["row"](40)])
    source = ParquetSource(folder / "**" / "*.parquet")
    ids = [texts.id for texts in source.texts()]
    assert len(set(ids)) == 14
    assert [source.find(i) for i in ids] == list(range(14))


def test_unknown_ids_are_key_errors(folder):
    source = ParquetSource(folder / "a.parquet")
    for row_id in ("b.parquet:0", "a.parquet:x", "a.parquet"):
        with pytest.raises(KeyError):
            source.find(row_id)


def test_memory_is_bounded_by_the_cache(tmp_path, make):
    make["parquet"](tmp_path / "a.parquet", [make["row"](i) for i in range(40)], row_group_size=1)
    one = pq.ParquetFile(tmp_path / "a.parquet").read_row_group(0).nbytes
    source = ParquetSource(tmp_path / "a.parquet", cache_bytes=4 * one)
    for index in (*range(40), *range(0, 40, 7)):
        assert source[index].images == [make["png"](index)]
        assert sum(table.nbytes for table in source._rows._cache.values()) <= 4 * one


def test_a_source_can_be_sent_to_another_process(folder):
    source = ParquetSource(folder / "*.parquet")
    row = source[11]
    assert pickle.loads(pickle.dumps(source))[11] == row


def test_question_is_the_problem_without_its_image(tmp_path, make):
    problems = ["<image> which ?", "which ? <image>", "which ?", "<image><image>which ?", None]
    rows = [make["row"](i, problem=problem) for i, problem in enumerate(problems)]
    make["parquet"](tmp_path / "a.parquet", rows)
    texts = list(ParquetSource(tmp_path / "a.parquet").texts())
    assert [t.question for t in texts] == ["which ?"] * 4 + [None]
    assert [t.image_moved for t in texts] == [False, True, False, False, False]
    assert [t.images_named for t in texts[:4]] == [1, 1, 0, 2]


def test_images_may_be_files_beside_the_parquet_file(tmp_path, make):
    (tmp_path / "x.png").write_bytes(make["png"](3))
    images = [{"bytes": None, "path": "x.png"}, {"bytes": None, "path": "gone.png"}, None]
    make["parquet"](tmp_path / "a.parquet", [make["row"](0, images=images)])
    assert ParquetSource(tmp_path / "a.parquet")[0].images == [make["png"](3), None, None]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no file matches '.*gone\.parquet'"):
        ParquetSource(tmp_path / "gone.parquet")


def test_files_that_are_not_parquet_are_named(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        ParquetSource(tmp_path / "a.parquet")


def test_missing_columns_are_named_with_those_there(tmp_path):
    pq.write_table(pa.table({"images": [1], "question": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'problem', only images, question"):
        ParquetSource(tmp_path / "a.parquet")


def test_images_of_another_type_are_refused(tmp_path):
    table = pa.table({"images": [1], "problem": ["x"], "answer": ["x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'images' is int64, not a list"):
        ParquetSource(tmp_path / "a.parquet")


def test_shares_are_read_with_the_row_and_with_the_texts_alone(tmp_path, make):
    shares = [{"label": "joy", "share": 0.75}, {"label": "fear", "share": 0.25}]
    rows = [make["row"](0, distribution=shares), make["row"](1, distribution=None)]
    make["parquet"](tmp_path / "a.parquet", rows)
    source = ParquetSource(tmp_path / "a.parquet")
    found = [source[0].texts.distribution, source[1].texts.distribution]
    assert found == [(("joy", 0.75), ("fear", 0.25)), None]
    assert [texts.distribution for texts in source.texts()] == found


@pytest.mark.parametrize("several", [False, True])
def test_responses_are_read_with_the_row_and_with_the_texts_alone(tmp_path, make, several):
    said = [["x", "y"], None] if several else ["x", None]
    rows = [make["row"](i, response=each) for i, each in enumerate(said)]
    make["parquet"](tmp_path / "a.parquet", rows)
    source = ParquetSource(tmp_path / "a.parquet")
    wanted = [("x", "y") if several else ("x",), ()]
    assert [source[i].texts.responses for i in range(2)] == wanted
    assert [texts.responses for texts in source.texts()] == wanted


def test_responses_that_are_no_texts_are_refused(tmp_path, make):
    make["parquet"](tmp_path / "a.parquet", [make["row"](0)])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column("response", pa.array([[3]])), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"'response' is list<.*int64>, not a text or a list of texts"
    ):
        ParquetSource(tmp_path / "a.parquet")


def test_shares_of_another_shape_are_refused(tmp_path, make):
    make["parquet"](tmp_path / "a.parquet", [make["row"](0)])
    table = pq.read_table(tmp_path / "a.parquet")
    table = table.append_column("distribution", pa.array([[0.5, 0.5]]))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'distribution' is .* not a list of {label, share}"):
        ParquetSource(tmp_path / "a.parquet")


def test_sizes_are_those_of_upright_images(tmp_path, make):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.new("RGB", (30, 20)).save(turned, "JPEG", exif=exif)
    images = [make["png"](0, 20, 30), turned.getvalue(), b"damaged"]
    rows = [make["row"](0, images=[{"bytes": data, "path": None}]) for data in images]
    make["parquet"](tmp_path / "a.parquet", [*rows, make["row"](0, images=[])])
    source = ParquetSource(tmp_path / "a.parquet")
    assert sizes_of(source).tolist() == [[20, 30], [30, 20], [0, 0], [0, 0]]
    assert sizes_of(source, np.array([1])).tolist() == [[30, 20]]


def test_columns_of_other_names(tmp_path, make):
    (tmp_path / "x.png").write_bytes(make["png"](3))
    table = pa.table({"photo": ["x.png", "gone.png"], "emotion": ["joy", "fear"], "note": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = {"image": "photo", "answer": "emotion"}
    source = ParquetSource(tmp_path / "a.parquet", columns=columns, question="which ?")
    assert [(t.question, t.answer) for t in source.texts()] == [
        ("which ?", "joy"),
        ("which ?", "fear"),
    ]
    assert source[0].images == [make["png"](3)] and source[1].images == [None]
    with pytest.raises(DataError, match=r"no column 'problem', only photo, emotion, note"):
        ParquetSource(tmp_path / "a.parquet", columns=columns)
    with pytest.raises(DataError, match=r"no column 'picture', only photo"):
        ParquetSource(tmp_path / "a.parquet", columns={"image": "picture"}, question="which ?")


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_an_image_may_be_no_list(tmp_path, make, form):
    image = make["png"](1)
    cell = {"bytes": image, "path": None} if form == "struct" else image
    table = pa.table({"images": [cell, None], "problem": ["a", "b"], "answer": ["joy", "fear"]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet")
    assert source[0].images == [image] and source[1].images == []


def test_numbers_are_labels_only_where_the_file_names_them(tmp_path, make):
    rows = pa.table({"images": [b"x", b"y"], "problem": ["a", "b"], "answer": [1, -1]})
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'answer' is int64, not a text, and the file does"):
        ParquetSource(tmp_path / "a.parquet")
    names = {"answer": {"_type": "ClassLabel", "names": ["joy", "fear"]}}
    kept = {"huggingface": json.dumps({"info": {"features": names}})}
    pq.write_table(rows.replace_schema_metadata(kept), tmp_path / "b.parquet")
    assert [t.answer for t in ParquetSource(tmp_path / "b.parquet").texts()] == ["fear", None]


def test_a_split_is_a_column_or_a_name_or_refused(tmp_path, make):
    rows = [make["row"](i) for i in range(4)]
    make["parquet"](tmp_path / "train-00000.parquet", rows)
    assert len(ParquetSource(tmp_path / "train-00000.parquet", split="train")) == 4
    with pytest.raises(DataError, match=r"split='test': .* has no column 'split', and its files"):
        ParquetSource(tmp_path / "train-00000.parquet", split="test")
    table = pq.read_table(tmp_path / "train-00000.parquet")
    table = table.append_column("part", pa.array(["train", "test", "train", "test"]))
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet", split="test", columns={"split": "part"})
    ids = [texts.id for texts in source.texts()]
    assert ids == ["a.parquet:1", "a.parquet:3"] and len(source) == 2
    assert [source.find(i) for i in ids] == [0, 1] and source[1].texts.id == ids[1]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(KeyError):
        source.find("a.parquet:0")
    with pytest.raises(DataError, match="split='dev': column 'part' has test, train"):
        ParquetSource(tmp_path / "a.parquet", split="dev", columns={"split": "part"})


def test_a_row_group_that_arrow_cannot_read_is_named_at_opening(folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(
        DataError, match=r"a\.parquet: row group 0 has .* again with row_group_size"
    ):
        ParquetSource(folder / "a.parquet")
