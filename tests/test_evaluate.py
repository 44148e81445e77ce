"""Evaluation: F1, votes and decoupling by hand, and padding rows that must not count."""

from types import SimpleNamespace

import numpy as np
import pytest

from emor3_jax.evaluate import decoupling, evaluate, macro_f1, vote, weighted_f1
from emor3_jax.rollout.generate import SamplingRule
from emor3_jax.types import NOTHING_TO_JUDGE, Batch, Samples, Scores


def test_macro_f1_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    answers = np.array([0, 1, 1, -1, 0])
    # Label 0: one hit, 2 true, 2 said: 2 / 4. Label 1 alike. Label 2 is never said: 0. Label 3
    # does not occur and is left out.
    assert macro_f1(labels, answers, 4) == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert macro_f1(labels, labels, 3) == 1.0
    assert macro_f1(np.array([], int), np.array([], int), 3) == 0.0


def test_a_label_that_is_said_wrongly_lowers_its_own_f1_only() -> None:
    # Label 0: 3 hits, 3 true, 4 said: 6 / 7. Label 1: 0 hits.
    answers = np.array([0, 0, 0, 0])
    assert macro_f1(np.array([0, 0, 0, 1]), answers, 2) == pytest.approx((6 / 7) / 2)


def test_weighted_f1_by_hand() -> None:
    # Label 0: 3 hits, 3 true, 4 said: 6 / 7, of 3 rows. Label 1: 0, of one row.
    answers = np.array([0, 0, 0, 0])
    assert weighted_f1(np.array([0, 0, 0, 1]), answers, 2) == pytest.approx((6 / 7) * 3 / 4)
    assert weighted_f1(np.array([], int), np.array([], int), 2) == 0.0


def test_votes_by_hand() -> None:
    answers = np.array(
        [
            [2, 1, 1, 0],  # 1 has two votes
            [2, 1, 1, 2],  # two each: 2 came first
            [-1, -1, -1, 3],  # no label has no vote
            [-1, -1, -1, -1],  # nobody boxes one: the first speaks
            [-1, 0, 1, 2],  # all different: the first that boxes one
        ]
    )
    assert vote(answers).tolist() == [1, 0, 3, 0, 1]
    assert vote(np.array([[4], [-1]])).tolist() == [0, 0]


def test_decoupling_by_hand() -> None:
    answers = np.array([0, 1, -1, 2, 3, 2])
    inferred = np.array([0, 2, 1, -1, NOTHING_TO_JUDGE, 2])
    # Without a box (third) or without a text (fifth) nothing can disagree; of the four others the
    # second infers another label and the fourth none.
    assert decoupling(answers, inferred) == pytest.approx(2 / 4)
    assert decoupling(np.array([-1, 1]), np.array([0, NOTHING_TO_JUDGE])) == 0.0


class _Actor:
    """Answers by a table: row i of all rows gets entry i of it, one answer or one of each vote."""

    labels = ("joy", "fear")
    terms = ()

    def __init__(self, answers: list, inferred: list, reflects: bool) -> None:
        self.rule = object() if reflects else None
        self.tokenizer = SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens)))
        self._answers, self._inferred, self._row = answers, inferred, 0
        self.keys: list[object] = []

    def run(self, params, batch, key, *, responses, rule, plan):
        self.keys.append(key)
        shape = len(batch.answers), responses
        tokens = np.full((*shape, rule.max_tokens), 7)
        samples = Samples(tokens, tokens * 0.0, np.full(shape, 2), np.ones(shape, bool))
        replies = SimpleNamespace(coherence=samples, consistency=samples)
        return samples, None if self.rule is None else replies

    def score(self, batch, samples, replies):
        rows = slice(self._row, self._row + len(batch.answers))
        self._row = rows.stop
        answer, inferred = (
            np.array(table[rows]).reshape(len(batch.answers), -1)
            for table in (self._answers, self._inferred)
        )
        accuracy = (answer == batch.answers[:, None]).astype(np.float32)
        one = np.ones_like(accuracy)
        return Scores(accuracy, one, accuracy, one, one, answer, inferred, {})


