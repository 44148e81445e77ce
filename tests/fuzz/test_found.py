"""What fuzzing has found, mended since."""

import json

import pytest
from fuzz import doors

from emor3_jax.errors import UserError

FOUND = {
    "an id that is a list": (doors.predictions, b'{"id": [], "label": "a", "answer": "a"}'),
    "a long placeholder": (doors.template, b"{" + b"9" * 5000 + b"}"),
    "a long id": (doors.ids, b"[" * 5000),
    "an id of a token as an empty list": (
        doors.model_config,
        json.dumps(json.loads(doors.seeds()["model_config"][0]) | {"eos_token_id": []}).encode(),
    ),
    "a parquet file whose row group has more rows than it": (
        doors.parquet,
        doors.seeds()["parquet"][0][:1081] + b"\x26\x06" + doors.seeds()["parquet"][0][1083:],
    ),
    "a single word in a list of two": (doors.csv, b"train_0001.jpg\n"),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    door, data = FOUND[case]
    try:
        door(data)
    except UserError as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize("value", [None, {"a": None}, {"a": [None]}, {"a": 3}])
def test_groups_of_any_types(value):
    with pytest.raises(UserError, match=r"config\.evaluate\.groups"):
        doors.config("evaluate.groups", value)


def test_a_tokenizer_that_forgets_its_marks():
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {}}
    with pytest.raises(UserError, match="is no token of the tokenizer"):
        doors.tokenizer("tokenizer_config.json", json.dumps(config).encode())
