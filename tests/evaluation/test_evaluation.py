"""The loop of an evaluation: padding rows that must not count, majorities, predictions."""

from types import SimpleNamespace

import numpy as np
import pytest

from emor3_jax.data.batch import Prompts
from emor3_jax.evaluation.evaluation import Extras, evaluate
from emor3_jax.rewards import QUESTIONS, Reward
from emor3_jax.types import Batch, Experience, Replies, Samples, Scores


class _Rollout:
    """Answers by a table: row i of all rows gets entry i of it, one answer or one of each vote."""

    def __init__(self, answers: list, inferred: list, reflects: bool, group_size: int = 1) -> None:
        tokenizer = SimpleNamespace(decode=lambda tokens, **_: self.says)
        self.scorer = SimpleNamespace(
            tokenizer=tokenizer,
            reply_tokenizer=tokenizer,
            labels=("joy", "fear"),
            reward=Reward(),
        )
        questions = [SimpleNamespace(question=question) for question in QUESTIONS.values()]
        self.reflection = SimpleNamespace(questions=questions) if reflects else None
        self.group_size, self.graded = group_size, None
        self._answers, self._inferred, self._row = answers, inferred, 0
        self.keys: list[object] = []
        self.says = "7 7"

    def __call__(self, params: dict, batch: Batch, key: object, judge: object = None) -> Experience:
        self.keys.append(key)
        shape = len(batch.answers), self.group_size
        tokens = np.full((*shape, 3), 7)
        samples = Samples(tokens, tokens * 0.0, np.full(shape, 2), np.ones(shape, bool))
        found = np.ones(shape, bool)
        replies = Replies(
            dict.fromkeys(QUESTIONS, samples),
            dict.fromkeys(QUESTIONS, found),
            dict.fromkeys(QUESTIONS, samples.lengths),
        )
        rows = slice(self._row, self._row + len(batch.answers))
        self._row = rows.stop
        answer, inferred = (
            np.array(table[rows]).reshape(len(batch.answers), -1)
            for table in (self._answers, self._inferred)
        )
        accuracy = (answer == batch.answers[:, None]).astype(np.float32)
        one = np.ones_like(accuracy)
        graded = accuracy if self.graded is None else self.graded
        reflections = dict.fromkeys(QUESTIONS, one)
        scores = Scores(accuracy, one, graded, reflections, answer, inferred, {})
        asked = None if self.reflection is None else replies
        return Experience(batch, samples, asked, scores, scores.overall)


def _batch(answers: list[int], weight: list[float]) -> Prompts:
    fields = dict.fromkeys(Batch._fields)
    fields |= {"answers": np.array(answers), "weight": np.array(weight, np.float32)}
    fields["grades"] = np.eye(2, dtype=np.float32)[answers]
    ids = tuple(f"row {i}" if w else "" for i, w in enumerate(weight))
    return Prompts(Batch(**fields), ids)


@pytest.mark.parametrize("reflects", [True, False])
def test_padding_rows_do_not_count(reflects: bool) -> None:
    batches = [_batch([0, 1], [1, 1]), _batch([1, 0], [1, 0])]
    rollout = _Rollout([0, 0, 1, 1], [0, 1, 1, 0], reflects)
    result = evaluate(rollout, {}, batches, 5, put=lambda batch: batch, keep=2)
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
    assert result.samples[0].replies["coherence"] == ("7 7" if reflects else "")
    assert len(set(map(str, rollout.keys))) == 2


def test_accuracy_stays_exact_beside_the_graded_one() -> None:
    rollout = _Rollout([0, 1], [0, 1], False)
    rollout.graded = np.array([[1.0], [0.5]], np.float32)
    batches = [_batch([0, 0], [1, 1])]
    options = {"put": lambda batch: batch, "graded": True}
    metrics = evaluate(rollout, {}, batches, 5, **options).metrics
    assert metrics["accuracy"] == 0.5
    assert metrics["graded_accuracy"] == 0.75


