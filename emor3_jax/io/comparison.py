"""Comparisons of runs for people to read: lines of text and an HTML page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from emor3_jax.evaluation.comparison import Answered, Comparison
from emor3_jax.io import pages, plots
from emor3_jax.io.curves import RunGroup, learning_curves

SHOWN = 12
"""Rows that only one run gets right and that a page shows, of each run."""

_NAMED = 5


class Compared(NamedTuple):
    """A data set of two runs.

    Attributes:
      data_set: its name.
      runs: names of the two.
      rows: row id → answer, of each.
      found: their comparison.
      image: from a row id to its encoded image, or None.
      steps: steps of training behind each, None of an evaluation.
    """

    data_set: str
    runs: tuple[str, str]
    rows: tuple[Mapping[str, Answered], Mapping[str, Answered]]
    found: Comparison
    image: Callable[[str], bytes | None]
    steps: tuple[int | None, int | None] = (None, None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the two for people to read, with their steps."""
        pairs = zip(self.runs, self.steps, strict=True)
        return tuple(run if step is None else f"{run} (step {step})" for run, step in pairs)


class _Shown(NamedTuple):
    """A row that one run alone gets right."""

    id: str
    image: str | None
    first: Answered
    second: Answered


def lines(compared: Compared) -> list[str]:
    """Returns the printed lines of a data set of two runs; shares in percent."""
    found = compared.found
    text = ["", f"{compared.data_set}: {found.rows} rows in both", *notes(compared)]
    if not found.rows:
        return text
    text.append(f"  {'score':<12}{'first':>9}{'second':>9}{'change':>9}   95 % interval")
    for name, each in found.scores.items():
        first, second, change, low, high = (
            100 * x for x in (each.first, each.second, each.change, each.low, each.high)
        )
        row = f"  {name:<12}{first:>9.1f}{second:>9.1f}{change:>+9.1f}"
        text.append(f"{row}   {low:+.1f} to {high:+.1f}")
    text.append(
        f"  right: both {found.both}, only first {len(found.only_first)}, only second "
        f"{len(found.only_second)}, neither {found.neither}; McNemar's exact p = {found.p:.3g}"
    )
    width = max([14, *(len(each.label) + 2 for each in found.classes)])
    head = f"{'first':>9}{'second':>9}{'change':>9}{'only first':>12}{'only second':>13}{'p':>9}"
    text.append(f"  {'label':<{width}}{'rows':>6}{head}")
    for each in found.classes:
        first, second = 100 * each.first, 100 * each.second
        row = f"  {each.label:<{width}}{each.rows:>6}{first:>9.1f}{second:>9.1f}"
        counts = f"{each.only_first:>12}{each.only_second:>13}{each.p:>9.3g}"
        text.append(f"{row}{second - first:>+9.1f}{counts}")
    return text


def notes(compared: Compared) -> list[str]:
    """Returns a line for each kind of row that is not compared, with its number and examples."""
    found, (first, second) = compared.found, compared.names
    kinds = {
        f"rows not answered by {first}": found.missing_first,
        f"rows not answered by {second}": found.missing_second,
        "rows left out, since their labels differ": found.other_label,
    }
    return [
        f"  {text}: {len(ids)} ({', '.join(ids[:_NAMED])}{', …' if len(ids) > _NAMED else ''})"
        for text, ids in kinds.items()
        if ids
    ]


def write_page(
    path: Path, title: str, compared: Sequence[Compared], groups: Sequence[RunGroup] = ()
) -> None:
    """Writes the HTML page of comparisons, its folder made if needed.

    Args:
      path: the file.
      title: of the page.
      compared: data sets of pairs of runs.
      groups: of the runs that were trained, for their learning curves.
    """
    data_sets = list(dict.fromkeys(each.data_set for each in compared))
    drawn = learning_curves(groups, data_sets)
    sections = [
        {
            "data_set": each.data_set,
            "runs": each.names,
            "found": each.found,
            "notes": notes(each),
            "only": [
                {"run": run, "rows": list(_shown(each, ids)), "all": len(ids)}
                for run, ids in zip(
                    each.names, (each.found.only_first, each.found.only_second), strict=True
                )
            ],
        }
        for each in compared
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    page = pages.render(
        "compare.html.j2",
        title=title,
        sections=sections,
        curves=[plots.to_svg(each.figure, each.name) for each in drawn],
        seeds=any(len(group.rows) > 1 for group in groups),
    )
    path.write_text(page, encoding="utf-8")


def _shown(compared: Compared, ids: Sequence[str]) -> Iterator[_Shown]:
    first, second = compared.rows
    for row_id in ids[:SHOWN]:
        encoded = compared.image(row_id)
        image = None if encoded is None else pages.data_url(encoded)
        yield _Shown(row_id, image, first[row_id], second[row_id])
