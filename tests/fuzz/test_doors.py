"""Whatever comes in by a door either works or ends in an error of the package, in bounded time.

The same examples at each run; `make fuzz` looks for others.
"""

import contextlib
import json
import math
import struct
import warnings

import pytest
from fuzz import doors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emor3_jax.config import default
from emor3_jax.errors import UserError

SEEDS = doors.seeds()
_SETTINGS = {
    "deadline": 10_000,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
few = settings(max_examples=40, **_SETTINGS)
many = settings(max_examples=150, **_SETTINGS)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        # PIL and numpy warn of what is damaged.
        warnings.simplefilter("ignore")
        yield


def _only_own_errors(door, *given) -> None:
    """Calls a door; what is not an error of the package fails the test."""
    try:
        door(*given)
    except (UserError, FileNotFoundError) as error:
        assert len(str(error)) < 5000
        assert "\0" not in str(error)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf]),
    st.text(max_size=20),
    st.sampled_from(["joy", "JOY ", "\ud800", "a\0b", "../x", "<image>", "<|image_pad|>", "x.png"]),
)
VALUES = st.recursive(
    ODD,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _dumps(value: object) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:
        # A number of over 4,300 digits.
        return b"1" * 5000


@st.composite
def damaged(draw, whole: list[bytes]) -> bytes:
    """A file of a kind with some bytes changed, cut, doubled or put in."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([0, 1, 2, 4, 40, 10**6]))
        new = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from(
                    [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"', b"{", b"[" * 5000]
                ),
                st.sampled_from([b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"\xe9", b"\n\n"]),
            )
        )
        data[at : at + size] = new
    return bytes(data)


ROW_FIELDS = ("image", "answer", "label", "question", "problem", "id", "distribution", "response")


@many
@given(damaged(SEEDS["json_lines"]))
def test_damaged_json_lines(data):
    _only_own_errors(doors.json_lines, data)


@many
@given(st.dictionaries(st.sampled_from(ROW_FIELDS), VALUES, max_size=5), VALUES)
def test_json_lines_of_any_types(row, other):
    _only_own_errors(doors.json_lines, _dumps({"image": "x.png"} | row) + b"\n" + _dumps(other))


@many
@given(damaged(SEEDS["parquet"]))
def test_damaged_parquet(data):
    _only_own_errors(doors.parquet, data)


CELLS = st.one_of(ODD, st.binary(max_size=8), st.just({"bytes": doors.png(), "path": "x"}))


@many
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.lists(CELLS | st.lists(CELLS, max_size=2), min_size=2, max_size=2)
            | st.sampled_from([["joy", "fear"], [doors.png()] * 2, [1, 2], [None, None]])
            for name in ("images", "problem", "answer", "distribution", "response", "split")
        },
    )
)
def test_parquet_of_any_types(columns):
    _only_own_errors(doors.parquet_columns, columns)


@few
@given(damaged(SEEDS["csv"]))
def test_damaged_lists_of_named_data_sets(data):
    _only_own_errors(doors.csv, data)


NAMES = st.lists(
    st.sampled_from([b"a/1.png", b"a", b"b/c/2.JPG", b"train/a/x", b"._a/x.png", b"a,b/1.png"])
    | st.binary(min_size=1, max_size=12).filter(
        lambda x: b".." not in x.split(b"/") and x[0] != 47
    ),
    max_size=6,
)


@many
@given(NAMES)
def test_class_folders_of_any_names(names):
    _only_own_errors(doors.class_folders, names)


@many
@given(damaged(SEEDS["image"]))
def test_damaged_images(data):
    _only_own_errors(doors.image, data)


@pytest.mark.parametrize("name", doors.TOKENIZER_FILES)
def test_damaged_tokenizers(tmp_path, name):
    doors.PROCESSOR.save(tmp_path)
    whole = (tmp_path / name).read_bytes()

    @few
    @given(damaged([whole]))
    def check(data):
        _only_own_errors(doors.tokenizer, name, data)

    check()


@few
@given(
    st.sampled_from(["eos_token", "added_tokens_decoder", "model_max_length", "auto_map"]), VALUES
)
def test_tokenizer_configs_of_any_types(field, value):
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", field: value}
    _only_own_errors(doors.tokenizer, "tokenizer_config.json", _dumps(config))


@many
@given(st.binary(max_size=30) | VALUES.map(_dumps), st.integers(0, 2**64 - 1) | st.none())
def test_headers_of_safetensors(header, size):
    size = len(header) if size is None else size
    _only_own_errors(doors.safetensors, struct.pack("<Q", size) + header + bytes(64))


@many
@given(
    VALUES, st.lists(st.integers(-1, 2**62), max_size=4), st.sampled_from(["F32", "F8_E4M3", "x"])
)
def test_tensors_of_safetensors(offsets, shape, kind):
    tensor = {"dtype": kind, "shape": shape, "data_offsets": offsets}
    header = _dumps({"model.norm.weight": tensor})
    _only_own_errors(doors.safetensors, struct.pack("<Q", len(header)) + header + bytes(128))


CONFIG = json.loads(SEEDS["model_config"][0])
CONFIG_FIELDS = [
    *CONFIG,
    *(f"vision_config.{name}" for name in CONFIG["vision_config"]),
    *(f"rope_scaling.{name}" for name in CONFIG["rope_scaling"]),
    *("text_config", "quantization_config", "auto_map", "head_dim"),
]


@many
@given(st.sampled_from(CONFIG_FIELDS), VALUES | st.integers(1, 300))
def test_model_configs_of_any_types(field, value):
    data = json.loads(json.dumps(CONFIG))
    *parents, key = field.split(".")
    (data[parents[0]] if parents else data)[key] = value
    _only_own_errors(doors.model_config, _dumps(data))


@settings(max_examples=12, **_SETTINGS)
@given(st.sampled_from(CONFIG_FIELDS), st.integers(1, 300))
def test_parameters_of_model_configs(field, value):
    data = json.loads(json.dumps(CONFIG))
    *parents, key = field.split(".")
    (data[parents[0]] if parents else data)[key] = value
    _only_own_errors(doors.model_shapes, _dumps(data))


@many
@given(damaged(SEEDS["model_config"]))
def test_damaged_model_configs(data):
    _only_own_errors(doors.model_config, data)


@many
@given(st.dictionaries(st.sampled_from([*doors.PROCESSOR.images.to_hf(), "auto_map"]), VALUES))
def test_settings_of_images_of_any_types(changes):
    data = doors.PROCESSOR.images.to_hf() | changes
    _only_own_errors(doors.preprocessor, _dumps(data))


@many
@given(damaged(SEEDS["template"]))
def test_templates(data):
    _only_own_errors(doors.template, data)


@many
@given(damaged(SEEDS["ids"]))
def test_lists_of_ids(data):
    _only_own_errors(doors.ids, data)


PREDICTION = json.loads(SEEDS["predictions"][0])


@many
@given(st.dictionaries(st.sampled_from(list(PREDICTION)), VALUES))
def test_predictions_of_any_types(changes):
    _only_own_errors(doors.predictions, _dumps(PREDICTION | changes))


WORDS = (
    st.text(max_size=30)
    | st.sampled_from(
        [
            "mikels8",
            "joy,fear",
            "a,A",
            "a / b,a/b",
            "joy,",
            "image:a,image:b",
            "(a|b)*c{2,3}",
            "\\boxed{",
        ]
    )
    | st.lists(st.sampled_from(list("ab,()[]{}*+?|\\^$:.-<>/ \n")), max_size=12).map("".join)
)


@many
@given(WORDS)
def test_words(text):
    _only_own_errors(doors.words, text)


FIELDS = list(doors.fields(default()))


@many
@given(st.sampled_from(FIELDS), VALUES)
def test_configs_of_any_types(field, value):
    with contextlib.suppress(UnicodeEncodeError):
        # ml_collections refuses half of a character by itself.
        _only_own_errors(doors.config, field, value)
