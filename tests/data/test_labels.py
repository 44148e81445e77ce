import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS, VALENCE_AROUSAL, label_grades, label_set


def test_emoset_has_its_four_positive_labels_first():
    polarity = [VALENCE_AROUSAL[label][0] for label in LABEL_SETS["mikels8"]]
    assert polarity == ["positive"] * 4 + ["negative"] * 4


def test_every_label_lies_on_both_axes():
    for labels in LABEL_SETS.values():
        for label in labels:
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
