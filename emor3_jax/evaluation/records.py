"""Records of an evaluation: its result, predictions of each row, responses for people to read."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from emor3_jax.evaluation.confidence import Bin, Calibration
from emor3_jax.evaluation.metrics import class_scores
from emor3_jax.parallel import hosts
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.types import Experience, ReplyProbs, Samples


class Sample(NamedTuple):
    """One response with its reflections and scores, for people to read.

    Attributes:
      id: of the row.
      label: the true label.
      answer: the boxed label, "" where there is none.
      response: the text.
      replies: name of a question → the text of the reply.
      scores: name → value.
    """

    id: str
    label: str
    answer: str
    response: str
    replies: dict[str, str]
    scores: dict[str, float]


class Evaluation(NamedTuple):
    """The result on one data set, or the means over a group of them.

    Attributes:
      metrics: name → value: accuracy and its 95 % interval accuracy_{low,high}, macro_f1,
        weighted_f1, uar, format, coherence, consistency, decoupling, overall, response_length,
        rows, the number of rows, and what docs/evaluation.md lists.
      samples: the first few responses.
      labels: the label set, K of them.
      confusion: int[K][K + 1], rows by true label and by answer; the last column is no label.
      calibrations: source of confidence → its curves.
      members: of a group, the names of its data sets.
    """

    metrics: dict[str, float]
    samples: list[Sample]
    labels: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] = ()
    calibrations: Mapping[str, Calibration] = MappingProxyType({})
    members: Sequence[str] = ()


def with_groups(
    evaluations: Mapping[str, Evaluation], groups: Mapping[str, Sequence[str]]
) -> dict[str, Evaluation]:
    """Returns evaluations with the means over each group of them, every set weighing the same.

    A group has the metrics that all its sets have, `rows` being their sum; it has no interval of
    the accuracy, which a mean of intervals would not be.

    Args:
      evaluations: data set → evaluation.
      groups: name → data sets. A group with a set that was not evaluated is left out.
    """
    found = dict(evaluations)
    for group, names in groups.items():
        if not all(name in evaluations for name in names):
            continue
        each = [evaluations[name].metrics for name in names]
        common = [name for name in each[0] if all(name in metrics for metrics in each)]
        means = {
            name: sum(metrics[name] for metrics in each) / (1 if name == "rows" else len(each))
            for name in common
            if not name.endswith(("_low", "_high"))
        }
        found[group] = Evaluation(means, [], members=tuple(names))
    return found


def question_names(evaluations: Mapping[str, Evaluation]) -> tuple[str, ...]:
    """Returns the names of the questions: of the package, then others that samples reply to.

    Args:
      evaluations: data set → evaluation, of this process or read from a file.
    """
    samples = (sample for each in evaluations.values() for sample in each.samples)
    return tuple(dict.fromkeys((*QUESTIONS, *(name for s in samples for name in s.replies))))


def prediction(
    responses: Sequence[Sample], chosen: int, lenient: str, confidence: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the JSON of one row: its answer, and each response with its scores.

    Args:
      responses: to the row, k of them.
      chosen: index of the one that answers for the row.
      lenient: the label that it names first, "" where it names none.
      confidence: source → confidence of the answer; NaN, where there is none, is left out.
    """
    of_row = responses[chosen]
    return {
        "id": of_row.id,
        "label": of_row.label,
        "answer": of_row.answer,
        "right": of_row.answer == of_row.label,
        "lenient": lenient,
        "confidence": {name: x for name, x in confidence.items() if not math.isnan(x)},
        "responses": [
            {
                "answer": each.answer,
                "response": each.response,
                **{f"{name}_reply": text for name, text in each.replies.items()},
                "scores": each.scores,
            }
            for each in responses
        ],
    }