def test_rows_are_answered_by_majority_and_written_with_every_response() -> None:
    # True labels 0, 1, 1; the last row is padding.
    batches = [_batch([0, 1], [1, 1]), _batch([1, 0], [1, 0])]
    answers = [[0, 1, 0], [0, 1, 0], [-1, -1, 1], [0, 0, 0]]
    inferred = [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    written: list[dict] = []
    rollout = _Rollout(answers, inferred, True, group_size=3)
    options = {"put": lambda batch: batch, "record": written.append}
    result = evaluate(rollout, {}, batches, 5, **options, keep=9)
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


def test_the_first_label_that_is_named_counts_beside_the_boxed_one() -> None:
    rollout = _Rollout([0, -1, -1], [0, 0, 0], False)
    rollout.says = "some fear, little joy"
    written: list[dict] = []
    batches = [_batch([0, 1, 1], [1, 1, 1])]
    options = {"put": lambda batch: batch, "record": written.append}
    metrics = evaluate(rollout, {}, batches, 5, **options).metrics
    # Boxed: joy and twice nothing. Named first: fear, also where the box says joy.
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["lenient_accuracy"] == pytest.approx(2 / 3)
    assert metrics["uar"] == pytest.approx((1 + 0) / 2)
    assert metrics["polarity_accuracy"] == pytest.approx(1 / 3)
    assert "wheel_distance" not in metrics
    assert [row["lenient"] for row in written] == ["fear"] * 3
    assert [row["confidence"] for row in written] == [{}] * 3


def test_votes_are_a_confidence() -> None:
    # Shares 3/4 (right), 2/4 (wrong), and a row that nobody answers.
    answers = [[0, 0, 0, 1], [0, 0, -1, -1], [-1, -1, -1, -1]]
    rollout = _Rollout(answers, answers, False, group_size=4)
    written: list[dict] = []
    options = {"put": lambda batch: batch, "record": written.append, "graded": True}
    result = evaluate(rollout, {}, [_batch([0, 1, 1], [1, 1, 1])], 5, **options)
    metrics = result.metrics
    assert metrics["votes_covered"] == pytest.approx(2 / 3)
    assert metrics["votes_ece"] == pytest.approx((0.25 + 0.5) / 2)
    assert metrics["votes_brier"] == pytest.approx((0.25**2 + 0.5**2) / 2)
    assert metrics["votes_auroc"] == 1.0
    assert result.calibrations["votes"].coverage == [(1 / 3, 1.0), (2 / 3, 0.5)]
    # All raters on one side: 3/4 and 0 in common; the third row has no votes.
    assert metrics["votes_intersection"] == pytest.approx((0.75 + 0) / 2)
    assert metrics["votes_chebyshev"] == pytest.approx((0.25 + 1) / 2)
    assert [row["confidence"] for row in written] == [{"votes": 0.75}, {"votes": 0.5}, {}]
    assert not any(name.startswith(("likelihood_", "stated_")) for name in metrics)


def test_likelihoods_and_stated_numbers_are_confidences_too() -> None:
    rollout = _Rollout([0, 1], [0, 1], False)
    rollout.says = "<confidence> 80 % </confidence>"
    likely = np.array([[[0.9, 0.1]], [[0.4, 0.6]]], np.float32)
    extras = Extras(likelihood=lambda params, batch, samples: likely)
    options = {"put": lambda batch: batch, "extras": extras, "graded": True}
    batch = _batch([0, 0], [1, 1])
    batch = batch._replace(batch=batch.batch._replace(grades=np.array([[1, 0.25], [1, 1]])))
    metrics = evaluate(rollout, {}, [batch], 5, **options).metrics
    assert metrics["likelihood_brier"] == pytest.approx((0.1**2 + 0.6**2) / 2)
    assert metrics["stated_brier"] == pytest.approx((0.2**2 + 0.8**2) / 2)
    # Raters: 0.8, 0.2 and 0.5, 0.5.
    assert metrics["likelihood_chebyshev"] == pytest.approx(0.1)
    assert "stated_chebyshev" not in metrics


def test_stated_numbers_are_compared_with_those_of_the_rows() -> None:
    rollout = _Rollout([0, 1, 1], [0, 1, 1], False)
    rollout.says = "<valence>4</valence> <arousal>very</arousal>"
    values = {"row 0": {"valence": 5.0, "arousal": 2.0}, "row 1": {"valence": 2.0}}
    options = {"put": lambda batch: batch, "extras": Extras(values=values)}
    metrics = evaluate(rollout, {}, [_batch([0, 0, 0], [1, 1, 1])], 5, **options).metrics
    assert metrics["valence_mae"] == pytest.approx((1 + 2) / 2)
    assert metrics["valence_covered"] == 1.0 and metrics["arousal_covered"] == 0.0
    assert "arousal_mae" not in metrics and "valence_plcc" not in metrics
