"""Folders of policies with damaged, absurd or hostile files: named in one error, nothing run."""

import functools
import json
import os
import pickle
import struct

import pytest
from support import tiny

from emor3_jax import models
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.errors import UserError
from emor3_jax.models import weights
from emor3_jax.models.errors import ProcessorError, ShapesError, WeightsError
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.models.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files of a policy's folder, without weights."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["which emotion is this ? joy , fear"], 300)
    policy = tiny.make_policy(vocab_size=len(tokenizer), **special_ids(tokenizer))
    settings = ImageSettings(patch_size=4, min_pixels=256, max_pixels=1024)
    Processor(tokenizer, settings, policy.layout).save(folder)
    (folder / "config.json").write_text(json.dumps(policy.shapes.to_hf()))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder) -> models.Policy:
    policy = models.read_config(folder)
    models.read_processor(folder, policy)
    return policy


def write(folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


NAMES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "generation_config.json",
    "vocab.json",
)
DAMAGED = {
    "empty": b"",
    "cut": b'{"model_type": "qwen2_5_v',
    "list": b"[1]",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "brackets": b"[" * 100_000,
    "infinite": b'{"model_type": "qwen2_5_vl", "rms_norm_eps": 1e400}',
    "surrogate": b'{"a": "\\ud800"}',
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_json_is_named(files, tmp_path, name):
    write(tmp_path, files)
    if name == "processor_config.json":
        (tmp_path / "preprocessor_config.json").unlink()
    for damage, data in DAMAGED.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=str(tmp_path)) as raised:
            read(tmp_path)
        assert name in str(raised.value) or "the tokenizer cannot be read" in str(raised.value), (
            damage
        )
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises((UserError, FileNotFoundError)):
        read(tmp_path)


@pytest.mark.parametrize("name", NAMES[:1] + NAMES[1:2] + NAMES[3:4])
def test_code_in_a_folder_is_refused(files, tmp_path, name):
    data = json.loads(files[name]) | {"auto_map": {"AutoModel": "modeling.Policy"}}
    write(tmp_path, files | {name: json.dumps(data).encode()})
    (tmp_path / "modeling.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match=rf"{name}.* auto_map .* is never run"):
        read(tmp_path)


def _changes(data: dict) -> list[tuple[str, object]]:
    """Every field of a config, each with values of other types and sizes."""
    odd = (None, True, "8", "x", [], {}, -1, 0, 10**12, 2.5, 10**400)
    found = []

    def walk(part: dict, prefix: str) -> None:
        for key, inner in part.items():
            found.extend((prefix + key, value) for value in odd)
            if isinstance(inner, dict):
                walk(inner, f"{prefix}{key}.")

    walk(data, "")
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_field_of_a_config_has_a_type_and_a_range(family):
    """Either it is read, or ShapesError names it: no field makes another error or a hang."""
    text = json.dumps(tiny.make_policy(family).shapes.to_hf())
    refused = 0
    for field, value in _changes(json.loads(text)):
        changed = json.loads(text)
        *parents, key = field.split(".")
        functools.reduce(dict.__getitem__, parents, changed)[key] = value
        try:
            models.parse_config(changed)
        except ShapesError as error:
            refused += 1
            # Of a section that is empty, the first field that is missing is named.
            assert value == {} or key in str(error), field
            assert len(str(error)) < 1000
    assert refused > 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", "14"),
        ("patch_size", 0),
        ("min_pixels", 1e400),
        ("max_pixels", True),
        ("image_mean", 0.5),
        ("image_mean", [0.5]),
        ("image_std", [0, 0, 0]),
        ("image_std", ["a", "b", "c"]),
        ("rescale_factor", "1/255"),
        ("size", [1]),
    ],
)
def test_settings_of_images_of_another_type_are_named(files, tmp_path, field, value):
    data = json.loads(files["preprocessor_config.json"]) | {field: value}
    with pytest.raises(ProcessorError, match=r"preprocessor_config\.json: "):
        ImageSettings.from_hf(data)


def test_pickles_are_named_and_never_read(files, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'was_run'}",)

    write(tmp_path, files)
    policy = read(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(FileNotFoundError, match=r"only .*, a pickle, which can run code"):
            weights.read_params(tmp_path, policy)
        (tmp_path / name).rename(tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=r"(is not a whole|is a pickle under)"):
            weights.read_params(tmp_path, policy)
        (tmp_path / "model.safetensors").unlink()
    assert not (tmp_path / "was_run").exists()


def _header(tensors: object, size: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


def _tensor(shape: list[int], end: int) -> dict:
    return {"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        _header({}, 2**60),
        _header({}, 2**27),
        _header(b"[" * 100_000),
        _header(b"\xff\xfe"),
        _header(_tensor([2**40], 2**42)),
        _header(_tensor([2**62, 2**62], 4)),
        _header(_tensor([4], 4)) + bytes(4),
        _header(_tensor([-1], 4)) + bytes(4),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
    ids=range(11),
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(files, tmp_path, data):
    write(tmp_path, files)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.safetensors is "):
        weights.read_params(tmp_path, read(tmp_path))


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "model.bin", "a/b.safetensors"])
def test_an_index_names_only_files_beside_it(files, tmp_path, name):
    write(tmp_path, files)
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="must name safetensors files beside it"):
        weights.read_params(tmp_path, read(tmp_path))


def test_weights_that_are_no_file_are_named(files, tmp_path):
    write(tmp_path, files)
    os.mkfifo(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="a pipe, a socket or a device"):
        weights.read_params(tmp_path, read(tmp_path))


def test_the_tokenizer_is_written_as_transformers_4_reads_it(files, tmp_path):
    """4.49 and 4.57 fail where `extra_special_tokens` is a list; both read the older field."""
    write(tmp_path, files)
    data = json.loads(files["tokenizer_config.json"])
    assert "extra_special_tokens" not in data and data["tokenizer_class"] == "Qwen2Tokenizer"
    assert (
        "<|image_pad|>" in data["additional_special_tokens"] and data["chat_template"]
        if ("chat_template" in data)
        else (tmp_path / "chat_template.jinja").is_file()
    )
    again = read_tokenizer(tmp_path)
    before = train_tokenizer(["which emotion is this ? joy , fear"], 300)
    text = "<|im_start|>user\n<|image_pad|>joy<|im_end|>"
    assert again.encode(text) == before.encode(text)
    assert again.all_special_ids == before.all_special_ids


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ x", "{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}"],
)
def test_a_damaged_or_hostile_template_is_named(files, tmp_path, template):
    from emor3_jax.data.prompts import PromptTemplates, render_prompt

    write(tmp_path, files | {"chat_template.jinja": template.encode()})
    with pytest.raises(
        UserError, match=r"the (tokenizer's )?chat template (is damaged|fails|rende)"
    ):
        tokenizer = read_tokenizer(tmp_path)
        render_prompt(tokenizer, PromptTemplates.load("tiny").set, "why ?", ("joy", "fear"), 4)
