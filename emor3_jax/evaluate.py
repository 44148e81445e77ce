"""Evaluation of a policy on held-out images: responses, both reflections, all scores.

As a program, it evaluates a policy folder on the sets of a config:

    python -m emor3_jax.evaluate --config=configs/cpu_demo.py --config.policy.path=FOLDER \\
        --workdir=DIR [--config.evaluate.checkpoint=RUN] [--config.evaluate.votes=8]

and writes `DIR/evaluation.json`, `evaluation.md`, `report.html`, and every response to
`DIR/predictions/<data set>.jsonl`. During training the same code runs before, between and after.

With `evaluate.votes` over 1, a row is answered so many times and the most frequent label is its
answer (self-consistency, Wang et al., 2023). Accuracy, F1 and confusion are those of that answer;
format, reflection, decoupling and length are means over all responses.

Deviations, numbered:
 1. The release validates without reflection; here both questions are asked, so that coherence,
    consistency and decoupling are measured on held-out images.
 2. Beyond the method: several responses to a row and their majority, off by default.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import cli, prepare
from emor3_jax.checks import validate
from emor3_jax.config import ConfigError
from emor3_jax.data.batch import Batch
from emor3_jax.episode import NOTHING_TO_JUDGE, Actor, Judgement, Replies, Scores
from emor3_jax.export import read_checkpoint_params
from emor3_jax.io import report
from emor3_jax.io.checkpoints import Checkpoints
from emor3_jax.io.console import Console
from emor3_jax.io.evaluation import (
    Evaluation,
    Sample,
    class_scores,
    confusion_matrix,
    prediction_file,
    wilson,
)
from emor3_jax.models import Policy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import check_batch, make_mesh
from emor3_jax.rollout.engine import ALL_AT_ONCE, Plan
from emor3_jax.rollout.generate import Samples, SamplingRule


def macro_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the mean of the F1 of each label that occurs in `labels`, in [0, 1].

    Args:
      labels: int[n], the true labels in [0, k).
      answers: int[n], the answers; one outside [0, k) is wrong and counts for no label.
      k: number of labels.
    """
    f1, rows = _f1(labels, answers, k)
    return float(np.mean(f1[rows > 0])) if rows.any() else 0.0


def weighted_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the same, each label weighed by how many rows have it."""
    f1, rows = _f1(labels, answers, k)
    return float(np.average(f1, weights=rows)) if rows.any() else 0.0


def _f1(labels: np.ndarray, answers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns float[k], the F1 of each label, and int[k], its rows."""
    counts = confusion_matrix(labels, answers, k)
    scores = class_scores([""] * k, counts)
    return np.array([s.f1 for s in scores]), np.array([s.rows for s in scores])


def vote(answers: np.ndarray) -> np.ndarray:
    """Returns int[n]: which of its k responses speaks for a row.

    It is the first with the label that most of them box; of labels with as many votes, the one that
    was boxed first. A row where none boxes a label is spoken for by its first response.

    Args:
      answers: int[n, k], index of the boxed label, negative where there is none.
    """
    votes = (answers[:, :, None] == answers[:, None, :]).sum(-1)
    return np.argmax(np.where(answers >= 0, votes, 0), axis=1)


def decoupling(answers: np.ndarray, inferred: np.ndarray) -> float:
    """Returns the share of responses whose re-inferred emotion is not their own answer.

    Counted over the responses with both a boxed label and a text to judge; 0 if there is none.

    Args:
      answers: int[n], index of the boxed label, negative where there is none.
      inferred: int[n], index of the label inferred from s1..s2, negative where the reply was no
        label, `NOTHING_TO_JUDGE` where there was no text.
    """
    both = (answers >= 0) & (inferred != NOTHING_TO_JUDGE)
    return float(np.mean(answers[both] != inferred[both])) if both.any() else 0.0


