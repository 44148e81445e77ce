"""JSON lines, class folders, folders of `datasets`: what their tools write, and faults in it."""

import io
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emor3_jax.config import dataset
from emor3_jax.data.columns import parse_columns
from emor3_jax.data.errors import DataError
from emor3_jax.data.generic import QUESTION, HuggingFaceSource, open_folders, open_json_lines
from emor3_jax.data.sources import expand_files
from emor3_jax.models.images import is_image_head
from emor3_jax.prepare.sources import SOURCES


def lines(path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_lines(tmp_path, make):
    (tmp_path / "x.png").write_bytes(make["png"](1))
    rows = [
        {"image": "x.png", "answer": "joy"},
        {"image": "gone.png", "label": "fear", "question": "why ?", "id": "two"},
        {"image": "x.png", "problem": "what ? <image>", "distribution": {"joy": 3, "fear": 1}},
    ]
    source = open_json_lines(lines(tmp_path / "a.jsonl", rows))
    texts = list(source.texts())
    assert [t.question for t in texts] == [QUESTION, "why ?", "what ?"]
    assert [t.answer for t in texts] == ["joy", "fear", None]
    assert [t.id for t in texts] == ["a.jsonl:1", "two", "a.jsonl:3"]
    assert texts[2].image_moved and texts[2].distribution == (("joy", 3), ("fear", 1))
    assert source[0].images == [make["png"](1)] and source[1].images == [None]
    assert source.find("two") == 1
    assert next(open_json_lines(str(tmp_path / "a.jsonl"), "how ?").texts()).question == "how ?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "x"}\n{"image": ', r"line 2 of .*a\.jsonl is no JSON"),
        ('["x"]', "line 1 .* no object with a text 'image'"),
        ('{"images": "x"}', "line 1 .* no object with a text 'image'"),
        ('{"image": "x", "distribution": [1]}', "line 1 .*'distribution' is no object"),
        ('{"image": "x", "id": 1}\n{"image": "x", "id": "1"}', "line 2 .* the id '1' was there"),
        ('{"image": "x", "label": 3}', "line 1 .*: 'label' is 3, not a text"),
        ('{"image": "x", "label": ["joy"]}', "line 1 .*: 'label' is ..joy.., not a text"),
        ('{"image": "x", "label": true}', "line 1 .*: 'label' is true, not a text"),
        ('{"image": "x", "question": 7}', "line 1 .*: 'question' is 7, not a text"),
        (
            '{"image": "x", "distribution": {"joy": "0.5"}}',
            "line 1 .*: the share of 'joy' in 'distribution' is '0.5', no number",
        ),
        (
            '{"image": "x", "distribution": {"joy": 1' + "0" * 400 + "}}",
            "line 1 .*: the share of 'joy' in 'distribution' is 1000.*, no number",
        ),
        ('{"image": "x", "distribution": {"joy": 1e400}}', "line 1 .* the number 1e400 is too lar"),
        ('{"image": "x", "distribution": {"joy": NaN}}', "line 1 .* NaN is no number of JSON"),
        ('{"image": "x", "label": 1' + "0" * 5000 + "}", "line 1 .* is no JSON: .*digits"),
        ("[" * 100_000, "line 1 .* is no JSON: too many brackets"),
        ('{"image": "x", "label": "\\ud83d"}', "line 1 .* escapes half of a character"),
        ('{"image": "x", "label": {"a": 1}}', "line 1 .*: 'label' is .*, not a text"),
        ('{"image": "x", "id": ["a"]}', "line 1 .*: 'id' is .*, neither a whole number nor"),
        ('{"image": "x", "id": "a\\nb"}', "line 1 .*: 'id' is .*, neither a whole number nor"),
        ('{"image": "x", "response": [3]}', "line 1 .*: 'response' is .3., neither a text nor"),
        ('{"image": {"bytes": "x"}}', "line 1 .* no object with a text 'image'"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        open_json_lines(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        open_json_lines(str(tmp_path / "gone.jsonl"))


def folders(root, make, labels=("Calm", "tense"), count: int = 2) -> None:
    for label in labels:
        (root / label).mkdir(parents=True)
        for i in range(count):
            (root / label / f"{i}.PNG").write_bytes(make["png"](i))


def test_class_folders_with_splits(tmp_path, make):
    folders(tmp_path / "train", make)
    folders(tmp_path / "test", make, count=1)
    source = open_folders(str(tmp_path), "train", "which ?")
    assert source.labels == ("calm", "tense")
    assert [t.id for t in source.texts()][::3] == ["train/Calm/0.PNG", "train/tense/1.PNG"]
    assert source[3].images == [make["png"](1)] and source[3].texts.answer == "tense"
    assert len(open_folders(str(tmp_path), "test")) == 2
    with pytest.raises(DataError, match=r"split='dev': .* has the splits test, train"):
        open_folders(str(tmp_path), "dev")


def test_class_folders_without_splits_are_parted_by_id(tmp_path, make, caplog):
    folders(tmp_path, make, count=40)
    parts = {
        split: {t.id for t in open_folders(str(tmp_path), split).texts()}
        for split in ("whole", "train", "test")
    }
    assert len(parts["whole"]) == 80 and parts["train"] | parts["test"] == parts["whole"]
    assert not parts["train"] & parts["test"] and 5 < len(parts["test"]) < 30
    # Whoever gives 80 images and sees fewer reads why; the whole needs no word.
    for split in ("train", "test"):
        assert f"split={split!r} takes {len(parts[split])} of its 80 rows" in caplog.text
    assert "split='whole' takes 80" not in caplog.text


def test_faulty_class_folders_are_named(tmp_path, make):
    with pytest.raises(DataError, match="no such folder"):
        open_folders(str(tmp_path / "gone"), "whole")
    with pytest.raises(DataError, match="holds no folders"):
        open_folders(str(tmp_path), "whole")
    folders(tmp_path, make)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        open_folders(str(tmp_path), "whole")
    (tmp_path / "empty").rmdir()
    folders(tmp_path, make, ("calm",))
    with pytest.raises(DataError, match=r"two folders .* label 'calm'"):
        open_folders(str(tmp_path), "whole")


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(make, label, image: str = "image", features: dict | None = None) -> pa.Table:
    """Three rows with the features that `datasets` keeps in a schema."""
    names = {"_type": "ClassLabel", "names": ["joy", "fear"]}
    features = features or {image: {"_type": "Image"}, "emotion": names}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(
        [(image, IMAGE), ("emotion", label.type), ("question", pa.string())], metadata=metadata
    )
    images = [{"bytes": make["png"](i), "path": None} for i in range(3)]
    columns = [pa.array(images, IMAGE), label, pa.array(["a ?", "b ?", "c ?"])]
    return pa.Table.from_arrays(columns, schema=schema)


def save_to_disk(folder, rows: pa.Table, shards: int = 2) -> None:
    """Writes what `datasets` does: arrow streams and a state.json that names them."""
    folder.mkdir(parents=True)
    size, names = -(-len(rows) // shards), []
    for i in range(shards):
        names.append(f"data-{i:05d}-of-{shards:05d}.arrow")
        with pa.ipc.new_stream(folder / names[-1], rows.schema) as writer:
            writer.write_table(rows.slice(i * size, size))
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))


def test_a_saved_data_set(tmp_path, make):
    save_to_disk(tmp_path / "set" / "train", table(make, pa.array([1, 0, -1])))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    source = HuggingFaceSource(str(tmp_path / "set"), "train")
    assert source.labels == ("joy", "fear") and len(source) == 3
    # -1 stands for no label.
    assert [t.answer for t in source.texts()] == ["fear", "joy", None]
    assert [t.question for t in source.texts()] == ["a ?", "b ?", "c ?"]
    assert source[2].images == [make["png"](2)] and source[2].texts == list(source.texts())[2]
    assert [source.find(t.id) for t in source.texts()] == [0, 1, 2]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(DataError, match=r"split='test': .* has train"):
        HuggingFaceSource(str(tmp_path / "set"), "test")


def test_a_saved_single_split_needs_no_split(tmp_path, make):
    save_to_disk(tmp_path / "set", table(make, pa.array(["joy", "fear", "joy"])), shards=1)
    source = HuggingFaceSource(str(tmp_path / "set"), "")
    assert [t.answer for t in source.texts()] == ["joy", "fear", "joy"]
    with pytest.raises(DataError, match=r"split='test': .* a single one, which names no split"):
        HuggingFaceSource(str(tmp_path / "set"), "test")
    state = json.loads((tmp_path / "set" / "state.json").read_text()) | {"_split": "train"}
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    assert len(HuggingFaceSource(str(tmp_path / "set"), "train")) == 3
    with pytest.raises(DataError, match=r"split='test': .* which is the split train; leave it ''"):
        HuggingFaceSource(str(tmp_path / "set"), "test")


def test_the_layout_of_the_hub(tmp_path, make):
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = table(make, pa.array([1, 0, 1]))
    for i in range(2):
        pq.write_table(rows.slice(2 * i, 2), tmp_path / f"set/data/train-{i:05d}-of-00002.parquet")
    source = HuggingFaceSource(str(tmp_path / "set"), "train")
    assert [t.answer for t in source.texts()] == ["fear", "joy", "fear"]
    assert source[2].images == [make["png"](2)] and source[2].texts == list(source.texts())[2]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(DataError, match=r"split='test': .* has files of train"):
        HuggingFaceSource(str(tmp_path / "set"), "test")


@pytest.mark.parametrize("change", ["nothing", "shard", "indices", "numbers", "image"])
def test_faulty_folders_of_datasets_are_named(tmp_path, make, change):
    root = tmp_path / "set"
    features = {"picture": {"_type": "Value"}, "emotion": {"_type": "Value"}}
    image = "picture" if change == "image" else "image"
    save_to_disk(root, table(make, pa.array([1, 0, 1]), image, features))
    message = {
        "nothing": "holds neither a state.json .* nor parquet files",
        "shard": r"lacks data-00001-of-00002\.arrow, which its state\.json names",
        "indices": "call flatten_indices",
        "numbers": "column 'emotion' is int64, not a text, and the file does not name its numbers",
        "image": "no column of kind Image can be told among picture, emotion, question",
    }[change]
    if change == "nothing":
        (root / "state.json").unlink()
    elif change == "shard":
        (root / "data-00001-of-00002.arrow").unlink()
    elif change == "indices":
        state = json.loads((root / "state.json").read_text())
        state["_indices_data_files"] = [{"filename": "indices.arrow"}]
        (root / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=message):
        HuggingFaceSource(str(root), "")


def test_responses_of_json_lines(tmp_path, make):
    (tmp_path / "a.png").write_bytes(make["png"](0))
    rows = [{"image": "a.png", "label": "joy", "response": said} for said in ("x", ["x", "y"], [])]
    rows.append({"image": "a.png", "label": "joy"})
    found = list(open_json_lines(lines(tmp_path / "a.jsonl", rows)).texts())
    assert [texts.responses for texts in found] == [("x",), ("x", "y"), (), ()]
    with pytest.raises(
        DataError, match=r"line 1 of .*: 'response' is 3, neither a text nor a list"
    ):
        open_json_lines(lines(tmp_path / "b.jsonl", [rows[0] | {"response": 3}]))


def test_json_lines_of_other_tools(tmp_path):
    rows = [{"image": "x.png", "label": "joy\u2028", "id": None}] * 2
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    found = list(open_json_lines(str(tmp_path / "a.jsonl")).texts())
    assert [t.id for t in found] == ["a.jsonl:1", "a.jsonl:2"] and found[0].answer == "joy\u2028"
    for encoding in ("utf-16", "gbk"):
        (tmp_path / "b.jsonl").write_text('{"image": "喜怒哀乐.png"}', encoding=encoding)
        with pytest.raises(DataError, match=r"b\.jsonl is (no|a) .*text.* save it as UTF-8"):
            open_json_lines(str(tmp_path / "b.jsonl"))


def test_fields_of_other_names_and_splits(tmp_path, make):
    rows = [
        {"photo": "x.png", "emotion": "joy", "ask": "why ?", "part": "train", "key": "one"},
        {"photo": "y.png", "emotion": "fear", "ask": "how ?", "part": "test", "key": "two"},
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    columns = {"image": "photo", "answer": "emotion", "question": "ask", "id": "key"}
    found = list(open_json_lines(path, columns=columns).texts())
    assert [(t.id, t.question, t.answer) for t in found] == [
        ("one", "why ?", "joy"),
        ("two", "how ?", "fear"),
    ]
    columns["split"] = "part"
    assert [t.id for t in open_json_lines(path, columns=columns, split="test").texts()] == ["two"]
    with pytest.raises(DataError, match=r"split='dev': .* its lines are of test, train"):
        open_json_lines(path, columns=columns, split="dev")
    with pytest.raises(
        DataError, match=r"split='test': .* its lines name no split; leave split ''"
    ):
        open_json_lines(path, columns={"image": "photo"}, split="test")
    with pytest.raises(
        DataError, match=r"line 1 of .* has no field 'mood', which columns names as"
    ):
        open_json_lines(path, columns={"image": "photo", "answer": "mood"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("image:photo, answer:emotion", {"image": "photo", "answer": "emotion"}),
        ("image", None),
        ("picture:photo", None),
        ("image:a,image:b", None),
        ("image:", None),
    ],
)
def test_columns_are_pairs_of_role_and_name(text, found):
    if found is None:
        with pytest.raises(
            DataError, match=r"columns=.* must be role:column, each role once; roles"
        ):
            parse_columns(text)
    else:
        assert parse_columns(text) == found


def test_class_folders_as_other_systems_leave_them(tmp_path, make, caplog):
    folders(tmp_path, make)
    for name in ("._0.PNG", ".DS_Store"):
        (tmp_path / "Calm" / name).write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "Calm" / "dog").mkdir()
    (tmp_path / "Calm" / "dog" / "2.jfif").write_bytes(make["png"](7))
    (tmp_path / "Calm" / "no_extension").write_bytes(make["png"](8))
    (tmp_path / "Calm" / "notes.txt").write_text("BM, that is no bitmap")
    with open(os.fsencode(tmp_path / "tense") + b"/caf\xe9.png", "wb") as file:
        file.write(make["png"](9))
    source = open_folders(str(tmp_path), "whole")
    assert [t.id for t in source.texts()] == [
        "Calm/0.PNG",
        "Calm/1.PNG",
        "Calm/dog/2.jfif",
        "Calm/no_extension",
        "tense/0.PNG",
        "tense/1.PNG",
        "tense/caf\\xe9.png",
    ]
    assert source[6].images == [make["png"](9)]
    assert "1 files are none of the images that are read" in caplog.text
    assert "notes.txt" in caplog.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_formats_are_told_by_their_beginning(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    assert is_image_head(file.getvalue()[:16])
    assert not is_image_head(b"<html><head>404") and not is_image_head(b"BM, no bitmap...")


def test_columns_of_a_folder_of_datasets(tmp_path, make):
    features = {"picture": {"_type": "Value"}, "emotion": {"_type": "Value"}}
    save_to_disk(tmp_path / "set", table(make, pa.array(["a", "b", "c"]), "picture", features))
    columns = {"image": "picture", "answer": "question", "question": "emotion"}
    source = HuggingFaceSource(str(tmp_path / "set"), "", columns=columns)
    assert [(t.question, t.answer) for t in source.texts()] == [
        ("a", "a ?"),
        ("b", "b ?"),
        ("c", "c ?"),
    ]
    assert source[1].images == [make["png"](1)]
    with pytest.raises(
        DataError, match=r"columns=image:photo: .* has the columns picture, emotion"
    ):
        HuggingFaceSource(str(tmp_path / "set"), "", columns={"image": "photo"})


def test_paths_of_windows_or_of_another_machine(tmp_path, make):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.png").write_bytes(make["png"](1))
    rows = [{"image": "train\\x.png", "label": "joy"}] * 2
    assert open_json_lines(lines(tmp_path / "a.jsonl", rows))[1].images == [make["png"](1)]
    rows = [{"image": f"D:\\data\\{i}.png", "label": "joy"} for i in range(20_000)]
    with pytest.raises(DataError, match=r"line 1 of .* 'D:.*0\.png' is absolute or leaves"):
        open_json_lines(lines(tmp_path / "b.jsonl", rows))
    gone = [{"image": f"train/{i}.png", "label": "joy"} for i in range(200)]
    for anywhere, listed in ((True, rows), (False, gone)):
        with pytest.raises(
            DataError, match=r"none of its first 100 images is there; .* tried was .*0\.png"
        ):
            open_json_lines(lines(tmp_path / "b.jsonl", listed), outside_files=anywhere)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd", "a/../../x.png", "C:\\x.png"])
def test_paths_leave_the_folder_only_where_the_config_says_so(tmp_path, make, name):
    rows = [{"image": name, "label": "joy"}]
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"line 1 .* leaves the folder .* outside_files=True"):
        open_json_lines(path)
    assert len(open_json_lines(path, outside_files=True)) == 1
    (tmp_path / "outside.png").write_bytes(make["png"](1))
    (tmp_path / "in").mkdir()
    rows = [{"image": "../outside.png", "label": "joy"}]
    source = open_json_lines(lines(tmp_path / "in" / "a.jsonl", rows), outside_files=True)
    assert source[0].images == [make["png"](1)]


def test_links_in_a_circle_are_passed_over(tmp_path, make):
    folders(tmp_path, make)
    for name in ("loop", "again"):
        (tmp_path / "Calm" / name).symlink_to(tmp_path / "Calm")
        (tmp_path / "tense" / name).symlink_to(tmp_path)
    (tmp_path / "tense" / "self.png").symlink_to(tmp_path / "tense" / "self.png")
    found = [t.id for t in open_folders(str(tmp_path), "whole").texts()]
    assert found == ["Calm/0.PNG", "Calm/1.PNG", "tense/0.PNG", "tense/1.PNG", "tense/self.png"]
    (tmp_path / "data").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).symlink_to(tmp_path)
    make["parquet"](tmp_path / "train.parquet", [make["row"](0)])
    # Three links of which each leads up would be 3 ** 40 paths.
    assert expand_files(str(tmp_path / "**" / "*.parquet")) == [tmp_path / "train.parquet"]
    with pytest.raises(DataError, match="no file matches"):
        expand_files(str(tmp_path / "data" / "**" / "*.parquet"))


def test_a_label_with_a_comma_is_refused(tmp_path, make):
    folders(tmp_path, make, ("joy, calm", "tense"))
    described = dataset(kind="folders", path=str(tmp_path), split="whole")
    with pytest.raises(DataError, match=r"label 'joy, calm' holds a comma"):
        SOURCES["folders"](described, None)


@pytest.mark.parametrize("kind", ["pipe", "nul", "folder"])
def test_what_is_no_regular_file_is_not_read(tmp_path, make, kind):
    (tmp_path / "x.png").write_bytes(make["png"](1))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    name = "n\0l" if kind == "nul" else kind
    rows = [{"image": "x.png", "label": "joy"}, {"image": name, "label": "joy"}]
    source = open_json_lines(lines(tmp_path / "a.jsonl", rows))
    assert source[0].images == [make["png"](1)] and source[1].images == [None]
