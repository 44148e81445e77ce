"""The result of an evaluation: means, and a few responses for people to read."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """One held-out response with everything that was said and scored about it, for people to read.

    Attributes:
      id: of the row.
      label: the true label.
      answer: the boxed label, "" where there is none.
      response: the text.
      coherence_reply, consistency_reply: the texts.
      scores: name → value.
    """

    id: str
    label: str
    answer: str
    response: str
    coherence_reply: str
    consistency_reply: str
    scores: dict[str, float]


class Evaluation(NamedTuple):
    """The result on one data set.

    Attributes:
      metrics: name → mean: accuracy, macro_f1, format, coherence, consistency, decoupling,
        overall, response_length, and rows, the number of responses.
      samples: the first few responses.
    """

    metrics: dict[str, float]
    samples: list[Sample]


def to_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Returns evaluations as plain data that fits JSON, for a checkpoint."""
    return {
        name: {"metrics": e.metrics, "samples": [s._asdict() for s in e.samples]}
        for name, e in evaluations.items()
    }


def from_json(data: Mapping[str, Any]) -> dict[str, Evaluation]:
    """Returns what `to_json` was given."""
    return {
        name: Evaluation(dict(e["metrics"]), [Sample(**s) for s in e["samples"]])
        for name, e in data.items()
    }
