"""What a trained policy is asked, kept beside its weights in `emor3.json`.

A run writes the file into its workdir and into the policy's folder, so that `emor3_jax.infer` and
`emor3_jax.serve` ask with the labels, the question and the templates that the policy was trained
on. The templates stand there as texts: the folder needs no other file.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS, check_labels, label_set
from emor3_jax.data.prompts import BUILT_IN, PromptTemplates, fill
from emor3_jax.files import is_file, is_utf8, parse_json, read_json, show

FILE = "emor3.json"

QUESTION = "Which emotion does this picture evoke?"
"""Asked by default of a policy whose folder has no `emor3.json`."""

_MOST_TOKENS = 2**20


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
    """What a policy is asked about an image.

    Attributes:
      labels: the label set.
      question: what is asked of the image.
      templates: of the question and the reflections.
      listed: the labels in the order in which the reflections list them.
      max_tokens: longest response.
      first_resize: least and most pixels (0 for no limit) that an image is brought to before the
        resize of the policy's folder, as the release does; None for none.
    """

    labels: tuple[str, ...] = LABEL_SETS["mikels8"]
    question: str = QUESTION
    templates: PromptTemplates = dataclasses.field(default_factory=PromptTemplates.load)
    listed: tuple[str, ...] = ()
    max_tokens: int = 512
    first_resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_labels(self.labels)
        if not is_utf8(self.question):
            raise DataError(f"question={self.question!r}: is no text in UTF-8; write it in UTF-8")
        if not self.question.strip():
            raise DataError("question='': is empty; ask something of the image")
        if not 1 <= self.max_tokens <= _MOST_TOKENS:
            raise DataError(f"max_tokens={self.max_tokens}: must be 1 to {_MOST_TOKENS}")

    @property
    def prompt(self) -> str:
        """The text of the user's turn, behind the image."""
        return fill(self.templates.set, question=self.question, labels=self.labels)

    def changed(
        self,
        *,
        labels: str | Sequence[str] | None = None,
        question: str | None = None,
        template: str | Path | None = None,
        max_tokens: int | None = None,
    ) -> "InferenceSettings":
        """Returns settings with what is given in the place of their own.

        Args:
          labels: a label set by name, labels joined by commas, or a list of labels.
          question: what is asked of the image.
          template: file or name of the `set` template (`data.prompts`). A name of `BUILT_IN` takes
            its reflections too.
          max_tokens: longest response.

        Raises:
          DataError: if one of them cannot be used.
        """
        new: dict[str, Any] = {}
        if labels is not None:
            new["labels"] = label_set(labels) if isinstance(labels, str) else tuple(labels)
            new["listed"] = ()
        if question is not None:
            new["question"] = question
        if template is not None:
            asked = str(template)
            reflections = self.templates.reflections
            if asked in BUILT_IN:
                reflections = PromptTemplates.load(asked, asked, asked).reflections
            found = PromptTemplates.load(template)
            new["templates"] = dataclasses.replace(found, reflections=reflections)
        if max_tokens is not None:
            new["max_tokens"] = max_tokens
        return dataclasses.replace(self, **new)

    def to_json(self) -> str:
        """Returns the contents of `emor3.json`."""
        data = {
            "labels": self.labels,
            "question": self.question,
            "templates": {"set": self.templates.set, **self.templates.reflections},
            "listed": self.listed or self.labels,
            "max_tokens": self.max_tokens,
        }
        if self.first_resize is not None:
            data["first_resize"] = self.first_resize
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: str | Path) -> None:
        """Writes the `emor3.json` of a folder."""
        (Path(folder) / FILE).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "InferenceSettings | None":
        """Reads the `emor3.json` of a folder; None if it has none.

        Raises:
          DataError: if the file is damaged or a field is of another kind.
        """
        path = Path(folder) / FILE
        if not is_file(path):
            return None
        return cls._of_data(read_json(path, DataError, dict), show(path))

    @classmethod
    def from_json(cls, text: str, where: str = FILE) -> "InferenceSettings":
        """Reads the contents of an `emor3.json`; `where` names it in errors. Raises DataError."""
        return cls._of_data(parse_json(text, where, DataError, dict), where)

    @classmethod
    def _of_data(cls, data: dict[str, Any], where: str) -> "InferenceSettings":
        def refuse(field: str, rule: str) -> DataError:
            return DataError(f"{where}: {field}={data.get(field)!r}: must be {rule}")

        for field in ("labels", "listed"):
            if not _is_texts(data.get(field)):
                raise refuse(field, "a list of labels")
        if sorted(data["labels"]) != sorted(data["listed"]):
            raise refuse("listed", "the labels in another order")
        if not isinstance(data.get("question"), str):
            raise refuse("question", "a text")
        templates = data.get("templates")
        known = PromptTemplates.load()
        wanted = {"set", *known.reflections}
        if not isinstance(templates, dict) or not _is_texts(list(templates.values())):
            raise refuse("templates", "an object of texts")
        if missing := wanted - templates.keys():
            raise DataError(f"{where}: templates has no {', '.join(sorted(missing))}; add it")
        if type(data.get("max_tokens")) is not int:
            raise refuse("max_tokens", "a whole number")
        first = data.get("first_resize")
        if first is not None and not _is_range(first):
            raise refuse("first_resize", "two whole numbers of pixels, the least and the most")
        try:
            return cls(
                labels=tuple(data["labels"]),
                question=data["question"],
                templates=PromptTemplates.from_texts(
                    {kind: templates[kind] for kind in sorted(wanted)}, where
                ),
                listed=tuple(data["listed"]),
                max_tokens=data["max_tokens"],
                first_resize=first and tuple(first),
            )
        except DataError as error:
            raise DataError(str(error) if where in str(error) else f"{where}: {error}") from error


def _is_range(values: object) -> bool:
    """Recognises the least and the most, of which 0 is no limit."""
    if not isinstance(values, list) or len(values) != 2:
        return False
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        return False
    return not values[1] or values[0] <= values[1]


def _is_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
