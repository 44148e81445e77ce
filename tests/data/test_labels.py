import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import (
    LABEL_SETS,
    SPELLINGS,
    VALENCE_AROUSAL,
    find_label,
    label_grades,
    label_map,
    label_set,
    spellings,
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
        ("joy,caf\udce9", r"label 'caf.udce9' is no text in UTF-8"),
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


def test_webemo_goes_from_25_labels_to_7_to_2():
    seven = label_map("webemo25", "webemo7")
    assert set(seven) == set(LABEL_SETS["webemo25"])
    assert set(seven.values()) == set(LABEL_SETS["webemo7"])
    assert (seven["rage"], seven["zest"], seven["shame"]) == ("anger", "joy", "sadness")
    assert seven["confusion"] == "confusion" and seven["gratitude"] == "love"
    # Straight to polarity is the same as by the groups.
    two, by_group = label_map("webemo25", "polarity2"), label_map("webemo7", "polarity2")
    assert two == {label: by_group[group] for label, group in seven.items()}
    assert two["relief"] == "positive" and two["envy"] == two["confusion"] == "negative"


def test_the_six_groups_of_parrott_have_no_confusion():
    six = label_map("webemo25", "parrott6")
    assert set(LABEL_SETS["webemo25"]) - set(six) == {"confusion"}
    assert set(six.values()) == set(LABEL_SETS["parrott6"])
    with pytest.raises(DataError, match="labels='webemo6' is no label set"):
        label_map("webemo25", "webemo6")


def test_maps_stay_within_the_wanted_set():
    for own in LABEL_SETS.keys() - AXES:
        for wanted in (*AXES, "emotion6"):
            if own in ("webemo25", "webemo7", "parrott6", "emotic26") and wanted == "emotion6":
                continue
            found = label_map(own, wanted)
            assert set(found) <= set(LABEL_SETS[own])
            assert set(found.values()) <= set(LABEL_SETS[wanted])


@pytest.mark.parametrize(
    ("name", "labels", "found"),
    [
        ("Happy", "fer7", "happiness"),
        ("happy", "emotion6", "joy"),
        (" ANGRY", "fer7", "anger"),
        ("sad", "mikels8", "sadness"),
        ("cheerfullness", "webemo25", "cheerfulness"),
        ("boredom", "fer7", None),
        ("happy", "joy,happiness", None),
        ("happiness", "joy,happiness", "happiness"),
    ],
)
def test_a_label_may_be_spelt_in_any_way(name, labels, found):
    assert find_label(name, label_set(labels)) == found


def test_all_spellings_of_a_set():
    assert spellings(("Joy", "calm")) == {
        "joy": "Joy",
        "joyful": "Joy",
        "happy": "Joy",
        "happiness": "Joy",
        "calm": "calm",
    }
    assert all(
        len(names & other) == 0 for names in SPELLINGS for other in SPELLINGS if names != other
    )


def test_folders_of_other_spellings_lose_no_class():
    # Folders of some of a set's labels, in other words.
    some = {"angry": "anger", "happy": "happiness", "sad": "sadness"}
    assert label_map("angry,happy,sad", "fer7") == some
    own = "angry,disgust,fear,happy,neutral,sad,surprise"
    assert set(label_map(own, "fer7").values()) == set(LABEL_SETS["fer7"])


def test_a_set_that_would_lose_classes_is_refused():
    with pytest.raises(
        DataError, match=r"'fer7' loses the rows of mad, glad .*no row would be anger"
    ):
        label_map("mad,glad,fear", "fer7")
    # A choice of labels, or a data set without some of them, loses nothing unseen.
    assert label_map("fer7", "anger,fear") == {"anger": "anger", "fear": "fear"}
    assert label_map("anger,fear", "fer7") == {"anger": "anger", "fear": "fear"}


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
