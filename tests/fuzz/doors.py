"""The doors by which a user's input comes in, each as a function of bytes.

Whatever the bytes are, a door returns, or raises an error of the package. `test_doors` gives them
what hypothesis draws, `python -m tests.fuzz.run` what coverage leads to.
"""

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from PIL import Image
from support import tiny

from emor3_jax import models
from emor3_jax.config import default
from emor3_jax.data.columns import parse_columns
from emor3_jax.data.datasets.base import scan_folder
from emor3_jax.data.datasets.catalog import find_builder
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.encode import Encoder
from emor3_jax.data.errors import DataError
from emor3_jax.data.generic import HuggingFaceSource, open_folders, open_json_lines
from emor3_jax.data.labels import label_map, label_set
from emor3_jax.data.leakage import dhash
from emor3_jax.data.prompts import PromptTemplates, fill, render_prompt
from emor3_jax.data.sources import ParquetSource, Source, sizes_of
from emor3_jax.data.views import read_ids
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.errors import UserError
from emor3_jax.evaluation.comparison import read_predictions
from emor3_jax.files import parse_json, read_rows
from emor3_jax.models import weights
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.models.tokenizer import read_tokenizer
from emor3_jax.prepare.checks import validate
from emor3_jax.rewards.patterns import PatternRule
from emor3_jax.rewards.rules import lowercase_labels
from emor3_jax.rewards.stated import log_score

LABELS = ("joy", "fear")
SET = PromptTemplates.load("tiny").set
_TOKENIZER = train_tokenizer(["which emotion is this ? joy , fear"], 300)
_POLICY = tiny.make_policy(vocab_size=len(_TOKENIZER), **special_ids(_TOKENIZER))
_IMAGES = ImageSettings(patch_size=4, min_pixels=256, max_pixels=1024)
PROCESSOR = Processor(_TOKENIZER, _IMAGES, _POLICY.layout).with_decode_limit(10**6)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def png() -> bytes:
    """A small image."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def _read(source: Source) -> None:
    """Reads a source as a run does: all texts, sizes, and some rows as the policy sees them."""
    encoder = Encoder(PROCESSOR, SET, LABELS, 512, 64, graded=True)
    texts = list(source.texts())
    assert len(texts) == len(source)
    sizes_of(source)
    for index in range(min(len(source), 4)):
        if encoder.fault_of_texts(texts[index]) is None:
            encoder((index, source[index]))
        assert source.find(texts[index].id) is not None


def json_lines(data: bytes) -> None:
    """A list of images."""
    with _folder() as folder:
        (folder / "a.jsonl").write_bytes(data)
        (folder / "x.png").write_bytes(png())
        _read(open_json_lines(str(folder / "a.jsonl")))


def parquet(data: bytes) -> None:
    """A parquet file, by its bytes."""
    with _folder() as folder:
        (folder / "train.parquet").write_bytes(data)
        for source in (
            lambda: ParquetSource(folder / "train.parquet"),
            lambda: HuggingFaceSource(str(folder), "train"),
        ):
            with contextlib.suppress(UserError):
                _read(source())


def parquet_columns(columns: dict[str, list]) -> None:
    """A parquet file, by its columns."""
    with _folder() as folder:
        try:
            table = pa.table(columns)
            pq.write_table(table, folder / "train.parquet")
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            # Nothing that arrow can write.
            return
        for source in (
            lambda: ParquetSource(folder / "train.parquet"),
            lambda: HuggingFaceSource(str(folder), "train"),
        ):
            with contextlib.suppress(UserError):
                _read(source())


def csv(data: bytes) -> None:
    """The tables and lists of the named data sets."""
    lists = {
        "fer2013": "fer2013.csv",
        "fi": "agg.csv",
        "abstract": "ABSTRACT_groundTruth.csv",
        "vecbench": "test_metadata.csv",
        "emotion6": "ground_truth.txt",
        "webemo": "train25.txt",
        "twitter1": "amt_result.csv",
        "rafdb": "list_patition_label.txt",
        "flickr_ldl": "ground_truth.txt",
        "emoset": "train.json",
        "emotic": "Annotations.mat",
    }
    with _folder() as folder:
        (folder / "a.csv").write_bytes(data)
        with contextlib.suppress(UserError):
            list(read_rows(folder / "a.csv"))
        for kind, name in lists.items():
            root = folder / kind
            (root / "EmoLabel").mkdir(parents=True)
            for place in (root / name, root / "EmoLabel" / name):
                place.write_bytes(data)
            with contextlib.suppress(UserError):
                _scan(kind, root)


def _scan(kind: str, root: Path) -> None:
    scan_folder(find_builder(kind, str(root)), root, Checks(kind, root))


def class_folders(names: list[bytes]) -> None:
    """Folders and files of any names."""
    with _folder() as folder:
        for name in names:
            path = os.path.join(os.fsencode(folder), name)
            with contextlib.suppress(OSError, ValueError):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(png())
        for split in ("whole", "train", "../x", "a"):
            with contextlib.suppress(UserError):
                _read(open_folders(str(folder), split))


def image(data: bytes) -> None:
    """An encoded image."""
    dhash(data, 10**6)
    PROCESSOR.still_patches(data)


def tokenizer(name: str, data: bytes) -> None:
    """A file of a tokenizer."""
    with _folder() as folder:
        PROCESSOR.save(folder)
        (folder / name).write_bytes(data)
        found = read_tokenizer(folder)
        render_prompt(found, SET, "why ?", LABELS, 4)


def safetensors(data: bytes) -> None:
    """Weights."""
    with _folder() as folder:
        (folder / "model.safetensors").write_bytes(data)
        weights.read_params(folder, _POLICY)


def model_config(data: bytes) -> None:
    """The `config.json` of a policy's folder."""
    with _folder() as folder:
        (folder / "config.json").write_bytes(data)
        models.read_config(folder)


