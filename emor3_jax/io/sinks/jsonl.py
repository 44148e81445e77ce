"""Metrics as JSON lines: one object a step in `workdir/metrics.jsonl`."""

import json
from collections.abc import Mapping
from pathlib import Path


class JsonLinesSink:
    """Appends to `workdir/metrics.jsonl`, in which each step stands once."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        """Drops the lines that are to be written again.

        Args:
          workdir: folder of the run.
          first_step: lines of this step and later ones are dropped.
        """
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            before = self._path.read_text()
            kept = []
            for line in before.splitlines():
                try:
                    # A line that an interrupted write cut short is no loss: its step is repeated.
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue
            after = "".join(line + "\n" for line in kept)
            if after != before:
                self._replace(after)

    def _replace(self, text: str) -> None:
        # Beside it first: on a full disk the old file stays whole.
        beside = self._path.with_suffix(".jsonl.new")
        beside.write_text(text)
        beside.replace(self._path)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends one object: `step` and the values, None as null."""
        # Closed each time: a mounted bucket keeps what was written only then, and the machine may
        # be taken away at any step.
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds values to the last line; to a new one, if that is of another step."""
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        row = json.loads(lines[-1]) if lines else {}
        if row.get("step") == step:
            self._replace("".join(lines[:-1]) + json.dumps(row | values) + "\n")
        else:
            self.write(step, values)

    def close(self) -> None:
        """Does nothing: the file is closed after each step."""