def _batch(answers: list[int], weight: list[float]) -> tuple[Batch, tuple[str, ...]]:
    fields = dict.fromkeys(Batch._fields)
    fields |= {"answers": np.array(answers), "weight": np.array(weight, np.float32)}
    return Batch(**fields), tuple(f"row {i}" if w else "" for i, w in enumerate(weight))


@pytest.mark.parametrize("reflects", [True, False])
def test_padding_rows_do_not_count(reflects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for replies is no pytree: fetching from the device is left out.
    monkeypatch.setattr("jax.device_get", lambda tree: tree)
    batches = [_batch([0, 1], [1, 1]), _batch([1, 0], [1, 0])]
    actor = _Actor([0, 0, 1, 1], [0, 1, 1, 0], reflects)
    rule = SamplingRule(3, 0.0, 1.0, (0,))
    result = evaluate(actor, {}, batches, 5, rule=rule, put=lambda batch: batch, keep=2)
    metrics = result.metrics
    assert metrics["rows"] == 3
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["response_length"] == 2
    assert metrics["truncated"] == 0
    # Label 0: 1 hit, 1 true, 2 said: 2/3. Label 1: 1 hit, 2 true, 1 said: 2/3.
    assert metrics["macro_f1"] == pytest.approx(2 / 3)
    assert ("decoupling" in metrics) == ("coherence" in metrics) == reflects
    if reflects:
        assert metrics["decoupling"] == pytest.approx(1 / 3)
    assert [sample.id for sample in result.samples] == ["row 0", "row 1"]
    assert result.samples[1].label == "fear" and result.samples[1].answer == "joy"
    assert result.samples[0].response == "7 7"
    assert result.samples[0].coherence_reply == ("7 7" if reflects else "")
    assert len(set(map(str, actor.keys))) == 2


def test_accuracy_stays_exact_beside_the_graded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.device_get", lambda tree: tree)
    actor = _Actor([0, 1], [0, 1], False)
    graded = np.array([[1.0], [0.5]], np.float32)
    exact = actor.score
    actor.score = lambda *args: exact(*args)._replace(accuracy=graded)
    rule = SamplingRule(3, 0.0, 1.0, (0,))
    batches = [_batch([0, 0], [1, 1])]
    options = {"rule": rule, "put": lambda batch: batch, "graded": True}
    metrics = evaluate(actor, {}, batches, 5, **options).metrics
    assert metrics["accuracy"] == 0.5
    assert metrics["graded_accuracy"] == 0.75


def test_rows_are_answered_by_vote_and_written_with_every_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jax.device_get", lambda tree: tree)
    # True labels 0, 1, 1; the last row is padding.
    batches = [_batch([0, 1], [1, 1]), _batch([1, 0], [1, 0])]
    answers = [[0, 1, 0], [0, 1, 0], [-1, -1, 1], [0, 0, 0]]
    inferred = [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    rule, written = SamplingRule(3, 0.0, 1.0, (0,)), []
    actor = _Actor(answers, inferred, True)
    options = {"rule": rule, "put": lambda batch: batch, "votes": 3, "record": written.append}
    result = evaluate(actor, {}, batches, 5, **options, keep=9)
    metrics = result.metrics
    # Voted 0, 0, 1: two rows of three right. Of nine responses 2 + 1 + 1 are right.
    assert metrics["rows"] == 3
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["response_accuracy"] == pytest.approx(4 / 9)
    # Seven responses have a box and a text: 0-1, 1-0 and none else disagree.
    assert metrics["decoupling"] == pytest.approx(2 / 7)
    assert result.labels == ("joy", "fear")
    assert result.confusion == ((1, 0, 0), (1, 1, 0))
    assert metrics["accuracy_low"] < 2 / 3 < metrics["accuracy_high"]
    assert [(row["id"], row["label"], row["answer"], row["right"]) for row in written] == [
        ("row 0", "joy", "joy", True),
        ("row 1", "fear", "joy", False),
        ("row 0", "fear", "fear", True),
    ]
    first = written[0]["responses"]
    assert [each["answer"] for each in first] == ["joy", "fear", "joy"]
    assert first[0]["response"] == "7 7" and first[0]["coherence_reply"] == "7 7"
    assert [each["scores"]["accuracy"] for each in first] == [1, 0, 1]
    # What is shown of a row is the response that speaks for it.
    assert [sample.answer for sample in result.samples] == ["joy", "joy", "fear"]
