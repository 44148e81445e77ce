"""What people look at: a table before → after, sheets of samples, `report.html` and the like."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emor3_jax.evaluation.metrics import ClassScores, class_scores
from emor3_jax.evaluation.records import Evaluation, Sample, to_json

SAMPLES = 12
"""How many samples a sheet shows."""

_SHOWN = ("accuracy", "macro_f1", "weighted_f1", "format", "coherence", "consistency", "decoupling")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; color: #222;
       padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .9em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.sample { display: flex; gap: 1.2em; border-top: 1px solid #ddd; padding: 1em 0; }
.sample img { width: 168px; height: 168px; image-rendering: pixelated; background: #eee; }
.sample p { margin: .15em 0; }
.tag { color: #888; font-size: 12px; text-transform: uppercase; letter-spacing: .04em;
       margin-right: .5em; }
.yes { color: #177245; } .no { color: #b3261e; }
svg { background: #fafafa; border: 1px solid #eee; }
"""


def before_after_table(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Returns a text table: one line a data set and score, before → after, in percent.

    Args:
      before, after: data set → evaluation; a set missing from `before` shows a dash.
    """
    lines = [f"{'data set':<16}{'score':<14}{'before':>9}{'after':>9}{'change':>9}"]
    for name, evaluation in after.items():
        for score in _SHOWN:
            if score not in evaluation.metrics:
                continue
            new = 100 * evaluation.metrics[score]
            if name in before and score in before[name].metrics:
                old = 100 * before[name].metrics[score]
                numbers = f"{old:>9.1f}{new:>9.1f}{new - old:>+9.1f}"
            else:
                numbers = f"{'–':>9}{new:>9.1f}{'–':>9}"
            lines.append(f"{name:<16}{score:<14}{numbers}")
    return "\n".join(lines)


def write_samples(
    path: Path, step: int, samples: Sequence[Sample], image: Callable[[str], bytes | None]
) -> None:
    """Writes a sheet of samples of one training step.

    Args:
      path: the HTML file.
      step: the step.
      samples: what to show.
      image: returns the encoded image of a row id, None if it is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(_sample(sample, image) for sample in samples)
    path.write_text(_page(f"Samples of step {step}", body), encoding="utf-8")


def write_report(
    workdir: Path,
    title: str,
    before: Mapping[str, Evaluation],
    after: Mapping[str, Evaluation],
    images: Mapping[str, Callable[[str], bytes | None]],
) -> Path:
    """Writes `workdir/report.html`: tables, plots, curves, and a dozen samples of each data set.

    The numbers go to `evaluation.md` and `evaluation.json` beside it too, those of `after` in the
    latter.

    Args:
      workdir: folder of the run, with its metrics.jsonl.
      title: of the page.
      before, after: data set → evaluation.
      images: data set → function that returns the encoded image of a row id, or None.

    Returns:
      The file.
    """
    rows = []
    for name, evaluation in after.items():
        for score in _SHOWN:
            if score not in evaluation.metrics:
                continue
            old = before[name].metrics.get(score) if name in before else None
            new = evaluation.metrics[score]
            change = "" if old is None else f"{100 * (new - old):+.1f}"
            shown = "–" if old is None else f"{100 * old:.1f}"
            rows.append(
                f"<tr><td>{html.escape(name)} · {score}</td><td>{shown}</td>"
                f"<td>{100 * new:.1f}</td><td>{change}</td></tr>"
            )
    body = [
        "<table><tr><th>held-out score, %</th><th>before</th><th>after</th><th>change</th></tr>",
        *rows,
        "</table><p>Decoupling is the share of responses whose emotion, inferred again from their "
        "own steps, is not their boxed answer: lower is better.</p><h2>Accuracy</h2>",
        _intervals(before, after),
        *(_classes(name, evaluation) for name, evaluation in after.items()),
        "<h2>Training</h2>",
        _curves(workdir / "metrics.jsonl"),
    ]
    for name, evaluation in after.items():
        body.append(f"<h2>Samples after training: {html.escape(name)}</h2>")
        body.extend(_sample(sample, images[name]) for sample in evaluation.samples)
    workdir.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(to_json(after), indent=2, ensure_ascii=False)
    (workdir / "evaluation.json").write_text(numbers + "\n", encoding="utf-8")
    text = f"# {title}\n\n{markdown(before, after)}"
    (workdir / "evaluation.md").write_text(text, encoding="utf-8")
    path = workdir / "report.html"
    path.write_text(_page(title, "".join(body)), encoding="utf-8")
    return path


def markdown(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Returns the numbers as Markdown: scores, and by data set classes and confusion.

    Args:
      before, after: data set → evaluation; a set missing from `before` shows a dash.
    """
    lines = ["| data set | score | before | after | 95 % |", "|---|---|---:|---:|---:|"]
    for name, evaluation in after.items():
        old, new = before[name].metrics if name in before else {}, evaluation.metrics
        for score in (score for score in _SHOWN if score in new):
            shown = f"{100 * old[score]:.1f}" if score in old else "–"
            bounds = [100 * new[k] for k in (f"{score}_low", f"{score}_high") if k in new]
            interval = "{:.1f} to {:.1f}".format(*bounds) if bounds else ""
            lines.append(f"| {name} | {score} | {shown} | {100 * new[score]:.1f} | {interval} |")
        for score in ("response_length", "rows"):
            shown = f"{old[score]:.1f}" if score in old else "–"
            if score in new:
                lines.append(f"| {name} | {score} | {shown} | {new[score]:.1f} | |")
    for name, evaluation in after.items():
        if not evaluation.labels:
            continue
        lines += ["", f"## {name}", "", "| label | rows | precision | recall | F1 |"]
        lines.append("|---|---:|---:|---:|---:|")
        for each in class_scores(evaluation.labels, evaluation.confusion):
            shares = " | ".join(f"{100 * x:.1f}" for x in (each.precision, each.recall, each.f1))
            lines.append(f"| {each.label} | {each.rows} | {shares} |")
        said = [*evaluation.labels, "none"]
        lines += ["", "Rows by true label and by answer:", "", f"| | {' | '.join(said)} |"]
        lines.append("|---|" + "---:|" * len(said))
        for label, row in zip(evaluation.labels, evaluation.confusion, strict=True):
            lines.append(f"| {label} | {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def _intervals(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Plots the accuracy of each data set with its 95 % interval, before in grey."""
    width, step, left = 720, 22, 150
    span = width - left - 60
    marks, y = [], 10
    for name, evaluation in after.items():
        marks.append(f'<text x="4" y="{y + 16}">{html.escape(name)}</text>')
        for each, colour in ((before.get(name), "#999999"), (evaluation, "#4477aa")):
            if each is None or "accuracy_low" not in each.metrics:
                continue
            at = [
                left + each.metrics[key] * span
                for key in ("accuracy_low", "accuracy", "accuracy_high")
            ]
            marks.append(
                f'<line x1="{at[0]:.1f}" x2="{at[2]:.1f}" y1="{y + 11}" y2="{y + 11}" '
                f'stroke="{colour}" stroke-width="3"/>'
                f'<circle cx="{at[1]:.1f}" cy="{y + 11}" r="5" fill="{colour}"/>'
                f'<text x="{at[2] + 8:.1f}" y="{y + 16}">'
                f"{100 * each.metrics['accuracy']:.1f}</text>"
            )
            y += step
        y += 8
    if len(marks) == len(after):
        return "<p>No interval was computed.</p>"
    for percent in (0, 50, 100):
        x = left + percent / 100 * span
        marks.insert(0, f'<line x1="{x}" x2="{x}" y1="0" y2="{y}" stroke="#dddddd"/>')
        marks.append(f'<text x="{x + 3}" y="{y + 12}" fill="#888888">{percent} %</text>')
    y += 18
    return (
        f'<svg viewBox="0 0 {width} {y}" width="{width}" height="{y}" font-size="13">'
        f"{''.join(marks)}</svg><p>% of rows, with 95 % interval; grey: before.</p>"
    )


def _classes(name: str, evaluation: Evaluation) -> str:
    """Shows how each label of a data set was answered: bars of F1, and the confusion matrix."""
    if not evaluation.labels:
        return ""
    scores = class_scores(evaluation.labels, evaluation.confusion)
    return (
        f"<h2>{html.escape(name)}, by label</h2><table><tr><th>label</th><th>rows</th>"
        "<th>precision, %</th><th>recall, %</th><th>F1, %</th><th></th></tr>"
        f"{''.join(map(_class_row, scores))}</table>{_confusion(evaluation)}"
    )


def _class_row(each: ClassScores) -> str:
    shares = (each.precision, each.recall, each.f1)
    numbers = "".join(f"<td>{100 * share:.1f}</td>" for share in shares)
    return (
        f"<tr><td>{html.escape(each.label)}</td><td>{each.rows}</td>{numbers}"
        f'<td><svg width="160" height="12"><rect width="{160 * each.f1:.1f}" height="12" '
        'fill="#4477aa"/></svg></td></tr>'
    )


def _confusion(evaluation: Evaluation) -> str:
    """Draws the confusion matrix: a row a true label, dark where much of it was so answered."""
    cell, left, top = 44, 120, 90
    said = [*evaluation.labels, "no label"]
    marks = [
        f'<text transform="translate({left + (j + 0.6) * cell:.0f} {top - 6}) rotate(-45)">'
        f"{html.escape(label)}</text>"
        for j, label in enumerate(said)
    ]
    for i, (label, row) in enumerate(zip(evaluation.labels, evaluation.confusion, strict=True)):
        y = top + i * cell
        marks.append(f'<text x="4" y="{y + 27}">{html.escape(label)}</text>')
        for j, count in enumerate(row):
            share = count / max(sum(row), 1)
            colour, ink = ("#177245" if i == j else "#b3261e"), "#fff" if share > 0.5 else "#222"
            x = left + j * cell
            marks.append(
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" fill="{colour}" '
                f'fill-opacity="{share:.2f}"/><text x="{x + cell / 2 - 1:.0f}" y="{y + 27}" '
                f'text-anchor="middle" fill="{ink}">{count}</text>'
            )
    # The last slanted name reaches beyond its column.
    width, height = left + len(said) * cell + 60, top + len(evaluation.labels) * cell
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="12">'
        f"{''.join(marks)}</svg><p>Rows by true label (down) and by answer (across).</p>"
    )


def _page(title: str, body: str) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{body}</html>\n"
    )


