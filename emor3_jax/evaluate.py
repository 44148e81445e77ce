"""Evaluation of a policy on held-out images: one response each, both reflections, all scores.

As a program, it evaluates a policy folder on the sets of a config:

    python -m emor3_jax.evaluate --config=configs/cpu_demo.py --config.policy.path=FOLDER \\
        --workdir=DIR

and writes `DIR/evaluation.json` and `DIR/report.html`. During training the same code runs before,
between and after.

Deviations, numbered:
 1. The release validates without reflection; here both questions are asked, so that coherence,
    consistency and decoupling are measured on held-out images.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from emor3_jax import cli, prepare
from emor3_jax.config import validate
from emor3_jax.data.batch import Batch
from emor3_jax.episode import NOTHING_TO_JUDGE, Actor, Judgement
from emor3_jax.io import report
from emor3_jax.io.console import Console
from emor3_jax.io.evaluation import Evaluation, Sample, to_json
from emor3_jax.parallel.mesh import check_batch, make_mesh
from emor3_jax.rollout.engine import ALL_AT_ONCE, Plan
from emor3_jax.rollout.generate import SamplingRule


def macro_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the mean of the F1 of each label that occurs in `labels`, in [0, 1].

    Args:
      labels: int[n], the true labels in [0, k).
      answers: int[n], the answers; one outside [0, k) is wrong and counts for no label.
      k: number of labels.
    """
    scores = []
    for label in range(k):
        true, said = labels == label, answers == label
        if true.any():
            scores.append(2 * (true & said).sum() / (true.sum() + said.sum()))
    return float(np.mean(scores)) if scores else 0.0


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
) -> Evaluation:
    """Answers every row once and returns means.

    Args:
      actor: for the label set of the data.
      params: of the policy.
      batches: batches with their row ids; rows of weight 0 are padding.
      seed: of the sampling noise; the same seed gives the same responses.
      rule: how responses are sampled.
      plan: how many prompts of a batch are in flight at once.
      put: places a batch on the devices.
      keep: how many responses to return as text.
      graded: report the graded accuracy beside the exact one.
    """
    columns: dict[str, list[np.ndarray]] = {}
    samples: list[Sample] = []
    # Training folds its step into the same seed: one more number keeps the two apart.
    noise = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    for index, (batch, ids) in enumerate(batches):
        weight = np.asarray(batch.weight) > 0
        batch = put(batch)
        responses, replies = actor.run(
            params, batch, jax.random.fold_in(noise, index), responses=1, rule=rule, plan=plan
        )
        scores = actor.score(batch, responses, replies)
        host = jax.device_get((scores, responses, replies, batch.answers))
        scores, responses, replies, answers = host
        rows = {name: value[weight, 0] for name, value in scores.named().items()}
        rows["answer"], rows["inferred"] = scores.answer[weight, 0], scores.inferred[weight, 0]
        rows["label"] = answers[weight]
        # Exact also where the reward is graded, so that data sets can be compared.
        rows["graded_accuracy"], rows["accuracy"] = (
            rows["accuracy"],
            rows["answer"] == rows["label"],
        )
        rows["response_length"] = responses.lengths[weight, 0]
        rows["truncated"] = ~responses.ended[weight, 0]
        for name, value in rows.items():
            columns.setdefault(name, []).append(value)
        for i in np.flatnonzero(weight)[: max(keep - len(samples), 0)]:
            samples.append(read_sample(actor, ids[i], answers[i], i, 0, responses, replies, scores))
    data = {name: np.concatenate(value) for name, value in columns.items()}
    terms = [term.name for term in actor.terms]
    metrics = {
        name: float(np.mean(data[name]))
        for name in ("accuracy", "format", "overall", "response_length", "truncated", *terms)
    }
    if graded:
        metrics["graded_accuracy"] = float(np.mean(data["graded_accuracy"]))
    metrics["macro_f1"] = macro_f1(data["label"], data["answer"], len(actor.labels))
    metrics["rows"] = float(len(data["label"]))
    if actor.rule is not None:
        metrics["coherence"] = float(np.mean(data["coherence"]))
        metrics["consistency"] = float(np.mean(data["consistency"]))
        metrics["decoupling"] = decoupling(data["answer"], data["inferred"])
    return Evaluation(metrics, samples)


def read_sample(actor, row_id, label, i, g, responses, replies, scores) -> Sample:
    """Decodes response `g` to prompt `i` and what was said of it."""

    def text(s):
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


def main(config: ConfigDict, workdir: Path) -> dict[str, Evaluation]:
    """Evaluates `config.policy.path` on `config.evaluate.sets`; see the module's docstring."""
    validate(config)
    say = Console("evaluate")
    prepare.start_jax(config.log.compile_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    jax.set_mesh(mesh)
    check_batch(mesh, "evaluate.prompts", config.evaluate.prompts)
    policy = prepare.load_policy(config, say, mesh)
    data = prepare.open_data(config, policy)
    results = {}
    for name, batches in data.evaluate.items():
        say(f"evaluating on {name}")
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
        )
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(results), indent=2, ensure_ascii=False)
    (workdir / "evaluation.json").write_text(text + "\n")
    images = {name: data.image(name) for name in results}
    report.write_report(workdir, f"Evaluation of {config.policy.path}", {}, results, images)
    for line in report.before_after_table({}, results).splitlines():
        say(line)
    return results


if __name__ == "__main__":
    cli.run(main)