def evaluate(
    actor: Actor,
    params: dict,
    batches: Iterable[tuple[Batch, Sequence[str]]],
    seed: int,
    *,
    rule: SamplingRule,
    plan: Plan = ALL_AT_ONCE,
    put: Any,
    keep: int = 0,
    graded: bool = False,
    votes: int = 1,
    record: Callable[[Mapping[str, Any]], None] | None = None,
) -> Evaluation:
    """Answers every row and returns means.

    Args:
      actor: for the label set of the data.
      params: of the policy.
      batches: this host's rows of each batch, with the ids of all hosts' rows; rows of weight 0
        are padding.
      seed: of the sampling noise; the same seed gives the same responses.
      rule: how responses are sampled.
      plan: how many prompts of a batch are in flight at once.
      put: places this host's rows on the devices, as a batch of all hosts.
      keep: how many responses to return as text.
      graded: report the graded accuracy beside the exact one.
      votes: k, responses to each row.
      record: takes each row with its responses, as it is written to a file of predictions.
    """
    columns: dict[str, list[np.ndarray]] = {}
    samples: list[Sample] = []
    # Training folds its step into the same seed: one more number keeps the two apart.
    noise = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    for index, (batch, ids) in enumerate(batches):
        batch = put(batch)
        responses, replies = actor.run(
            params, batch, jax.random.fold_in(noise, index), responses=votes, rule=rule, plan=plan
        )
        scores = actor.score(batch, responses, replies)
        # Of all hosts, on each of them.
        host = hosts.fetch((scores, responses, replies, batch.answers, batch.weight))
        scores, responses, replies, answers, weight = host
        weight = weight > 0
        chosen = vote(scores.answer)
        first = np.arange(len(chosen)), chosen
        rows = {name: value[weight] for name, value in scores.named().items()}
        rows["answers"], rows["inferred"] = scores.answer[weight], scores.inferred[weight]
        rows["answer"], rows["label"] = scores.answer[first][weight], answers[weight]
        # Exact also where the reward is graded, so that data sets can be compared.
        rows["graded_accuracy"] = scores.accuracy[first][weight]
        rows["accuracy"] = rows["answer"] == rows["label"]
        rows["response_length"] = responses.lengths[weight]
        rows["truncated"] = ~responses.ended[weight]
        for name, value in rows.items():
            columns.setdefault(name, []).append(value)
        said = responses, replies, scores
        for i in np.flatnonzero(weight)[: max(keep - len(samples), 0)]:
            samples.append(read_sample(actor, ids[i], answers[i], i, chosen[i], *said))
        for i in np.flatnonzero(weight) if record else ():
            each = [read_sample(actor, ids[i], answers[i], i, g, *said) for g in range(votes)]
            record(prediction(each, int(chosen[i])))
    data = {name: np.concatenate(value) for name, value in columns.items()}
    terms = [term.name for term in actor.terms]
    metrics = {
        name: float(np.mean(data[name]))
        for name in ("accuracy", "format", "overall", "response_length", "truncated", *terms)
    }
    rows = len(data["label"])
    low, high = wilson(int(data["accuracy"].sum()), rows)
    metrics |= {"accuracy_low": low, "accuracy_high": high}
    if graded:
        metrics["graded_accuracy"] = float(np.mean(data["graded_accuracy"]))
    if votes > 1:
        right = data["answers"] == data["label"][:, None]
        metrics["response_accuracy"] = float(np.mean(right))
    k = len(actor.labels)
    metrics["macro_f1"] = macro_f1(data["label"], data["answer"], k)
    metrics["weighted_f1"] = weighted_f1(data["label"], data["answer"], k)
    metrics["rows"] = float(rows)
    if actor.rule is not None:
        metrics["coherence"] = float(np.mean(data["coherence"]))
        metrics["consistency"] = float(np.mean(data["consistency"]))
        metrics["decoupling"] = decoupling(data["answers"], data["inferred"])
    confusion = confusion_matrix(data["label"], data["answer"], k).tolist()
    return Evaluation(metrics, samples, tuple(actor.labels), tuple(map(tuple, confusion)))


def prediction(responses: Sequence[Sample], chosen: int) -> dict[str, Any]:
    """Returns what is written of one row: its answer, and each response with its scores.

    Args:
      responses: to the row, k of them.
      chosen: which of them speaks for the row.
    """
    of_row = responses[chosen]
    return {
        "id": of_row.id,
        "label": of_row.label,
        "answer": of_row.answer,
        "right": of_row.answer == of_row.label,
        "responses": [
            {name: value for name, value in each._asdict().items() if name not in ("id", "label")}
            for each in responses
        ],
    }


