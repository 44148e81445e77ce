"""Readings of each row's answer: the label it names first, and its confidence by source.

All are columns with one entry a row: `lenient`, and of a source `<source>_confidence`, the
confidence of the answer, NaN where there is none, and, but for `stated`, `<source>_shares`, of each
label.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from emor3_jax.evaluation.confidence import Calibration, calibration, vote_shares
from emor3_jax.evaluation.distances import agreement, distribution_distances
from emor3_jax.evaluation.emotions import first_named, polarity_accuracy, wheel_distance
from emor3_jax.evaluation.metrics import mean_recall
from emor3_jax.rewards.stated import stated_confidence, stated_number

SOURCES = ("votes", "likelihood", "stated")
"""Sources of confidence: the share of the k responses, the labels' likelihood, the response."""

Columns = dict[str, np.ndarray]


def read_texts(responses: Mapping[int, str], rows: int, labels: Sequence[str]) -> Columns:
    """Returns what the texts of the answers say, of rows without one -1 and NaN.

    Args:
      responses: index of a row → the response that answers for it.
      rows: number of rows.
      labels: the label set.

    Returns:
      `lenient` int[rows], index of the label that is named first, -1 if none is; and
      `stated_confidence` float[rows].
    """
    lenient, stated = np.full(rows, -1), np.full(rows, np.nan)
    for row, response in responses.items():
        lenient[row] = first_named(response, labels)
        stated[row] = stated_confidence(response)
    return {"lenient": lenient, "stated_confidence": stated}


def read_shares(
    answers: np.ndarray, chosen: np.ndarray, likely: np.ndarray | None, k: int
) -> Columns:
    """Returns shares of the labels, and by them the confidence of each row's answer.

    Args:
      answers: int[B, G], the boxed labels, negative where there is none. With G = 1 there are no
        votes.
      chosen: int[B], index of the response that answers for its row.
      likely: float[B, G, K], share of each label in the likelihood of all; None if not asked. A
        row has their mean over its responses.
      k: K, number of labels.
    """
    found = {}
    if answers.shape[1] > 1:
        found["votes_shares"] = vote_shares(answers, k)
    if likely is not None:
        found["likelihood_shares"] = likely.mean(axis=1, dtype=np.float64)
    answer = answers[np.arange(len(chosen)), chosen]
    for name, shares in list(found.items()):
        sure = np.where(answer >= 0, shares[np.arange(len(answer)), answer], np.nan)
        found[name.replace("_shares", "_confidence")] = sure
    return found


def read_values(
    responses: Mapping[int, str],
    ids: Sequence[str],
    values: Mapping[str, Mapping[str, float]],
) -> Columns:
    """Returns the numbers of each row and those that its answer states, NaN where there is none.

    Args:
      responses: index of a row → the response that answers for it.
      ids: of the rows.
      values: row id → name, such as valence → number.

    Returns:
      `<name>_true` and `<name>_said` float[rows], of each name that occurs in `values`.
    """
    found = {}
    for name in value_names(values):
        true = [values.get(row_id, {}).get(name, np.nan) for row_id in ids]
        said = [
            stated_number(responses[i], name) if i in responses else np.nan for i in range(len(ids))
        ]
        found |= {f"{name}_true": np.array(true), f"{name}_said": np.array(said)}
    return found


def value_names(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the names of the numbers of rows, sorted."""
    return sorted({name for each in values.values() for name in each})


def value_scores(data: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns `<name>_<score>` of each kind of number, over the rows that have one.

    Args:
      data: columns of all rows, those of `read_values` among them.
    """
    scores = {}
    for name in [column.removesuffix("_true") for column in data if column.endswith("_true")]:
        there = ~np.isnan(data[f"{name}_true"])
        found = agreement(data[f"{name}_true"][there], data[f"{name}_said"][there])
        scores |= {f"{name}_{score}": value for score, value in found.items()}
    return scores


def confidences(columns: Mapping[str, np.ndarray], row: int) -> dict[str, float]:
    """Returns source → confidence of a row's answer, NaN where there is none."""
    names = {source: f"{source}_confidence" for source in SOURCES}
    return {s: float(columns[name][row]) for s, name in names.items() if name in columns}


def label_scores(data: Mapping[str, np.ndarray], labels: Sequence[str]) -> dict[str, float]:
    """Returns the scores of answers by what their labels mean.

    They are `uar`, `lenient_accuracy` and, where the labels allow it, `polarity_accuracy` and
    `wheel_distance`.

    Args:
      data: columns of all rows, `label`, `answer` and `lenient` among them.
      labels: the label set.
    """
    label, answer = data["label"], data["answer"]
    scores = {
        "uar": mean_recall(label, answer, len(labels)),
        "lenient_accuracy": float(np.mean(data["lenient"] == label)),
        "polarity_accuracy": polarity_accuracy(label, answer, labels),
        "wheel_distance": wheel_distance(label, answer, labels),
    }
    return {name: value for name, value in scores.items() if value is not None}


def confidence_scores(
    data: Mapping[str, np.ndarray], graded: bool
) -> tuple[dict[str, float], dict[str, Calibration]]:
    """Returns `<source>_<score>` of each source of confidence, and source → its curves.

    Args:
      data: columns of all rows, `accuracy` and `grades` among them.
      graded: `grades` are shares of raters, from which the shares of each source are so far.
    """
    scores, curves = {}, {}
    for source in SOURCES:
        sure = data.get(f"{source}_confidence")
        asked = f"{source}_shares" in data
        if sure is None or (np.isnan(sure).all() and not asked):
            continue
        found, curve = calibration(sure, data["accuracy"].astype(bool))
        curves |= {} if curve is None else {source: curve}
        if graded and asked:
            found |= distribution_distances(data["grades"], data[f"{source}_shares"])
        scores |= {f"{source}_{name}": value for name, value in found.items()}
    return scores, curves
