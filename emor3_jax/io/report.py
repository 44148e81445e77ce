"""What people look at: a table before → after, sheets of samples, and `report.html`."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emor3_jax.io.evaluation import Evaluation, Sample

SAMPLES = 12
"""How many samples a sheet shows."""

_SHOWN = ("accuracy", "macro_f1", "format", "coherence", "consistency", "decoupling")

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
    """Writes `workdir/report.html`: the table, the curves, and a dozen samples of each data set.

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
        "own steps, is not their boxed answer: lower is better.</p><h2>Training</h2>",
        _curves(workdir / "metrics.jsonl"),
    ]
    for name, evaluation in after.items():
        body.append(f"<h2>Samples after training: {html.escape(name)}</h2>")
        body.extend(_sample(sample, images[name]) for sample in evaluation.samples)
    path = workdir / "report.html"
    path.write_text(_page(title, "".join(body)), encoding="utf-8")
    return path


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
