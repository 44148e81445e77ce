import collections
import pickle

import numpy as np
import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.generic import FilesSource
from emor3_jax.data.labels import label_map
from emor3_jax.data.sources import Texts, sizes_of
from emor3_jax.data.views import (
    Joined,
    Relabelled,
    Subset,
    balanced_subset,
    natural_subset,
    read_ids,
)


@pytest.fixture
def source(tmp_path, make):
    """Nine rows: five of joy, three of fear, one of anger."""
    answers = ["joy"] * 5 + ["Fear"] * 3 + ["anger"]
    texts = [Texts("which ?", answer, f"r{i}") for i, answer in enumerate(answers)]
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(make["png"](i, 8 + i, 16))
    return FilesSource("nine", [tmp_path / f"{i}.png" for i in range(9)], texts)


def ids(source) -> list[str]:
    return [texts.id for texts in source.texts()]


def test_labels_are_called_by_another_set():
    shares = (("amusement", 0.2), ("contentment", 0.3), ("awe", 0.5), ("boredom", 9.0))
    texts = [Texts("which ?", " Awe", "a", distribution=shares), Texts("which ?", "boredom", "b")]
    view = Relabelled(FilesSource("x", ["", ""], texts), label_map("mikels8", "emotion6"))
    first, second = view.texts()
    assert first.answer == "surprise"
    assert dict(first.distribution) == {"joy": pytest.approx(0.5), "surprise": 0.5}
    # No counterpart: it keeps its name, to be counted later.
    assert second.answer == "boredom" and second.distribution is None
    assert len(view) == 2 and view.find("b") == 1


def test_faulty_shares_stay_faulty():
    texts = [Texts("which ?", "awe", "a", distribution=(("awe", -1.0), ("fear", 2.0)))]
    (found,) = Relabelled(FilesSource("x", [""], texts), {"awe": "joy", "fear": "fear"}).texts()
    assert found.distribution == (("joy", -1.0),)


def test_a_response_boxes_a_label_of_its_own_set():
    texts = [Texts("which ?", x, x, responses=("\\boxed{" + x + "}",)) for x in ("awe", "fear")]
    mapping = {"awe": "surprise", "fear": "fear"}
    first, second = Relabelled(FilesSource("x", ["", ""], texts), mapping).texts()
    assert first.answer == "surprise" and first.responses == ()
    assert second.responses == ("\\boxed{fear}",)


def test_a_subset_keeps_order_rows_and_ids(source):
    view = Subset(source, np.array([1, 5, 8]))
    assert ids(view) == ["r1", "r5", "r8"] == [view[i].texts.id for i in range(3)]
    assert view[2].images == source[8].images
    assert [view.find(i) for i in ids(view)] == [0, 1, 2]
    assert sizes_of(view).tolist() == [[9, 16], [13, 16], [16, 16]]
    assert pickle.loads(pickle.dumps(view))[1] == view[1]
    for row_id in ("r0", "r2", "r99"):
        with pytest.raises(KeyError):
            view.find(row_id)


def test_a_balanced_subset_gives_every_label_as_many_as_there_are(source):
    texts, labels = list(source.texts()), ("joy", "fear", "anger")

    def counts(size: int, seed: int = 0) -> dict[str, int]:
        rows = balanced_subset(texts, labels, size, seed)
        assert len(set(rows)) == size and (np.diff(rows) > 0).all()
        return dict(collections.Counter(texts[i].answer for i in rows))

    assert counts(3) == {"joy": 1, "Fear": 1, "anger": 1}
    # One row of anger only: its turn goes to the others.
    assert counts(5) == {"joy": 2, "Fear": 2, "anger": 1}
    assert counts(8) == {"joy": 4, "Fear": 3, "anger": 1}
    assert counts(9) == {"joy": 5, "Fear": 3, "anger": 1}
    draws = {tuple(balanced_subset(texts, labels, 3, seed)) for seed in range(20)}
    assert len(draws) > 5 and all(row[-1] == 8 for row in draws)
    assert tuple(balanced_subset(texts, labels, 3, 7)) in draws
    with pytest.raises(DataError, match=r"subset=10 must be .* at most the 9 labelled rows"):
        balanced_subset(texts, labels, 10, 0)
    # Rows of other labels are never drawn.
    assert max(balanced_subset(texts, ("joy", "fear"), 8, 0)) == 7


def test_ids_are_read_from_a_file(source, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("r7\nr2\n\n")
    assert read_ids(path, source).tolist() == [2, 7]
    path.write_text("r7\nother\n")
    with pytest.raises(DataError, match="names 1 rows of 2 that nine does not have, such as other"):
        read_ids(path, source)
    with pytest.raises(DataError, match=r"gone\.txt cannot be read: No such file"):
        read_ids(tmp_path / "gone.txt", source)


def test_joined_sources_keep_apart_what_has_equal_ids(source):
    joined = Joined({"a": source, "b": Subset(source, np.array([3, 8]))})
    assert len(joined) == 11 and joined.starts.tolist() == [0, 9, 11]
    names = ids(joined)
    assert names[8:] == ["a/r8", "b/r3", "b/r8"]
    assert [joined.find(name) for name in names] == list(range(11))
    assert joined[10].texts == list(joined.texts())[10]
    assert joined[10].images == source[8].images
    assert sizes_of(joined).shape == (11, 2)
    for row_id in ("r0", "c/r0", "b/r0"):
        with pytest.raises(KeyError):
            joined.find(row_id)


def test_a_natural_subset_keeps_the_mix():
    texts = [Texts("which ?", "joy" if i % 4 else "Fear", f"r{i}") for i in range(400)]
    texts += [Texts("which ?", "boredom", "x"), Texts("which ?", None, "y")]
    drawn = natural_subset(texts, ("joy", "fear"), 200, seed=3)
    assert len(set(drawn.tolist())) == 200 and (np.diff(drawn) > 0).all() and drawn.max() < 400
    fear = sum(texts[i].answer == "Fear" for i in drawn)
    # A quarter of all rows are fear; three standard deviations of the draw are 13.
    assert 37 <= fear <= 63
    np.testing.assert_array_equal(drawn, natural_subset(texts, ("joy", "fear"), 200, seed=3))
    assert drawn.tolist() != natural_subset(texts, ("joy", "fear"), 200, seed=4).tolist()
    with pytest.raises(DataError, match="subset=401 must be at least 1 and at most the 400"):
        natural_subset(texts, ("joy", "fear"), 401, seed=3)


def test_candidates_are_called_by_another_set_too():
    texts = [Texts("which ?", "rage", "a", candidates=("rage", "zest", "confusion", "pride"))]
    view = Relabelled(FilesSource("x", [""], texts), label_map("webemo25", "parrott6"))
    assert next(view.texts()).candidates == ("anger", "joy")
