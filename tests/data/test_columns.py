"""Columns of other types than expected, in parquet files and folders of `datasets`."""

import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emor3_jax.data import sources
from emor3_jax.data.errors import DataError
from emor3_jax.data.generic import HuggingFaceSource
from emor3_jax.data.sources import ParquetSource

BAD_LABELS = {
    "number": pa.array([1, 2]),
    "truth": pa.array([True, False]),
    "fraction": pa.array([0.5, 1.0]),
    "list": pa.array([["joy"], ["fear"]]),
    "object": pa.array([{"a": "joy"}, {"a": "fear"}]),
    "bytes": pa.array([b"joy", b"fear"]),
    "day": pa.array([1, 2], pa.timestamp("s")),
}


def table(make, **columns) -> pa.Table:
    rows = [make["row"](i) for i in range(2)]
    whole = {name: pa.array([row[name] for row in rows]) for name in rows[0]} | columns
    return pa.table(whole)


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_of_another_type_are_named(tmp_path, make, kind):
    found = table(make, answer=BAD_LABELS[kind])
    (tmp_path / "set").mkdir()
    pq.write_table(found, tmp_path / "set" / "train.parquet")
    for open_it in (
        lambda: ParquetSource(tmp_path / "set" / "train.parquet"),
        lambda: HuggingFaceSource(str(tmp_path / "set"), "train"),
    ):
        with pytest.raises(DataError, match=r"column 'answer' is .*, not a text"):
            open_it()
    pq.write_table(table(make, problem=BAD_LABELS[kind]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'problem' is .*, not a text"):
        ParquetSource(tmp_path / "a.parquet")


def test_texts_and_bytes_of_every_form_are_read(tmp_path, make):
    """Polars and newer writers keep them as views, pandas as categories."""
    plain = table(make)
    image = pa.array([row[0]["bytes"] for row in plain["images"].to_pylist()])
    labels = plain["answer"].to_pylist()
    for kind in (pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        form = pa.binary_view() if kind == pa.string_view() else pa.large_binary()
        found = table(make, answer=pa.array(labels, kind), images=image.cast(form))
        pq.write_table(found, tmp_path / "a.parquet")
        source = ParquetSource(tmp_path / "a.parquet")
        assert [texts.answer for texts in source.texts()] == labels
        assert source[1].texts.answer == labels[1]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([[1], [2]]),
        pa.array([{"bytes": "x"}, {"bytes": "y"}]),
        pa.array([{"bytes": b"x", "path": 1}] * 2),
        pa.array([{"data": b"x"}] * 2),
        pa.array([True, False]),
    ],
)
def test_images_of_another_type_are_named(tmp_path, make, column):
    pq.write_table(table(make, images=column), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'images' is .*, not a list of {bytes, path}"):
        ParquetSource(tmp_path / "a.parquet")


@pytest.mark.parametrize("share", ["0.5", True, None, decimal.Decimal("0.5"), [0.5]])
def test_shares_of_another_type_are_named(tmp_path, make, share):
    shares = pa.array([[{"label": "joy", "share": share}]] * 2)
    pq.write_table(table(make, distribution=shares), tmp_path / "a.parquet")
    if share is None:
        assert ParquetSource(tmp_path / "a.parquet")[0].texts.distribution == (("joy", None),)
    else:
        with pytest.raises(DataError, match=r"column 'distribution' is .* a text and a number"):
            ParquetSource(tmp_path / "a.parquet")


def test_files_that_number_their_labels_differently_are_refused(tmp_path, make):
    for part, names in enumerate((["joy", "fear"], ["fear", "joy"])):
        features = {"answer": {"_type": "ClassLabel", "names": names}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        found = table(make, answer=pa.array([0, 1]))
        path = tmp_path / f"train-{part}.parquet"
        pq.write_table(found.replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=r"train-1\.parquet names the numbers of 'answer' otherwi"):
        ParquetSource(tmp_path / "*.parquet")
    with pytest.raises(DataError, match="a file of split 'train' names other labels"):
        HuggingFaceSource(str(tmp_path), "train")


def test_texts_that_are_no_utf_8_are_named(tmp_path, make):
    bad = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0\6\0\0\0"), pa.py_buffer(b"jo\xe9fea")],
    )
    pq.write_table(table(make, answer=bad), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet")
    for read in (lambda: list(source.texts()), lambda: source[0]):
        with pytest.raises(DataError, match=r"a\.parquet is damaged \(UnicodeDecodeError"):
            read()


def test_a_damaged_page_is_named(tmp_path, make):
    pq.write_table(table(make), tmp_path / "a.parquet", compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:200] = bytes(196)
    (tmp_path / "a.parquet").write_bytes(data)
    source = ParquetSource(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        source[0]


def test_paths_of_windows_or_of_another_machine(tmp_path, make):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(make["png"](1))

    def write(names: list[str]) -> ParquetSource:
        labels = ["joy"] * len(names)
        found = pa.table({"images": names, "problem": labels, "answer": labels})
        pq.write_table(found, tmp_path / "a.parquet")
        return ParquetSource(tmp_path / "a.parquet")

    source = write([f"train\\{i}.png" for i in range(20_000)])
    assert source[0].images == [make["png"](1)] and source[1].images == [None]
    with pytest.raises(DataError, match=r"none of the first 100 images .* was .*gone.*0\.png"):
        write([f"gone\\{i}.png" for i in range(20_000)])
    for outside in ("/data/0.png", "C:\\data\\0.png", "../0.png"):
        with pytest.raises(DataError, match=r"leaves the folder .* outside_files=True"):
            write([outside])


def test_a_file_that_says_that_it_has_more_rows_than_bytes_is_refused(tmp_path, make, monkeypatch):
    pq.write_table(table(make), tmp_path / "a.parquet")

    class Absurd:
        num_rows, num_row_groups = 2**60, 0
        schema = pq.read_metadata(tmp_path / "a.parquet").schema

    monkeypatch.setattr(sources.pq, "read_metadata", lambda file: Absurd())
    with pytest.raises(DataError, match=r"1152921504606846976 rows in \d+ bytes"):
        ParquetSource(tmp_path / "a.parquet")
