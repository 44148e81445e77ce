import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import (
    LABEL_SETS,
    VALENCE_AROUSAL,
    label_grades,
    label_map,
    label_set,
)


def test_emoset_has_its_four_positive_labels_first():
    polarity = [VALENCE_AROUSAL[label][0] for label in LABEL_SETS["mikels8"]]
    assert polarity == ["positive"] * 4 + ["negative"] * 4


AXES = ("polarity2", "arousal2")


def test_every_emotion_lies_on_both_axes():
    for name in LABEL_SETS.keys() - AXES:
        for label in LABEL_SETS[name]:
            polarity, arousal = VALENCE_AROUSAL[label]
            assert polarity in ("positive", "negative", "neutral") and arousal in ("high", "low")


def test_labels_by_name_or_spelt_out():
    assert label_set("emotion6")[3] == "joy"
    assert label_set("calm, Upset") == ("calm", "Upset")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mikels9", "nearest: mikels8"),
        ("joy,,fear", "empty label"),
        ("joy, Joy", "'joy' and 'Joy' are equal"),
        ("", "is no label set"),
    ],
)
def test_unusable_labels_are_named(text, message):
    with pytest.raises(DataError, match=message):
        label_set(text)


@pytest.mark.parametrize(
    ("shares", "grades"),
    [
        ([("joy", 0.2), (" Fear", 0.8)], [0.25, 1.0]),
        # The sum does not matter, labels of others count for nothing.
        ([("joy", 30), ("neutral", 60)], [1.0, 0.0]),
        ([("joy", 0.0), ("fear", 0.0)], None),
        ([("neutral", 1.0)], None),
        ([("joy", 0.5), ("fear", -0.5)], None),
        ([("joy", float("nan"))], None),
        ([("joy", None)], None),
        ([("joy", 0.5), ("JOY", 0.5)], None),
        ([(None, 0.5), ("fear", 0.5)], [0.0, 1.0]),
        ([], None),
    ],
)
def test_grades_are_shares_beside_the_largest(shares, grades):
    found = label_grades(shares, {"joy": 0, "fear": 1})
    assert (found if found is None else found.tolist()) == grades


def test_webemo_goes_from_25_labels_to_6_to_2():
    six = label_map("webemo25", "webemo6")
    assert set(six) == set(LABEL_SETS["webemo25"])
    assert set(six.values()) == set(LABEL_SETS["webemo6"])
    assert (six["rage"], six["zest"], six["shame"]) == ("anger", "joy", "sadness")
    # Straight to polarity is the same as by the groups.
    two, by_group = label_map("webemo25", "polarity2"), label_map("webemo6", "polarity2")
    assert two == {label: by_group[group] for label, group in six.items()}
    assert two["relief"] == "positive" and two["envy"] == "negative"


def test_maps_stay_within_the_wanted_set():
    for own in LABEL_SETS.keys() - AXES:
        for wanted in (*AXES, "emotion6"):
            found = label_map(own, wanted)
            assert set(found) <= set(LABEL_SETS[own])
            assert set(found.values()) <= set(LABEL_SETS[wanted])


def test_labels_without_counterpart_are_left_out():
    assert "neutral" not in label_map("fer7", "polarity2")
    assert label_map("fer7", "arousal2")["neutral"] == "low"
    assert "neutral" not in label_map("fer7", "emotion6")
    assert label_map("mikels8", "emotion6")["awe"] == "surprise"


def test_other_sets_are_joined_by_equal_names():
    assert label_map("emotion6", "joy, Fear") == {"joy": "joy", "fear": "Fear"}
    assert label_map("mikels8", "mikels8") == {label: label for label in LABEL_SETS["mikels8"]}
    with pytest.raises(DataError, match=r"no counterpart of any label of mikels8.*emotion6"):
        label_map("mikels8", "calm,tense")
