"""Show the data of a config before training on it.

    python -m emor3_jax.inspect --config=configs/cpu_demo.py [--workdir=runs/inspect]
        [--samples=12] [--leakage=bytes|dhash|none] [--config.key=value …]

Builds named data sets that are not built yet. Prints, for each data set: rows, rows left out by
reason, what its builder noticed (ties that were dropped, counts that are not the published ones),
what each of its labels is called in the config's label set, label balance beside the published
one, histograms of image sizes, image tokens and prompt lengths, the padded batch shapes and their
share of padding; then the images that a set repeats, and those that any two of the sets share.
`workdir/inspect.json` has the same numbers. `workdir/inspect.html` plots them and shows samples
with the exact text that the policy will read.
"""

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
from emor3_jax.data.datasets.base import read_notes
from emor3_jax.data.encode import REASONS, Encoder, Skip
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import label_set, normalize
from emor3_jax.data.leakage import fingerprints, repeated, shared
from emor3_jax.data.pipeline import TrainBatches
from emor3_jax.data.prompts import IMAGE_TOKEN, PromptTemplates, reflection_parts
from emor3_jax.data.sources import Source
from emor3_jax.data.survey import (
    Survey,
    imbalance,
    mapped_counts,
    measure_padding,
    relabelling,
    survey,
    thumbnail,
    to_dict,
)
from emor3_jax.files import printable
from emor3_jax.io import pages, plots
from emor3_jax.io.console import Console
from emor3_jax.models import LoadedPolicy
from emor3_jax.prepare.checks import validate
from emor3_jax.prepare.data import data_sets, open_own, open_source
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.runtime import cli, job

# Training batches whose padding is measured.
_BATCHES = 200
# Characters of the longest printed bar.
_BAR = 30
# Shared images that are printed by name.
_NAMED = 5
# Reasons for which a row is left out though it can be read.
_OF_SIZES = {"large_image", "long_question"}
# Labels that are printed with their other name.
_MAPPED = 40

_HISTOGRAMS = {
    "pixels": "pixels of an image",
    "image_tokens": "image tokens",
    "prompt_tokens": "prompt tokens",
}


