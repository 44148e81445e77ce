"""Labels and answers are compared in one form, in Python and in the tables of the rewards."""

import re
from pathlib import Path

import pytest

import emor3_jax
from emor3_jax import rewards
from emor3_jax.data.labels import find_label, label_grades, label_set
from emor3_jax.data.labels import normalize as of_data
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.rewards.stated import log_score
from emor3_jax.spelling import normalize

CASES = {
    "doubt/confusion": (
        "doubt/confusion",
        "Doubt / Confusion",
        "doubt/\tconfusion",
        " doubt /confusion ",
    ),
    "café": ("café", "cafe\u0301", "CAFÉ"),
    "tiếng việt": ("tiếng việt", "Tie\u0302\u0301ng Vie\u0323\u0302t", "TI\u00ca\u0301NG VIỆT"),
    "기쁨": ("기쁨", "\u1100\u1175\u1108\u1173\u11b7"),
    "joy": ("joy", "Joy ", "\u00a0joy\n"),
}


@pytest.fixture
def tokenizer():
    return train_tokenizer(["which emotion is this ? joy , fear yes or no"], 300)


@pytest.mark.parametrize("label", CASES)
def test_spellings_of_one_label_are_equal(label):
    labels = (label, "fear")
    assert of_data is normalize and {normalize(x) for x in CASES[label]} == {label}
    for spelt in CASES[label]:
        assert find_label(spelt, labels) == label
        assert label_grades([(spelt, 1.0)], {label: 0}).tolist() == [1]
        stated = "\\boxed{" + spelt + "} <confidence>0.99</confidence>"
        assert log_score(stated, label) == log_score(stated, spelt) == pytest.approx(1)


def test_the_tables_read_what_python_compares(tokenizer):
    """However the label set is spelt, a response that spells a label like the data is right."""
    labels = label_set("Doubt / Confusion,cafe\u0301,Joy ,Tiếng Việt,기쁨")
    assert labels == ("Doubt/Confusion", "café", "Joy", "Tiếng Việt", "기쁨")
    pairs = [(x, label) for label in CASES for x in CASES[label]]
    scorer = rewards.Scorer(tokenizer, labels)
    scores = scorer.score_text(["\\boxed{" + x + "}" for x, _ in pairs], [y for _, y in pairs])
    assert scores["accuracy"].tolist() == [1.0] * len(pairs)
    # Half of a letter, or an accent too many, is another word.
    wrong = ["cafe", "cafe\u0301\u0301", "cafe \u0301", "\u0301", "\u1100\u1175"]
    scores = scorer.score_text(["\\boxed{" + x + "}" for x in wrong], ["café"] * len(wrong))
    assert not scores["accuracy"].any()


def test_no_other_module_compares_in_a_way_of_its_own():
    found = {
        str(file)
        for file in Path(emor3_jax.__file__).parent.rglob("*.py")
        if re.search(r"\.strip\(\)\.lower\(\)|\.lower\(\)\.strip\(\)|casefold", file.read_text())
    }
    assert not found
