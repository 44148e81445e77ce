"""`emor3.json`: written, read back, and named where it is damaged."""

import dataclasses
import json

import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.inference_settings import FILE, InferenceSettings

CHANGED = InferenceSettings().changed(
    labels="joy, fear", question="¿qué?", template="tiny", max_tokens=64
)


def test_settings_are_read_back(tmp_path):
    CHANGED.write(tmp_path)
    found = InferenceSettings.read(tmp_path)
    assert found.templates == CHANGED.templates and found.labels == ("joy", "fear")
    assert found.question == "¿qué?" and found.max_tokens == 64
    assert found.prompt == CHANGED.prompt
    assert InferenceSettings.read(tmp_path / "other") is None
    assert found.first_resize is None and "first_resize" not in CHANGED.to_json()
    resized = dataclasses.replace(CHANGED, first_resize=(0, 4096))
    assert InferenceSettings.from_json(resized.to_json()).first_resize == (0, 4096)


def test_a_name_of_templates_takes_its_reflections_too(tmp_path):
    assert CHANGED.templates.reflections != InferenceSettings().templates.reflections
    own = tmp_path / "set.txt"
    own.write_text("{question} One of {labels}.\n")
    found = CHANGED.changed(template=own)
    assert found.templates.reflections == CHANGED.templates.reflections
    assert found.prompt == "¿qué? One of joy, fear."
    assert CHANGED.changed(template="direct").templates.set.endswith("and nothing else.")
    assert CHANGED.changed(labels="mikels8").labels[0] == "amusement"
    # Labels of its own have no order of the old ones.
    assert CHANGED.changed(labels=["a", "b"]).listed == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "joy"}, r"labels='joy': must be a list of labels"),
        ({"labels": ["joy", 3]}, r"must be a list of labels"),
        ({"listed": ["joy"]}, r"listed=\['joy'\]: must be the labels in another order"),
        ({"question": None}, r"question=None: must be a text"),
        ({"question": ""}, r"question='': is empty"),
        ({"templates": {"set": "{question}"}}, r"templates has no coherence, consistency"),
        ({"templates": []}, r"templates=\[\]: must be an object of texts"),
        ({"max_tokens": True}, r"max_tokens=True: must be a whole number"),
        ({"max_tokens": 0}, r"max_tokens=0: must be 1 to"),
        ({"first_resize": [9, 4]}, r"first_resize=\[9, 4\]: must be two whole numbers of pixels"),
        ({"first_resize": 9}, r"first_resize=9: must be two"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    data = json.loads(CHANGED.to_json()) | change
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(DataError, match=message) as raised:
        InferenceSettings.read(tmp_path)
    assert FILE in str(raised.value)


def test_a_template_without_its_placeholder_is_named(tmp_path):
    data = json.loads(CHANGED.to_json())
    data["templates"]["coherence"] = "which ?"
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"emor3.json: a coherence template must contain"):
        InferenceSettings.read(tmp_path)