def main(
    config: ConfigDict, workdir: str | Path, samples: int = 12, leakage: str = "bytes"
) -> dict[str, Any]:
    """Prints and writes the contents of a config's data sets.

    Args:
      config: see `emor3_jax.config.default`.
      workdir: folder for inspect.json and inspect.html.
      samples: rows of each data set in inspect.html.
      leakage: comparison of images: "bytes", "dhash" (decodes every image; "look" is its former
        name), or "none".

    Returns:
      {"sets": {name: …}, "repeated": {name: groups of ids}, "shared": {"a, b": pairs of ids}}, as
      written.

    Raises:
      ConfigError, DataError: as training would; for a set without any usable row, once all is
        written.
    """
    workdir = Path(workdir)
    validate(config)
    say = Console("inspect")
    job.start_jax("", devices=False)
    policy = prepare.read_policy(config, say)
    say("opening the data")
    data = prepare.open_data(config, policy)
    templates = prepare.load_templates(config)
    lengths, windows = tuple(config.data.prompt_lengths), tuple(config.data.image_windows)
    found: dict[str, Any] = {"sets": {}, "repeated": {}, "shared": {}}
    sections = []
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
        padding = measure_padding(seen, _batches(seen, batches, config), lengths, windows)
        numbers = found["sets"][name] = to_dict(seen, padding)
        numbers["data"] = _origins(config, name)
        for line in describe(name, numbers):
            print(printable(line))
        picked = np.random.default_rng(config.seed).permutation(len(seen.index))[:samples]
        sections.append(
            {
                "name": name,
                "source": source.name,
                "numbers": numbers,
                "plots": _plots(name, numbers),
                "facts": [
                    line
                    for part, each in numbers["data"].items()
                    for line in _describe_data(part, each)
                ]
                + _describe_balance(numbers),
                "repeats": [],
                "questions": _questions(policy, templates, prepare.listed_labels(config, labels)),
                "samples": [_sample(seen, source, policy, encoder, i) for i in np.sort(picked)],
            }
        )
    if leakage != "none":
        say(f"looking for images in two sets, by {leakage}")
        decode = leakage in ("dhash", "look")
        images = {name: fingerprints(source, decode) for name, source in data.sources.items()}
        for name, source in data.sources.items():
            groups = found["repeated"][name] = repeated(images[name])
            answers = {texts.id: texts.answer for texts in source.texts()} if groups else {}
            print(printable(line := _repeats(name, groups, answers)))
            section = next(each for each in sections if each["name"] == name)
            section["facts"].append(line)
            section["repeats"] = [_group(source, group, answers) for group in groups[:_NAMED]]
        for a, b in itertools.combinations(images, 2):
            pairs = shared(images[a], images[b])
            found["shared"][f"{a}, {b}"] = pairs
            named = ", ".join(f"{x} = {y}" for x, y in pairs[:_NAMED])
            more = ", …" if len(pairs) > _NAMED else ""
            line = f"{a} and {b} share {len(pairs)} images{': ' if pairs else ''}{named}{more}"
            print(printable(line))
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (workdir / "inspect.json").write_text(text + "\n", encoding="utf-8")
    page = pages.render(
        "inspect.html.j2", title="The data as the policy sees it", data_sets=sections
    )
    (workdir / "inspect.html").write_text(page, encoding="utf-8")
    say(f"numbers: {workdir / 'inspect.json'}   samples: {workdir / 'inspect.html'}")
    if empty := [name for name, numbers in found["sets"].items() if not numbers["usable"]]:
        raise DataError(f"{', '.join(empty)}: no usable row is left, by the reasons above")
    return found


def _origins(config: ConfigDict, name: str) -> dict[str, dict[str, Any]]:
    """Returns, for each data set that makes up the rows of a name, what its own data says.

    Args:
      config: of the run.
      name: "train", of which those of `data.mix` are a part, or an evaluation set.

    Returns:
      Name → `labels`, how its own labels are called, and of a named data set also `notes` of its
      builder, kind → number, and `published`, label of the config's set → rows.
    """
    described = data_sets(config)
    wanted = open_source(config, *described["train"])[1]
    found = {}
    for part, (field, dataset) in described.items():
        if part != name and not (name == "train" and part.startswith("train.")):
            continue
        whole = dataset.copy_and_resolve_references()
        whole.subset, whole.ids = 0, ""
        mapped, labels = open_source(config, field, whole, wanted if part != name else "")
        own = open_own(config, field, whole)
        mapping = relabelling(own.texts(), mapped.texts(), label_set(labels))
        found[part] = {"labels": [each._asdict() for each in mapping]}
        if (built := getattr(own, "built", None)) is not None:
            notes = read_notes(built)
            found[part]["notes"] = {kind: len(what) for kind, what in notes.items()}
            found[part]["published"] = mapped_counts(built.LABEL_COUNTS, mapping)
            found[part]["counts"] = notes.get("count", [])
    return found


def _repeats(name: str, groups: Sequence[Sequence[str]], answers: dict[str, str | None]) -> str:
    """Returns the printed line of the images that a set repeats."""
    other = sum(len({answers[row_id] for row_id in group}) > 1 for group in groups)
    extra = sum(map(len, groups)) - len(groups)
    named = "; ".join(" = ".join(group[:_NAMED]) for group in groups[:_NAMED])
    more = "; …" if len(groups) > _NAMED else ""
    return (
        f"repeated images in {name}: {len(groups)}, further rows that show them: {extra}, under "
        f"another label: {other}{'; ' if groups else ''}{named}{more}"
    )


