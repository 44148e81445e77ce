"""Tables on disk: equal to those built, never trusted when torn or stale."""

import jax
import numpy as np
import pytest

from emor3_jax import rewards
from emor3_jax.rewards import automaton, cache, spans


@pytest.fixture
def built(straddling, monkeypatch):
    """How often tables were built, counted by their span tables."""
    calls = []
    build = spans.build_spans

    def count(tokens):
        calls.append(len(tokens))
        return build(tokens)

    monkeypatch.setattr(spans, "build_spans", count)
    return calls


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(equal))


def test_what_is_read_is_what_was_built(straddling, labels, built, tmp_path):
    folder = tmp_path / "made" / "here"
    tokenizer = straddling.tokenizer
    term = rewards.Term("joyful", 0.1, "jo+y")
    paper, release = (rewards.Reward(profile, terms=(term,)) for profile in ("paper", "release"))
    first = rewards.Scorer(tokenizer, labels, reward=paper, cache=folder)
    again = rewards.Scorer(tokenizer, labels, reward=release, cache=folder)
    assert len(built) == 1 and same(first.tables, again.tables)
    assert again.score_text(["\\boxed{joy}"], ["joy"])["accuracy"].tolist() == [1.0]
    assert [path.suffix for path in folder.iterdir()] == [".npz"]


def test_other_labels_patterns_or_code_are_other_tables(straddling, labels, built, tmp_path):
    tokenizer = straddling.tokenizer
    rewards.Scorer(tokenizer, labels, cache=tmp_path)
    rewards.Scorer(tokenizer, labels[::-1], cache=tmp_path)
    rewards.make_tables(tokenizer, labels, ["a"], tmp_path)
    assert len(built) == len(list(tmp_path.iterdir())) == 3
    assert cache.key([b"ab", b"c"], ["d"]) != cache.key([b"a", b"bc"], ["d"])
    assert cache.key([b"a"], ["b", "c"]) != cache.key([b"a"], ["b"], ["c"])


@pytest.mark.parametrize("fault", ["cut", "changed", "empty"])
def test_a_torn_or_changed_file_is_built_anew(straddling, labels, built, tmp_path, caplog, fault):
    tokenizer = straddling.tokenizer
    first = rewards.Scorer(tokenizer, labels, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if fault == "changed":
        # A number of a table, not the archive's own: its checksum is put right as well.
        arrays = dict(np.load(path))
        arrays["table0"][0, 0] += 1
        np.savez(path, **arrays)
    else:
        path.write_bytes(data[: len(data) // 2] if fault == "cut" else b"")
    again = rewards.Scorer(tokenizer, labels, cache=tmp_path)
    assert len(built) == 2 and same(first.tables, again.tables)
    assert "building the tables again" in caplog.text
    rewards.Scorer(tokenizer, labels, cache=tmp_path)
    assert len(built) == 2


def test_a_folder_that_cannot_be_written_is_no_error(straddling, labels, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    scorer = rewards.Scorer(straddling.tokenizer, labels, cache=tmp_path / "file" / "folder")
    assert isinstance(scorer.tables.replies["coherence"], automaton.Automaton)
    assert "are not kept" in caplog.text
