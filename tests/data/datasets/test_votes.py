"""Sets of folders, lists and votes: UnbiasedEmo, EmotionROI, Twitter I, Flickr_LDL, Twitter_LDL."""

import pytest

from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.votes import label_of
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS


def answers(source):
    return [texts.answer for texts in source.texts()]


def test_the_label_has_most_votes(tmp_path):
    checks = Checks("x", tmp_path)
    assert label_of({"joy": 1, "fear": 3}, "a", checks) == "fear"
    assert label_of({"joy": 2, "fear": 2}, "b", checks) == "joy"
    assert label_of({"joy": 2, "fear": 2}, "c", checks, keep_ties=False) is None
    assert label_of({"joy": 0, "fear": 0}, "d", checks, keep_ties=False) == ""
    assert checks.to_dict() == {"tie": ["b"], "tie_dropped": ["c"], "no_share": ["d"]}


@pytest.mark.parametrize("where", [".", "images"])
def test_unbiasedemo(tmp_path, write, opened, caplog, where):
    labels = LABEL_SETS["parrott6"]
    root = tmp_path / "UnbiasedEmo"
    for number, thing in enumerate(("baby", "dog")):
        write["classes"](
            root / where, [f"{label}/{thing}" for label in labels], 1, start=9 * number
        )
    source = opened("unbiasedemo", root, "whole")
    assert sorted(answers(source)) == sorted([*labels, *labels])
    assert any(t.id.endswith("love/dog/0.jpg") for t in source.texts())
    assert "12 rows, published are 3045" in caplog.text
    parts = [len(opened("unbiasedemo", root, split)) for split in ("train", "test")]
    assert sum(parts) == 12


@pytest.mark.parametrize("where", ["training_testing_split", "."])
def test_emotionroi(tmp_path, write, opened, caplog, where):
    root = tmp_path / "EmotionROI"
    write["classes"](root / "images", ["anger", "joy"], 2)
    (root / where).mkdir(exist_ok=True)
    (root / where / "training.txt").write_text("anger/0.jpg\njoy/1.jpg\n\n")
    (root / where / "testing.txt").write_text("joy/0.jpg\nanger/9.jpg\n")
    assert answers(opened("emotionroi", root, "train")) == ["anger", "joy"]
    source = opened("emotionroi", root, "test")
    assert [t.id for t in source.texts()] == ["joy/0.jpg", "anger/9.jpg"]
    assert source[1].images == [None] and "1 x missing_file" in caplog.text
    assert "test: 2 rows, published are 594" in caplog.text
    (root / where / "testing.txt").write_text("awe/0.jpg\n")
    with pytest.raises(DataError, match=r"line 1 of testing\.txt is 'awe/0\.jpg', not <emotion>"):
        opened("emotionroi", root, "test")


def test_twitter1_by_its_lists(tmp_path, write, opened, caplog):
    root = tmp_path / "twitter"
    for i in range(3):
        write["image"](root / "Agg_AMT_Candidates" / f"{i}.jpg", i)
    (root / "twitter_three_agrees.txt").write_text("0.jpg 1\n1.jpg 0\n2.jpg 1\n")
    (root / "five_agree.txt").write_text("0.jpg 1\n")
    source = opened("twitter1", root, "whole")
    assert answers(source) == ["positive", "negative", "positive"]
    assert source[2].images[0] and "3 rows, published are 1269" in caplog.text
    assert answers(opened("twitter1", root, "whole", label="five")) == ["positive"]
    with pytest.raises(
        DataError, match=r"no twitter_four_agrees\.txt nor amt_result\.csv\. Twitter"
    ):
        opened("twitter1", root, "whole", label="four")
    (root / "twitter_three_agrees.txt").write_text("0.jpg 2\n")
    with pytest.raises(DataError, match=r"line 1 of twitter_three_agrees\.txt .* file and 0 or 1"):
        opened("twitter1", root, "whole")


def test_twitter1_by_its_votes(tmp_path, write, opened, caplog):
    root = tmp_path / "twitter"
    for i in range(3):
        write["image"](root / "Agg_AMT_Candidates" / f"{i}.jpg", i)
    rows = ["image,total,Positive,Negative", "0.jpg,5,4,1", "1.jpg,5,0,5", "2.jpg,5,3,2"]
    (root / "amt_result.csv").write_text("\n".join(rows) + "\n")
    source = opened("twitter1", root, "whole")
    assert answers(source) == ["positive", "negative", "positive"]
    assert dict(source[0].texts.distribution) == {"negative": 1, "positive": 4}
    assert answers(opened("twitter1", root, "whole", label="four")) == ["positive", "negative"]
    assert "1 x few_votes" in caplog.text
    (root / "amt_result.csv").write_text("image,total,a,b\n0.jpg,5,4,1\n")
    with pytest.raises(DataError, match="one column must begin with negative or neg"):
        opened("twitter1", root, "whole")


LDL = "images-name Amusement Awe Contentment Excitement Anger Disgust Fear Sadness"


@pytest.mark.parametrize(("kind", "count"), [("flickr_ldl", 11150), ("twitter_ldl", 10045)])
def test_ldl(tmp_path, write, opened, caplog, kind, count):
    root = tmp_path / "LDL"
    for i in range(3):
        write["image"](root / "images" / f"{i}.jpg", i)
    (root / "train_ground_truth.txt").write_text(f"{LDL}\n0.jpg 0 5 3 0 0 0 2 1\n")
    # Columns in another order; a tie, of which the first in the file is the label.
    other = "images-name Sadness Fear Disgust Anger Excitement Contentment Awe Amusement"
    (root / "test_ground_truth.txt").write_text(
        f"{other}\n1.jpg 4 0 0 0 0 0 0 4\n2.jpg 0 0 0 1 0 0 0 0"
    )
    (root / "ground_truth.txt").write_text(f"{LDL}\n")
    train, test = (opened(kind, root, split) for split in ("train", "test"))
    assert answers(train) == ["awe"] and answers(test) == ["sadness", "anger"]
    shares = dict(train[0].texts.distribution)
    assert (shares["awe"], shares["contentment"], shares["sadness"]) == (5, 3, 1)
    assert "1 x tie " in caplog.text and f"3 rows, published are {count}" in caplog.text


def test_ldl_in_one_list(tmp_path, write, opened):
    write["image"](tmp_path / "LDL" / "images" / "0.jpg", 0)
    path = tmp_path / "LDL" / "ground_truth.txt"
    path.write_text(f"{LDL}\n0.jpg 0 5 3 0 0 0 2 1\n")
    assert answers(opened("flickr_ldl", tmp_path / "LDL", "whole")) == ["awe"]
    path.write_text(f"{LDL}\n0.jpg 0 5 3 0 0 0 2\n")
    with pytest.raises(DataError, match=r"line 2 of ground_truth\.txt .* 8 votes of 0 or more"):
        opened("flickr_ldl", tmp_path / "LDL", "whole")
    path.write_text(f"{LDL.replace('Awe', 'Joy')}\n")
    with pytest.raises(DataError, match=r"the header of ground_truth\.txt .* must name amusement"):
        opened("flickr_ldl", tmp_path / "LDL", "whole")