def _group(
    source: Source, group: Sequence[str], answers: dict[str, str | None]
) -> list[dict[str, str]]:
    """Returns the first images of a group of equal ones, each with its name and label."""
    shown = []
    for row_id in group[:_NAMED]:
        data = source[source.find(row_id)].images[0]
        caption = f"{row_id} · {answers[row_id] or 'no label'}"
        shown.append({"caption": caption, "image": pages.data_url(data)})
    return shown


def _batches(
    seen: Survey, train: TrainBatches | None, config: ConfigDict
) -> Sequence[Sequence[int]]:
    """Returns the rows of each batch: the first batches of training, all of an evaluation."""
    if train is not None:
        size = config.rollout.prompts
        return train.preview(min(_BATCHES, max(1, 2 * len(seen.index) // size)))
    size = config.evaluate.prompts
    return [seen.index[i : i + size].tolist() for i in range(0, len(seen.index), size)]


def describe(name: str, numbers: dict[str, Any]) -> list[str]:
    """Returns the printed lines of a data set.

    Args:
      name: of the data set in the config.
      numbers: as `emor3_jax.data.survey.to_dict` returns them.
    """
    lines = ["", f"{name}: {numbers['rows']} rows, {numbers['usable']} usable"]
    left_out = numbers["left_out"]
    lines += [f"  left out, {reason}: {n} ({REASONS[reason]})" for reason, n in left_out.items()]
    if left_out.keys() & _OF_SIZES:
        lines.append(
            f"  windows of the largest image: {numbers['most_windows']}, tokens of the longest "
            f"prompt: {numbers['most_tokens']}"
        )
    for part, data in numbers.get("data", {}).items():
        lines += _describe_data(part, data)
    lines.append(f"  questions: {numbers['questions']}")
    lines += _text_bars("labels", numbers["labels"])
    lines += _describe_balance(numbers)
    for field in _HISTOGRAMS:
        lines += _text_bars(field.replace("_", " "), _bins(numbers[field]))
    lines.append(f"  image tokens in all: {numbers['image_tokens_total']}")
    lines += _text_bars("batches by padded shape", numbers["shapes"])
    lines.append(
        f"  padding: {100 * numbers['token_waste']:.1f} % of prompt tokens, "
        f"{100 * numbers['window_waste']:.1f} % of image windows"
    )
    return lines


def _describe_data(part: str, data: dict[str, Any]) -> list[str]:
    """Returns the lines of what a data set's own files say."""
    lines = [f"  noticed in {part}, {kind}: {n}" for kind, n in data.get("notes", {}).items()]
    lines += [f"    {text}" for text in data.get("counts", ())]
    renamed = [x for x in data["labels"] if normalize(x["own"]) != normalize(x["label"])]
    if renamed:
        lines.append(f"  labels of {part} that have another name here")
    for each in renamed[:_MAPPED]:
        label = each["label"] or "no label, left out"
        lines.append(f"    {each['own'] or '(none)'} → {label}: {each['rows']}")
    if len(renamed) > _MAPPED:
        lines.append(f"    … and {len(renamed) - _MAPPED} more")
    return lines


def _describe_balance(numbers: dict[str, Any]) -> list[str]:
    """Returns the lines of how even the labels are, beside the published counts."""
    here = numbers["labels"]
    found = imbalance(here.values())
    shown = "a label has no rows" if found is None else f"{found:.1f}"
    lines = [f"  most frequent label over rarest: {shown}"]
    for part, data in numbers.get("data", {}).items():
        published = data.get("published") or {}
        if not published:
            continue
        total, all_rows = sum(published.values()), max(sum(here.values()), 1)
        theirs = imbalance(published.values())
        lines.append(f"  published of {part}: {total} rows, most over rarest {theirs:.1f}")
        lines += [
            f"    {label}: {100 * here.get(label, 0) / all_rows:.1f} % here, "
            f"{100 * rows / total:.1f} % published"
            for label, rows in published.items()
        ]
    return lines


def _bins(histogram: Sequence[tuple[int, int, int]]) -> dict[str, int]:
    return {f"{a}-{b}" if b > a else str(a): count for a, b, count in histogram}


def _text_bars(title: str, bars: dict[str, int]) -> list[str]:
    most = max(bars.values(), default=0)
    total = sum(bars.values())
    width = max(map(len, bars), default=0)
    return [f"  {title}"] + [
        f"    {label:>{width}} {count:>8} {100 * count / max(total, 1):5.1f} % "
        + "█" * round(_BAR * count / max(most, 1))
        for label, count in bars.items()
    ]


def _plots(name: str, numbers: dict[str, Any]) -> list[str]:
    """Returns the histograms of a data set as SVG, those of no rows left out."""
    histograms = [("label", numbers["labels"], "rows")]
    histograms += [(axis, _bins(numbers[field]), "rows") for field, axis in _HISTOGRAMS.items()]
    histograms.append(("padded batch shape", numbers["shapes"], "batches"))
    return [
        plots.to_svg(plots.bars(list(bins), list(bins.values()), unit, axis), f"{axis}, {name}")
        for axis, bins, unit in histograms
        if bins
    ]


def _questions(
    policy: LoadedPolicy, templates: PromptTemplates, labels: Sequence[str]
) -> list[dict[str, str]]:
    """Returns the text of the reflection questions, before and after the response's steps."""
    tokenizer = policy.processor.tokenizer
    questions = []
    for name, question in QUESTIONS.items():
        template = templates.reflections[name]
        parts = reflection_parts(tokenizer, template, labels, question.with_image)
        head, tail = map(tokenizer.decode, parts)
        questions.append({"name": name, "head": head, "tail": tail})
    return questions


def _sample(
    seen: Survey, source: Source, policy: LoadedPolicy, encoder: Encoder, index: int
) -> dict[str, Any]:
    """Returns a row as the policy will read it, or why it cannot be read.

    Args:
      seen: survey of the data set.
      source: its rows.
      policy: the policy.
      encoder: of the data set.
      index: of the row among the usable ones.
    """
    row = source[int(seen.index[index])]
    # An image that is damaged behind its header has no tokens.
    example = encoder((0, row))
    if isinstance(example, Skip):
        return {"id": row.texts.id, "fault": REASONS[example.reason]}
    (height, width), resized = seen.sizes[index].tolist(), seen.resized[index].tolist()
    caption = (
        f"{row.texts.id} · label {row.texts.answer} · {width} x {height} pixels, seen as "
        f"{resized[1]} x {resized[0]} · {seen.image_tokens[index]} image tokens · "
        f"{len(example.tokens)} tokens{' · question cut' if example.cut else ''}"
    )
    return {
        "id": row.texts.id,
        "fault": "",
        "image": pages.data_url(thumbnail(row.images[0], resized)),
        "caption": caption,
        "prompt": _fold(policy.processor.tokenizer.decode(example.tokens)),
    }


def _fold(prompt: str) -> list[tuple[str, int]]:
    """Returns the segments of a prompt; a run of image tokens is one token and their number."""
    runs = re.split(f"((?:{re.escape(IMAGE_TOKEN)})+)", prompt)
    return [
        (IMAGE_TOKEN, len(text) // len(IMAGE_TOKEN)) if i % 2 else (text, 0)
        for i, text in enumerate(runs)
    ]


if __name__ == "__main__":
    _samples = flags.DEFINE_integer("samples", 12, "Rows of each data set in inspect.html.")
    _leakage = flags.DEFINE_enum(
        "leakage",
        "bytes",
        ["bytes", "dhash", "look", "none"],
        "Comparison of the images of two sets; look is a former name of dhash.",
    )
    cli.run(
        lambda config, workdir: main(config, workdir, _samples.value, _leakage.value),
        workdir="runs/inspect",
    )