def read_prediction(row: Mapping[str, Any]) -> Sample:
    """Returns the response that answers for a row, from the JSON that `prediction` made.

    Raises:
      KeyError, TypeError, AttributeError: for what is no such JSON.
    """
    said = [each for each in row["responses"] if each["answer"] == row["answer"]]
    # Of a majority that is right for other reasons than any single response.
    chosen = (said or row["responses"])[0]
    replies = {
        name.removesuffix("_reply"): text
        for name, text in chosen.items()
        if name.endswith("_reply")
    }
    fields = row["id"], row["label"], row["answer"], chosen["response"]
    if not all(isinstance(text, str) for text in (*fields, *replies.values())):
        raise TypeError("a field is no text")
    return Sample(*fields, replies, dict(chosen["scores"]))


def read_sample(
    scorer: Scorer, row_id: str, label: int, at: tuple[int, int], experience: Experience
) -> Sample:
    """Decodes one response and its reflections.

    Args:
      scorer: of the label set.
      row_id: of the prompt.
      label: index of its label.
      at: prompt and response.
      experience: samples, replies and scores as NumPy arrays.
    """

    def text(s: Samples, tokenizer: PreTrainedTokenizerBase) -> str:
        return tokenizer.decode(s.tokens[at][: s.lengths[at]], skip_special_tokens=True)

    replies, scores = experience.replies, experience.scores
    answer, said = int(scores.answer[at]), dict.fromkeys(QUESTIONS, "")
    if isinstance(replies, ReplyProbs):
        for name, question in QUESTIONS.items():
            probs = replies.probs[name][at]
            # Of yes and no, show yes; of labels, the most likely.
            best = 0 if question.meanings(()) else int(probs.argmax())
            said[name] = f"{question.meanings(scorer.labels)[best]} ({probs[best]:.2f})"
    elif replies is not None:
        own = scorer.reply_tokenizer
        said = {name: text(reply, own) for name, reply in replies.samples.items()}
    return Sample(
        id=row_id,
        label=scorer.labels[int(label)],
        answer=scorer.labels[answer] if answer >= 0 else "",
        response=text(experience.samples, scorer.tokenizer),
        replies=said,
        scores={name: float(value[at]) for name, value in scores.named().items()},
    )


@contextmanager
def prediction_file(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Opens a file of predictions, one JSON object a line; what was in it is replaced.

    It is there once all rows are: an evaluation that is stopped or fails changes nothing, so that
    no one takes a part of the rows for a whole evaluation. Of several processes only the first
    writes.

    Args:
      path: the file, its folder made if needed.

    Yields:
      A function that writes one row, or None to who does not write.
    """
    if not hosts.is_first():
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def to_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Returns evaluations as plain data that fits JSON, for a checkpoint."""
    return {
        name: {
            "metrics": e.metrics,
            "samples": [s._asdict() for s in e.samples],
            "labels": list(e.labels),
            "confusion": [list(map(int, row)) for row in e.confusion],
            "classes": [s._asdict() for s in class_scores(e.labels, e.confusion)],
            "calibrations": {
                source: {
                    "bins": [x._asdict() for x in curves.bins],
                    "coverage": [list(point) for point in curves.coverage],
                }
                for source, curves in e.calibrations.items()
            },
            "members": list(e.members),
        }
        for name, e in evaluations.items()
    }


def from_json(data: Mapping[str, Any]) -> dict[str, Evaluation]:
    """Returns what `to_json` was given, also of an older checkpoint."""
    return {
        name: Evaluation(
            dict(e["metrics"]),
            [_read_sample(s) for s in e["samples"]],
            tuple(e.get("labels", ())),
            tuple(map(tuple, e.get("confusion", ()))),
            {
                source: Calibration(
                    [Bin(**x) for x in curves["bins"]], list(map(tuple, curves["coverage"]))
                )
                for source, curves in e.get("calibrations", {}).items()
            },
            tuple(e.get("members", ())),
        )
        for name, e in data.items()
    }


def _read_sample(data: Mapping[str, Any]) -> Sample:
    """Returns a sample from its JSON; older checkpoints hold each reply as `<question>_reply`."""
    older = {f"{name}_reply": name for name in QUESTIONS}
    replies = {older[key]: data[key] for key in older if key in data}
    fields = {key: value for key, value in data.items() if key not in older}
    return Sample(**({"replies": replies} | fields))