def _sample(sample: Sample, image: Callable[[str], bytes | None]) -> str:
    data = image(sample.id)
    picture = ""
    if data is not None:
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        code = base64.b64encode(data).decode()
        picture = f'<img alt="{html.escape(sample.id)}" src="data:image/{kind};base64,{code}">'
    answer = html.escape(sample.answer) or "–"
    right = "yes" if sample.scores["accuracy"] else "no"
    response = html.escape(sample.response)
    for tag in ("&lt;step2&gt;", "&lt;step3&gt;", "\\boxed{"):
        response = response.replace(tag, "<br>" + tag)
    scores = " · ".join(f"{name} {value:.2f}" for name, value in sample.scores.items())
    lines = [
        f'<span class="tag">label</span><b>{html.escape(sample.label)}</b> '
        f'<span class="tag">answer</span><b class="{right}">{answer}</b>',
        f'<span class="tag">response</span>{response}',
        f'<span class="tag">emotion inferred from the text</span>'
        f"{html.escape(sample.coherence_reply)}",
        f'<span class="tag">does step 1 describe the image?</span>'
        f"{html.escape(sample.consistency_reply)}",
        f'<span class="tag">scores</span>{scores}',
    ]
    text = "".join(f"<p>{line}</p>" for line in lines)
    return f'<div class="sample">{picture}<div>{text}</div></div>'


def _curves(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    shown = ("overall", "format", "accuracy", "coherence", "consistency")
    colours = ("#222222", "#4477aa", "#228833", "#ee6677", "#ccbb44")
    width, height = 720, 220
    last = max((row["step"] for row in rows), default=1) or 1
    lines, legend = [], []
    for name, colour in zip(shown, colours, strict=True):
        points = [
            (row["step"], row[f"reward/{name}"])
            for row in rows
            if row.get(f"reward/{name}") is not None
        ]
        if not points:
            continue
        path_text = " ".join(
            f"{step / last * width:.1f},{height - min(max(y, 0), 1.1) / 1.1 * height:.1f}"
            for step, y in points
        )
        lines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path_text}"/>'
        )
        legend.append(f'<span style="color:{colour}">■ {name} {points[-1][1]:.2f}</span>')
    if not lines:
        return "<p>No training step was taken.</p>"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(lines)}'
        f"</svg><p>{' &nbsp; '.join(legend)} (mean reward terms over {last} steps)</p>"
    )
