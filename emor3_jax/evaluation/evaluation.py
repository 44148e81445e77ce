"""Evaluation of a policy on held-out images: responses, reflections, all scores.

With several responses to a row, the most frequent label is its answer (maj@k: self-consistency,
Wang et al., 2023). Accuracy, F1 and confusion are those of that answer; format, reflection,
decoupling and length are means over all responses.

A row's answer has a confidence by each source that there is: `votes`, the share of its k responses
that box it; `likelihood`, its share in the likelihood of all labels behind the responses' own
reasoning; `stated`, the number that the response itself gives. docs/evaluation.md has all metrics.

Deviations, numbered:
 1. The release validates without reflection; here both questions are asked, so that coherence,
    consistency and decoupling are measured on held-out images.
 2. Beyond the method: several responses to a row and their majority, off by default.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from emor3_jax.data.batch import Prompts
from emor3_jax.evaluation.gallery import Gallery
from emor3_jax.evaluation.metrics import (
    confusion_matrix,
    decoupling,
    macro_f1,
    majority,
    weighted_f1,
    wilson,
)
from emor3_jax.evaluation.readings import (
    confidence_scores,
    confidences,
    label_scores,
    read_shares,
    read_texts,
    read_values,
    value_scores,
)
from emor3_jax.evaluation.records import Evaluation, Sample, prediction, read_sample
from emor3_jax.parallel import hosts
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rollout.judge import Judge
from emor3_jax.rollout.rollout import Rollout
from emor3_jax.types import Batch, Experience, Samples


class Extras(NamedTuple):
    """Readings beyond the method, each off by default.

    Attributes:
      likelihood: (params, batch, samples) → float32[B, G, K], the share of each label in the
        likelihood of all behind a response's own reasoning (`rollout.label_likelihood`).
      values: row id → name, such as valence → the true value of a number that the prompt asks for.
      judge: who is asked about the responses; None asks the policy.
    """

    likelihood: Callable[[dict, Batch, Samples], jax.Array] | None = None
    values: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    judge: Judge | None = None


def evaluate(
    rollout: Rollout,
    params: dict,
    batches: Iterable[Prompts],
    seed: int,
    *,
    put: Callable[[Batch], Batch],
    keep: int = 0,
    graded: bool = False,
    record: Callable[[Mapping[str, Any]], None] | None = None,
    extras: Extras | None = None,
) -> Evaluation:
    """Answers every row and returns means.

    Args:
      rollout: for the label set of the data; its group size is k of maj@k.
      params: of the policy.
      batches: this host's rows of each batch, with the ids of all hosts' rows; rows of weight 0
        are padding.
      seed: of the sampling noise; the same seed gives the same responses.
      put: puts this host's rows on the devices, as a batch of all hosts.
      keep: number of responses to return as text, and further ones of rare kinds (`Gallery`).
      graded: report the accuracy by soft labels beside the exact one, and how far the shares of
        votes and likelihood are from those of raters.
      record: takes each row with its responses, as it is written to a file of predictions.
      extras: readings beyond the method.
    """
    columns: dict[str, list[np.ndarray]] = {}
    gallery = Gallery(keep)
    labels, responses = rollout.scorer.labels, range(rollout.group_size)
    likelihood, values, judge = extras or Extras()
    # Training folds its step into the same seed: one more number keeps the two apart.
    noise = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    for index, (batch, ids) in enumerate(batches):
        batch = put(batch)
        found = rollout(params, batch, jax.random.fold_in(noise, index), judge=judge)
        likely = likelihood(params, batch, found.samples) if likelihood else None
        found = found._replace(batch=None, rewards=None)
        # Of all hosts, on each of them.
        found, likely, answers, grades, weight = hosts.fetch(
            (found, likely, batch.answers, batch.grades, batch.weight)
        )
        rows = np.flatnonzero(weight > 0)
        chosen = majority(found.scores.answer)
        read = partial(_read, rollout.scorer, ids, answers, found)
        shown = {i: read(i, chosen[i]) for i in rows}
        new = _columns(found, answers, chosen) | {"grades": grades}
        texts = {i: sample.response for i, sample in shown.items()}
        new |= read_texts(texts, len(weight), labels) | read_values(texts, ids, values)
        new |= read_shares(found.scores.answer, chosen, likely, len(labels))
        for name, value in new.items():
            columns.setdefault(name, []).append(value[rows])
        for i in rows:
            gallery.add(shown[i])
        for i in rows if record else ():
            each = [shown[i] if g == chosen[i] else read(i, g) for g in responses]
            named = (*labels, "")[new["lenient"][i]]
            record(prediction(each, int(chosen[i]), named, confidences(new, i)))
    data = {name: np.concatenate(value) for name, value in columns.items()}
    scores, curves = confidence_scores(data, graded)
    metrics = _means(data, rollout, graded) | label_scores(data, labels) | scores
    metrics |= value_scores(data)
    confusion = confusion_matrix(data["label"], data["answer"], len(labels)).tolist()
    return Evaluation(metrics, gallery.samples, labels, tuple(map(tuple, confusion)), curves)


def _read(
    scorer: Scorer, ids: Sequence[str], answers: np.ndarray, found: Experience, i: int, g: int
) -> Sample:
    """Returns response g to row i of a batch."""
    return read_sample(scorer, ids[i], answers[i], (i, g), found)


def _columns(found: Experience, answers: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch that metrics are made of, one entry a row."""
    scores, first = found.scores, (np.arange(len(chosen)), chosen)
    columns = dict(scores.named())
    columns["answers"], columns["inferred"] = scores.answer, scores.inferred
    columns["answer"], columns["label"] = scores.answer[first], answers
    # Exact also where the reward takes soft labels, so that data sets can be compared.
    columns["graded_accuracy"] = scores.accuracy[first]
    columns["accuracy"] = columns["answer"] == columns["label"]
    columns["response_length"] = found.samples.lengths
    columns["truncated"] = ~found.samples.ended
    return columns


def _means(data: dict[str, np.ndarray], rollout: Rollout, graded: bool) -> dict[str, float]:
    """Returns the metrics of all rows."""
    terms = [term.name for term in rollout.scorer.reward.terms]
    metrics = {
        name: float(np.mean(data[name]))
        for name in ("accuracy", "format", "overall", "response_length", "truncated", *terms)
    }
    rows, k = len(data["label"]), len(rollout.scorer.labels)
    low, high = wilson(int(data["accuracy"].sum()), rows)
    metrics |= {"accuracy_low": low, "accuracy_high": high}
    if graded:
        metrics["graded_accuracy"] = float(np.mean(data["graded_accuracy"]))
    if rollout.group_size > 1:
        right = data["answers"] == data["label"][:, None]
        metrics["response_accuracy"] = float(np.mean(right))
    metrics["macro_f1"] = macro_f1(data["label"], data["answer"], k)
    metrics["weighted_f1"] = weighted_f1(data["label"], data["answer"], k)
    metrics["rows"] = float(rows)
    if rollout.reflection is not None:
        for prompted in rollout.reflection.questions:
            name = prompted.question.name
            metrics[name] = float(np.mean(data[name]))
        metrics["decoupling"] = decoupling(data["answers"], data["inferred"])
    return metrics
