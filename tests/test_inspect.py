"""The program that shows the data of a config: printed lines, numbers and page."""

import inspect as standard_inspect
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support import program, tiny_run

from emor3_jax import inspect
from emor3_jax.config import dataset
from emor3_jax.data.errors import DataError


def _jpeg(encoded: bytes) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(encoded)) as image:
        image.convert("RGB").save(out, "JPEG", quality=70)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """14 training rows, 5 of them damaged; the last 2 of 6 held-out images copy training ones."""
    folder = tiny_run.make_folder(tmp_path_factory.mktemp("inspect"))
    train = pq.read_table(folder / "train.parquet").to_pylist()
    test = pq.read_table(folder / "test.parquet").to_pylist()
    # The header is whole, the end is gone.
    train[5]["images"][0]["bytes"] = _jpeg(train[5]["images"][0]["bytes"])[:-500]
    test[4]["images"] = train[7]["images"]
    test[5]["images"][0]["bytes"] = _jpeg(train[8]["images"][0]["bytes"])
    test[5]["problem"] = "<image>which <b> $x$ ?"
    for name, rows in (("train", train), ("test", test)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture
def config(folder) -> ConfigDict:
    config = tiny_run.make_config(folder)
    config.data.prompt_lengths = (80, 160)
    return config


@pytest.mark.parametrize(
    ("leakage", "copies"), [("bytes", [(7, 4)]), ("dhash", [(7, 4), (8, 5)]), ("none", None)]
)
def test_shared_images_are_named(config, tmp_path, capsys, leakage, copies):
    found = inspect.main(config, tmp_path, samples=0, leakage=leakage)
    shared = (
        {"train, test": [(f"train.parquet:{a}", f"test.parquet:{b}") for a, b in copies]}
        if copies
        else {}
    )
    assert found["shared"] == shared
    if copies:
        assert (
            f"train and test share {len(copies)} images: train.parquet:7 = test.parquet:4"
            in capsys.readouterr().out
        )


def test_look_is_a_former_name_of_dhash(config, tmp_path):
    by_name = [inspect.main(config, tmp_path, 0, leakage) for leakage in ("look", "dhash")]
    assert by_name[0]["shared"] == by_name[1]["shared"]


def test_page_shows_the_numbers_and_every_sample(config, tmp_path, capsys):
    found = inspect.main(config, tmp_path, samples=20)
    assert json.loads((tmp_path / "inspect.json").read_text()) == json.loads(json.dumps(found))
    train = found["sets"]["train"]
    assert (train["rows"], train["usable"]) == (14, 10)
    lines = capsys.readouterr().out.splitlines()
    assert "train: 14 rows, 10 usable" in lines and "test: 6 rows, 6 usable" in lines
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    # One image of training is damaged behind its header.
    assert page.count('class="sample"') == 15
    assert "train.parquet:5: the image cannot be decoded" in page
    assert "14 rows, 10 usable; left out: empty_question 1, unknown_answer 1, " in page
    # 112 pixels are 8 patches, and 2 x 2 patches are a token.
    assert page.count("&lt;|image_pad|&gt;<i> x 16</i>") == 15
    assert "which &lt;b&gt; $x$ ?" in page and "<b> $x$" not in page
    assert (
        page.count("[the response&#39;s own steps]") + page.count("[the response's own steps]") == 4
    )
    for axis in ("pixels of an image", "image tokens", "prompt tokens", "label", "rows", "batches"):
        assert f">{axis}</text>" in page
    inspect.main(config, tmp_path / "again", samples=20)
    assert (tmp_path / "again" / "inspect.html").read_text(encoding="utf-8") == page


def test_a_set_without_usable_rows_is_refused_with_the_sizes_that_it_wants(
    config, tmp_path, capsys
):
    config.data.prompt_lengths = (8,)
    with pytest.raises(DataError, match=r"^train, test: no usable row is left"):
        inspect.main(config, tmp_path, samples=0, leakage="none")
    found = json.loads((tmp_path / "inspect.json").read_text())["sets"]["test"]
    assert found["usable"] == 0 and found["left_out"] == {"long_question": 6}
    tokens = found["most_tokens"]
    wanted = f"windows of the largest image: 1, tokens of the longest prompt: {tokens}"
    assert tokens > 8 and wanted in capsys.readouterr().out
    config.data.prompt_lengths = (tokens,)
    found = inspect.main(config, tmp_path, samples=0, leakage="none")["sets"]["test"]
    assert found["usable"] == 6 and not found["left_out"]


def test_lines_of_a_data_set_by_hand():
    numbers = {
        "rows": 5,
        "usable": 4,
        "left_out": {"unknown_answer": 1, "long_question": 2},
        "most_windows": 4,
        "most_tokens": 85,
        "questions": 2,
        "labels": {"joy": 3, "fear": 1},
        "pixels": [(100, 199, 4)],
        "image_tokens": [(16, 16, 4)],
        "image_tokens_total": 64,
        "prompt_tokens": [],
        "shapes": {"60 tokens, 1 windows": 2},
        "token_waste": 0.125,
        "window_waste": 0.0,
    }
    assert inspect.describe("test", numbers) == [
        "",
        "test: 5 rows, 4 usable",
        "  left out, unknown_answer: 1 (the answer is no label of the label set)",
        "  left out, long_question: 2 (the prompt has more tokens than the largest of "
        "data.prompt_lengths; raise that, lower data.max_pixels, or take data.long_prompts='cut')",
        "  windows of the largest image: 4, tokens of the longest prompt: 85",
        "  questions: 2",
        "  labels",
        f"     joy        3  75.0 % {'█' * 30}",
        f"    fear        1  25.0 % {'█' * 10}",
        "  most frequent label over rarest: 3.0",
        "  pixels",
        f"    100-199        4 100.0 % {'█' * 30}",
        "  image tokens",
        f"    16        4 100.0 % {'█' * 30}",
        "  prompt tokens",
        "  image tokens in all: 64",
        "  batches by padded shape",
        f"    60 tokens, 1 windows        2 100.0 % {'█' * 30}",
        "  padding: 12.5 % of prompt tokens, 0.0 % of image windows",
    ]


def test_what_the_data_says_itself_by_hand():
    labels = [("happy", "joy", 3), ("fear", "fear", 1), ("rage", "", 2)]
    data = {
        "labels": [dict(zip(("own", "label", "rows"), each, strict=True)) for each in labels],
        "notes": {"tie_dropped": 51, "count": 1},
        "counts": ["all: 6 rows, published are 9"],
        "published": {"joy": 6, "fear": 3},
    }
    assert inspect._describe_data("train", data) == [
        "  noticed in train, tie_dropped: 51",
        "  noticed in train, count: 1",
        "    all: 6 rows, published are 9",
        "  labels of train that have another name here",
        "    happy → joy: 3",
        "    rage → no label, left out: 2",
    ]
    numbers = {"labels": {"joy": 3, "fear": 1}, "data": {"train": data}}
    assert inspect._describe_balance(numbers) == [
        "  most frequent label over rarest: 3.0",
        "  published of train: 9 rows, most over rarest 2.0",
        "    joy: 75.0 % here, 66.7 % published",
        "    fear: 25.0 % here, 33.3 % published",
    ]


def test_images_that_a_set_repeats_are_named(config, folder, tmp_path, capsys):
    rows = pq.read_table(folder / "test.parquet").to_pylist()
    rows[1]["images"] = rows[0]["images"]
    rows[1]["answer"] = "awe" if rows[0]["answer"] != "awe" else "fear"
    rows[3]["images"][0]["bytes"] = _jpeg(rows[2]["images"][0]["bytes"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    config.evaluate.sets.test.path = str(tmp_path / "test.parquet")
    ids = [f"test.parquet:{i}" for i in range(4)]
    found = inspect.main(config, tmp_path, samples=0)
    assert found["repeated"] == {"train": [], "test": [ids[:2]]}
    said = "repeated images in test: 1, further rows that show them: 1, under another label: 1; "
    assert said + " = ".join(ids[:2]) in capsys.readouterr().out
    page = (tmp_path / "inspect.html").read_text()
    assert page.count('class="repeat"') == 2 and said in page
    found = inspect.main(config, tmp_path, samples=0, leakage="dhash")
    assert found["repeated"]["test"] == [ids[:2], ids[2:]]


def test_labels_of_the_files_are_shown_beside_those_of_the_config(config, tmp_path, capsys):
    config.data.train.labels = "joy,amusement,awe,contentment,excitement,anger,disgust,fear,sadness"
    found = inspect.main(config, tmp_path, samples=0, leakage="none")
    labels = {x["own"]: x["label"] for x in found["sets"]["train"]["data"]["train"]["labels"]}
    assert labels.pop("boredom") == ""
    assert all(own == label for own, label in labels.items())
    assert "    boredom → no label, left out: 1" in capsys.readouterr().out


def test_sets_that_are_mixed_show_their_own_labels(config, folder, tmp_path):
    more = dataset(kind="parquet", path=str(folder / "test.parquet"), weight=2.0)
    config.data.mix.more = more
    found = inspect.main(config, tmp_path, samples=0, leakage="none")["sets"]
    rows = {
        part: sum(each["rows"] for each in data["labels"])
        for part, data in found["train"]["data"].items()
    }
    assert rows == {"train": 14, "train.more": 6}
    assert list(found["test"]["data"]) == ["test"]


def test_a_builders_notes_and_published_counts_are_shown(config, tmp_path, capsys):
    folder = tmp_path / "artphoto"
    folder.mkdir()
    labels = ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sad")
    for i, label in enumerate(labels):
        image = Image.new("RGB", (112, 112), (20 * i, 0, 0))
        image.save(folder / f"{label}_{i:04d}.jpg")
    config.evaluate.sets.art = dataset(kind="artphoto", path=str(folder), split="whole")
    config.data.folder = str(tmp_path / "data")
    found = inspect.main(config, tmp_path, samples=0, leakage="none")["sets"]["art"]
    assert found["data"]["art"]["published"]["sadness"] == 166
    assert found["data"]["art"]["notes"]["count"] > 0
    printed = capsys.readouterr().out
    assert "published of art: 806 rows, most over rarest 2.4" in printed
    assert "    sadness: 12.5 % here, 20.6 % published" in printed


def test_the_standard_library_keeps_its_inspect():
    assert not Path(standard_inspect.__file__).is_relative_to(Path(inspect.__file__).parent)
    # absl ends with 1 after it has printed the flags.
    result = program.run("emor3_jax.inspect", "--helpshort")
    assert result.returncode == 1, result.stderr
    assert "--leakage: <bytes|dhash|look|none>" in result.stdout