def read_sample(
    actor: Actor,
    row_id: str,
    label: int,
    i: int,
    g: int,
    responses: Samples,
    replies: Replies | Judgement | None,
    scores: Scores,
) -> Sample:
    """Decodes response `g` to prompt `i` and what was said of it; all arrays NumPy's."""

    def text(s: Samples) -> str:
        return actor.tokenizer.decode(s.tokens[i, g, : s.lengths[i, g]], skip_special_tokens=True)

    answer = int(scores.answer[i, g])
    coherence = consistency = ""
    if isinstance(replies, Judgement):
        likely = replies.labels[i, g]
        best = int(likely.argmax())
        coherence = f"{actor.labels[best]} ({likely[best]:.2f})"
        consistency = f"yes ({replies.yes[i, g]:.2f})"
    elif replies is not None:
        coherence, consistency = text(replies.coherence), text(replies.consistency)
    return Sample(
        id=row_id,
        label=actor.labels[int(label)],
        answer=actor.labels[answer] if answer >= 0 else "",
        response=text(responses),
        coherence_reply=coherence,
        consistency_reply=consistency,
        scores={name: float(value[i, g]) for name, value in scores.named().items()},
    )


def load(config: ConfigDict, say: Callable[[str], None], mesh: Mesh) -> Policy:
    """Loads `policy.path`, or its form in `evaluate.checkpoint`.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    place = config.evaluate.checkpoint
    if not place:
        return prepare.load_policy(config, say, mesh)
    folder, step = Path(place), None
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    checkpoints = Checkpoints(folder, keep=None) if (folder / "checkpoints").is_dir() else None
    known = checkpoints.steps() if checkpoints else []
    if not known or step not in (None, *known):
        rule = (
            "must be the folder of a run, or one of its checkpoints; "
            f"{folder / 'checkpoints'} has {', '.join(map(str, known)) or 'none'}"
        )
        raise ConfigError("evaluate.checkpoint", place, rule)
    step = known[-1] if step is None else step
    say(f"loading the policy of step {step} of {folder}")
    base = prepare.read_policy(config, say)
    params = read_checkpoint_params(
        config, prepare.find_policy(config, say), checkpoints, step, mesh
    )
    checkpoints.close()
    attention = prepare.attention_backend(config, mesh.devices.flat[0].platform)
    return Policy(dataclasses.replace(base.config, attention=attention), params, base.processor)


def main(config: ConfigDict, workdir: Path) -> dict[str, Evaluation]:
    """Evaluates a policy on `config.evaluate.sets`; see the module's docstring."""
    validate(config)
    say = Console("evaluate")
    prepare.start_jax(config.log.compile_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    jax.set_mesh(mesh)
    check_batch(mesh, "evaluate.prompts", config.evaluate.prompts)
    policy = load(config, say, mesh)
    data = prepare.open_data(config, policy, mesh)
    results = {}
    for name, batches in data.evaluate.items():
        say(f"evaluating on {name}")
        with prediction_file(workdir / "predictions" / f"{name}.jsonl") as record:
            results[name] = evaluate(
                prepare.make_actor(config, policy, data.labels[name]),
                policy.params,
                batches,
                config.seed,
                rule=prepare.evaluation_rule(config, policy),
                plan=prepare.evaluation_plan(config),
                put=lambda batch: prepare.place_batch(batch, mesh, config),
                keep=report.SAMPLES,
                graded=config.evaluate.sets[name].graded,
                votes=config.evaluate.votes,
                record=record,
            )
    if hosts.is_first():
        images = {name: data.image(name) for name in results}
        title = f"Evaluation of {config.evaluate.checkpoint or config.policy.path}"
        report.write_report(workdir, title, {}, results, images)
    for line in report.before_after_table({}, results).splitlines():
        say(line)
    return results


if __name__ == "__main__":
    cli.run(main)
