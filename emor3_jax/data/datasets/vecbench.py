"""VECBench: nine tasks on the test images of six data sets (EmoCaliber, arXiv 2512.15528).

`test_metadata.csv` (in the folder or in `VECBench` below it) names task, split, image_path and
label of each row; images lie at their path below the folder. `label` of the config chooses the
task: `fi-2`, `fi-8`, `emoset-8`, `webemo-2`, `webemo-7`, `webemo-25`, `unbiasedemo-6`,
`abstract-8`, `artphoto-8`, or `all` (default). Under `all` the label set is that of all tasks
together, and each row is asked with the labels of its own task; only the coherence reflection is
then asked with all labels.

A file of JSON lines with `task`, `candidates` and a path of the image, if there is one, gives each
row its candidates in their order.

Checked against public code: the columns, the spelling of two WebEmo labels, the tasks with their
counts, and that lines hold `task` and `candidates`. Not checked: the name of the JSON lines and of
the field of their image (`image_path`, `image`, or that of the conversation), and the train split.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, once, read_csv, read_lines
from emor3_jax.data.labels import LABEL_SETS, find_label, label_set, normalize
from emor3_jax.files import parse_json

_FILE = "test_metadata.csv"
_COLUMNS = ("task", "split", "image_path", "label")


class Task(NamedTuple):
    """A task of VECBench.

    Attributes:
      labels: name of its label set.
      rows: of its test split.
    """

    labels: str
    rows: int


TASKS = {
    "fi-2": Task("polarity2", 1000),
    "fi-8": Task("mikels8", 1000),
    "emoset-8": Task("mikels8", 1000),
    "webemo-2": Task("polarity2", 1000),
    "webemo-7": Task("webemo7", 1000),
    "webemo-25": Task("webemo25", 997),
    "unbiasedemo-6": Task("parrott6", 1000),
    "abstract-8": Task("mikels8", 229),
    "artphoto-8": Task("mikels8", 806),
}
"""Tasks by their name, lower-cased."""

# Some copies spell a task so.
_SPELLINGS = {"unbaisedemo-6": "unbiasedemo-6"}
_ALL = tuple(dict.fromkeys(label for task in TASKS.values() for label in LABEL_SETS[task.labels]))


class Vecbench(Builder):
    """All tasks of VECBench; each row has its candidates."""

    LABELS = ",".join(_ALL)
    QUESTION = "Which of these emotions or sentiments does this picture evoke?"
    PUBLISHED = (("test", sum(task.rows for task in TASKS.values())),)
    TASK = ""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "VECBench is downloaded from https://huggingface.co/datasets/wudq/VECBench. Unpack its "
        f"images so that the image_path of each row of {_FILE} is there below path, and give the "
        "folder of the data set as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        places = (root / _FILE, root / "VECBench" / _FILE)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise checks.refuse(f"no {_FILE}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        columns, rows = read_csv(path, checks)
        if missing := [name for name in _COLUMNS if name not in columns]:
            raise checks.refuse(
                f"{_FILE} has no column {', '.join(missing)}, only {', '.join(columns)}"
            )
        candidates = _candidates(path.parent, checks)
        folder, splits = Folder(root, checks), {}
        for number, row in enumerate(rows, start=2):
            task, split, image, name = (row[columns[each]] for each in _COLUMNS)
            task = _task(task)
            if task not in TASKS:
                raise checks.refuse(
                    f"row {number} of {_FILE} has the task {task!r}, none of {', '.join(TASKS)}"
                )
            if cls.TASK and task != cls.TASK:
                continue
            labels = LABEL_SETS[TASKS[task].labels]
            label = find_label(name, labels)
            if label is None:
                raise checks.refuse(
                    f"row {number} of {_FILE} has the label {name!r}, none of {', '.join(labels)}"
                )
            asked = candidates.get((task, _end(image)), labels)
            # Without candidates a row is asked with all labels of the set.
            asked = () if cls.TASK and asked == labels else asked
            splits.setdefault(split or "test", []).append(
                Found(f"{task}/{image}", label, folder.find(image), candidates=asked)
            )
        return {split: once(found, split, checks) for split, found in splits.items()}


def _builder_of(name: str, task: Task) -> type[Vecbench]:
    members = {
        "__doc__": f"VECBench's task {name}.",
        "__module__": __name__,
        "LABELS": task.labels,
        "PUBLISHED": (("test", task.rows),),
        "TASK": name,
    }
    return type("Vecbench" + name.title().replace("-", ""), (Vecbench,), members)


BUILDERS = {"all": Vecbench, **{name: _builder_of(name, task) for name, task in TASKS.items()}}
"""Task → its builder, all of them first."""


def _task(name: str) -> str:
    return _SPELLINGS.get(normalize(name), normalize(name))


def _end(path: str) -> str:
    """Returns folder and name of an image, by which csv and JSON lines agree on it."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])


def _candidates(folder: Path, checks: Checks) -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns the candidates of each row, by task and image, from the folder's JSON lines."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(read_lines(path, checks), start=1):
            where = f"line {number} of {path.name}"
            row = parse_json(line, where, checks.refuse) if line.strip() else {}
            named = row.get("candidates") if isinstance(row, dict) else None
            task = _task(str(row.get("task", ""))) if named else ""
            image = next(_images(row), "") if task in TASKS else ""
            if image and not isinstance(named, list):
                raise checks.refuse(f"{where}: its candidates are {named!r}, not a list of labels")
            if image:
                own = label_set(TASKS[task].labels)
                labels = [find_label(str(name), own) for name in named]
                if None in labels or len(set(labels)) != len(labels):
                    raise checks.refuse(
                        f"line {number} of {path.name} has the candidates {named!r}, not labels of "
                        f"{', '.join(own)}"
                    )
                found[task, _end(image)] = tuple(labels)
    return found


def _images(row: dict[str, Any]) -> Iterator[str]:
    """Yields the paths of images that a JSON line names."""
    for name in ("image_path", "image"):
        if isinstance(row.get(name), str):
            yield row[name]
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image"), str):
                yield part["image"]
