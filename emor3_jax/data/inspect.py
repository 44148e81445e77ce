"""Shows the data of a config before anything is trained on it.

    python -m emor3_jax.data.inspect --config=configs/cpu_demo.py [--workdir=runs/inspect]
        [--samples=12] [--leakage=bytes|look|none] [--config.key=value …]

Named data sets are built first where they are not yet. It prints, for each data set, rows and rows
left out, label balance, histograms of picture sizes, image tokens and prompt lengths, the shapes
that batches get and what of them is padding; then the pictures that any two of the sets share.
`workdir/inspect.json` has the same numbers, `workdir/inspect.html` samples with the very text that
the policy will see.
"""

import base64
import html
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.data.encode import REASONS, Encoder, Skip
from emor3_jax.data.leakage import prints, shared
from emor3_jax.data.pipeline import TrainBatches
from emor3_jax.data.prompts import IMAGE_TOKEN, PromptTemplates, reflection_parts
from emor3_jax.data.survey import Survey, fill, small_picture, survey, to_dict
from emor3_jax.io.console import Console
from emor3_jax.models import Policy
from emor3_jax.prepare.checks import validate
from emor3_jax.runtime import cli

# Batches of training whose shapes are looked at.
_BATCHES = 200
_BAR = 30
_NAMED = 5

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
.sample { display: flex; gap: 1.2em; border-top: 1px solid #ddd; padding: 1em 0; }
.sample img { max-width: 336px; align-self: flex-start; image-rendering: pixelated; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em; margin: .4em 0; }
.tag { color: #777; }
"""


def main(
    config: ConfigDict, workdir: Path, samples: int = 12, leakage: str = "bytes"
) -> dict[str, Any]:
    """Prints and writes what the data sets of a config hold.

    Args:
      config: see `emor3_jax.config.default`.
      workdir: where inspect.json and inspect.html go.
      samples: rows of each data set in the HTML sheet.
      leakage: "bytes", "look" (decodes every picture), or "none".

    Returns:
      {"sets": {name: …}, "shared": {"a, b": pairs of ids}}, as written.

    Raises:
      ConfigError, DataError: as training would.
    """
    validate(config)
    say = Console("inspect")
    prepare.start_jax("")
    policy = prepare.read_policy(config, say)
    say("opening the data")
    data = prepare.open_data(config, policy)
    templates = prepare.load_templates(config)
    lengths, windows = tuple(config.data.prompt_lengths), tuple(config.data.image_windows)
    found: dict[str, Any] = {"sets": {}, "shared": {}}
    pages = []
    for name, source in data.sources.items():
        labels = data.labels[name]
        described = config.data.train if name == "train" else config.evaluate.sets[name]
        encoder = Encoder(
            policy.processor,
            templates.set,
            labels,
            max(lengths),
            max(windows),
            described.graded,
            config.data.long_prompts == "cut",
        )
        seen = survey(
            source,
            policy.processor,
            encoder,
            templates.set,
            labels,
            max_tokens=max(lengths),
            max_windows=max(windows),
        )
        batches = data.train if name == "train" else None
        filled = fill(seen, _batches(seen, batches, config), lengths, windows)
        found["sets"][name] = to_dict(seen, filled)
        for line in describe(name, found["sets"][name]):
            print(line)
        picked = np.random.default_rng(config.seed).permutation(len(seen.index))[:samples]
        pages.append(_page(name, seen, source, policy, templates, encoder, np.sort(picked)))
    if leakage != "none":
        say(f"looking for pictures in two sets, by {leakage}")
        hashes = {name: prints(source, leakage == "look") for name, source in data.sources.items()}
        for a, b in itertools.combinations(hashes, 2):
            pairs = shared(hashes[a], hashes[b])
            found["shared"][f"{a}, {b}"] = pairs
            named = ", ".join(f"{x} = {y}" for x, y in pairs[:_NAMED])
            more = ", …" if len(pairs) > _NAMED else ""
            print(f"{a} and {b} share {len(pairs)} pictures{': ' if pairs else ''}{named}{more}")
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (workdir / "inspect.json").write_text(text + "\n", encoding="utf-8")
    body = "".join(pages)
    (workdir / "inspect.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data</title>'
        f"<style>{_STYLE}</style><h1>The data as the policy sees it</h1>{body}</html>\n",
        encoding="utf-8",
    )
    say(f"numbers: {workdir / 'inspect.json'}   samples: {workdir / 'inspect.html'}")
    return found


def _batches(
    seen: Survey, train: TrainBatches | None, config: ConfigDict
) -> Sequence[Sequence[int]]:
    """Returns the rows of the batches of a set: the first of training, all of an evaluation."""
    if train is not None:
        size = config.rollout.prompts
        return train.preview(min(_BATCHES, max(1, 2 * len(seen.index) // size)))
    size = config.evaluate.prompts
    return [seen.index[i : i + size].tolist() for i in range(0, len(seen.index), size)]


def describe(name: str, numbers: dict[str, Any]) -> list[str]:
    """Returns the lines that are printed for a data set.

    Args:
      name: of the data set in the config.
      numbers: as `emor3_jax.data.survey.to_dict` returns them.
    """
    lines = ["", f"{name}: {numbers['rows']} rows, {numbers['usable']} usable"]
    lines += [f"  left out, {reason}: {count}" for reason, count in numbers["left_out"].items()]
    lines.append(f"  questions: {numbers['questions']}")
    lines += _bars("labels", list(numbers["labels"].items()))
    for field in ("pixels", "image_tokens", "prompt_tokens"):
        bars = [(f"{a}-{b}" if b > a else str(a), count) for a, b, count in numbers[field]]
        lines += _bars(field.replace("_", " "), bars)
    lines.append(f"  image tokens in all: {numbers['image_tokens_total']}")
    lines += _bars("batches by padded shape", list(numbers["shapes"].items()))
    lines.append(
        f"  padding: {100 * numbers['token_waste']:.1f} % of prompt tokens, "
        f"{100 * numbers['window_waste']:.1f} % of image windows"
    )
    return lines


def _bars(title: str, bars: Sequence[tuple[str, int]]) -> list[str]:
    most = max((count for _, count in bars), default=0)
    total = sum(count for _, count in bars)
    width = max((len(label) for label, _ in bars), default=0)
    return [f"  {title}"] + [
        f"    {label:>{width}} {count:>8} {100 * count / max(total, 1):5.1f} % "
        + "█" * round(_BAR * count / max(most, 1))
        for label, count in bars
    ]


def _page(
    name: str,
    seen: Survey,
    source: Any,
    policy: Policy,
    templates: PromptTemplates,
    encoder: Encoder,
    picked: np.ndarray,
) -> str:
    """Returns the HTML of one data set: its reflection questions, and samples."""
    tokenizer = policy.processor.tokenizer

    def text(tokens: Sequence[int]) -> str:
        return html.escape(tokenizer.decode(tokens))

    parts = [f"<h2>{html.escape(name)}</h2><p>{html.escape(source.name)}</p>"]
    for kind in ("coherence", "consistency"):
        template = getattr(templates, kind)
        with_image = kind == "consistency"
        head, tail = reflection_parts(tokenizer, template, encoder.labels, with_image)
        parts.append(
            f'<details><summary class="tag">the {kind} question</summary>'
            f"<pre>{text(head)}<b>[the response's own steps]</b>{text(tail)}</pre></details>"
        )
    for at in picked:
        row = source[int(seen.index[at])]
        # The very tokens of a batch; a picture that is damaged behind its head has none.
        example = encoder((0, row))
        if isinstance(example, Skip):
            parts.append(f"<p>{html.escape(row.texts.id)}: {REASONS[example.reason]}</p>")
            continue
        (height, width), (down, across) = seen.sizes[at].tolist(), seen.resized[at].tolist()
        facts = (
            f"{row.texts.id} · label {row.texts.answer} · {width} x {height} pixels, seen as "
            f"{across} x {down} · {seen.image_tokens[at]} image tokens · "
            f"{len(example.tokens)} tokens{' · question cut' if example.cut else ''}"
        )
        parts.append(
            f'<div class="sample">{_image(row.images[0], (down, across))}<div>'
            f'<div class="tag">{html.escape(facts)}</div>'
            f"<pre>{_folded(text(example.tokens))}</pre></div></div>"
        )
    return "".join(parts)


def _folded(text: str) -> str:
    """Returns a prompt with its run of image tokens written as one and their number."""
    token = html.escape(IMAGE_TOKEN)

    def count(match: re.Match[str]) -> str:
        return f"{token}<i> x {len(match[0]) // len(token)}</i>"

    return re.sub(f"(?:{re.escape(token)})+", count, text)


def _image(encoded: bytes, resized: tuple[int, int]) -> str:
    data = base64.b64encode(small_picture(encoded, resized)).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


if __name__ == "__main__":
    _samples = flags.DEFINE_integer("samples", 12, "Rows of each data set in the HTML sheet.")
    _leakage = flags.DEFINE_enum(
        "leakage", "bytes", ["bytes", "look", "none"], "How pictures of two sets are compared."
    )
    cli.run(
        lambda config, workdir: main(config, workdir, _samples.value, _leakage.value),
        workdir="runs/inspect",
    )