def model_shapes(data: bytes) -> None:
    """The same, with the parameters that it implies."""
    models.parse_config(parse_json(data.decode(errors="replace"), "x", DataError)).param_shapes()


def preprocessor(data: bytes) -> None:
    """The settings of images of a policy's folder."""
    found = ImageSettings.from_hf(parse_json(data.decode(errors="replace"), "x", DataError, dict))
    found.smart_resize(100, 200)


def template(data: bytes) -> None:
    """A prompt template."""
    with _folder() as folder:
        (folder / "set.txt").write_bytes(data)
        found = PromptTemplates.load(folder / "set.txt").set
        fill(found, question="why ?", labels=LABELS)
        render_prompt(_TOKENIZER, found, "why ?", LABELS, 4)


def ids(data: bytes) -> None:
    """A list of ids."""
    with _folder() as folder:
        rows = [{"image": "x.png", "label": "joy", "id": str(i)} for i in range(3)]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "ids.txt").write_bytes(data)
        read_ids(folder / "ids.txt", open_json_lines(str(folder / "a.jsonl")))


def predictions(data: bytes) -> None:
    """A file of predictions."""
    with _folder() as folder:
        (folder / "a.jsonl").write_bytes(data)
        read_predictions(folder / "a.jsonl")


def words(text: str) -> None:
    """Labels, columns and expressions of a config, and what a policy says."""
    for read in (
        label_set,
        lambda x: label_map(x, "emotion6"),
        lambda x: lowercase_labels(x.split(",")),
        parse_columns,
        PatternRule,
    ):
        with contextlib.suppress(UserError):
            read(text)
    assert 0 <= log_score(text, "joy") <= 1


def config(field: str, value: object) -> None:
    """A config with one field of any type and value."""
    found = default()
    *sections, key = field.split(".")
    section = found
    for name in sections:
        section = section[name]
    try:
        with section.ignore_type():
            section[key] = value
    except (ValueError, TypeError, KeyError, OverflowError):
        # Nothing that a ConfigDict takes.
        return
    validate(found)


def fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the names of all fields and sections."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{key}.")


BYTES: dict[str, Callable[[bytes], None]] = {
    door.__name__: door
    for door in (
        json_lines,
        parquet,
        csv,
        image,
        safetensors,
        model_config,
        preprocessor,
        template,
        ids,
        predictions,
    )
}
"""Doors that take bytes, by name."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def seeds() -> dict[str, list[bytes]]:
    """Returns door → inputs that it takes, to begin with."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    images = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        images.append(file.getvalue())
    row = {"images": [{"bytes": png(), "path": None}], "problem": "why ?", "answer": "joy"}
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row] * 3), table)
    tensor = {"model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps(tensor).encode()
    said = {"id": "a", "label": "joy", "answer": "joy", "lenient": "joy", "responses": []}
    return {
        "json_lines": [
            b'{"image": "x.png", "answer": "joy", "distribution": {"joy": 3, "fear": 1}, "id": 3}',
            b'{"image": "x.png", "label": "fear", "question": "why ?", "response": ["a"]}\r\n' * 2,
        ],
        "parquet": [table.getvalue()],
        "csv": [
            b"emotion,pixels,Usage\n0," + b" ".join([b"7"] * 2304) + b",Training\n",
            b"happiness,http://a/b.jpg,1,4\nanger,http://a/c.jpg,4,1\n",
            b"task,split,image_path,label\nfi-8,test,a.jpg,joy\nwebemo-2,test,../b.jpg,positive\n",
            b"a/1.jpg 3 5 0.1 0 0.2 0.7 0 0 0\n",
            b"http://a/b.jpg 3\nhttp://a/c.jpg 24\n",
            b"train_0001.jpg 3\ntest_0001.jpg\n",
            b'[["awe", "image/awe/a.jpg", "annotation/awe/a.json"], ["awe", "a", "../b.jpg", "c"]]',
            b"name amusement awe contentment excitement anger disgust fear sadness\n"
            b"a 1 1 1 1 1 1 1 1\n",
            b"MATLAB 5.0 MAT-file" + bytes(105) + b"\x00\x01IM" + bytes(40),
        ],
        "image": images,
        "safetensors": [struct.pack("<Q", len(header)) + header + bytes(8)],
        "model_config": [json.dumps(_POLICY.shapes.to_hf()).encode()],
        "preprocessor": [json.dumps(_IMAGES.to_hf()).encode()],
        "template": [b"Say {question} of {labels}: \\boxed{label}\n"],
        "ids": [b"0\n1\r\n2\n"],
        "predictions": [json.dumps(said).encode()],
    }
