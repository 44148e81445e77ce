"""Metrics as JSON lines: one object a step in `workdir/metrics.jsonl`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


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
            before = self._path.read_text("utf-8", "surrogateescape")
            kept, damaged = [], 0
            lines = before.removesuffix("\n").split("\n")
            for number, line in enumerate(lines, start=1):
                try:
                    # Bytes that are no UTF-8 are an error here, whose line is dropped alone.
                    line.encode()
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    # A last line that an interrupted write cut short is no loss: its step is
                    # repeated.
                    damaged += bool(line) and number < len(lines)
            if damaged:
                logger.warning(
                    "%s: dropped %s lines that are damaged; their steps are not in the report",
                    self._path,
                    damaged,
                )
            after = "".join(line + "\n" for line in kept)
            if after != before:
                self._replace(after)

    def _replace(self, text: str) -> None:
        # Beside it first: on a full disk the old file stays whole.
        beside = self._path.with_suffix(".jsonl.new")
        beside.write_text(text, "utf-8")
        beside.replace(self._path)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends one object: `step` and the values, None as null."""
        # Closed each time: a mounted bucket keeps what was written only then, and the machine may
        # be taken away at any step.
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds values to the last line; to a new one, if that is of another step."""
        there = self._path.exists()
        text = self._path.read_text("utf-8") if there else ""
        # At line feeds alone: a text may hold other ends of lines.
        lines = [line + "\n" for line in text.removesuffix("\n").split("\n") if line]
        row = json.loads(lines[-1]) if lines else {}
        if row.get("step") == step:
            self._replace("".join(lines[:-1]) + json.dumps(row | values) + "\n")
        else:
            self.write(step, values)

    def close(self) -> None:
        """Does nothing: the file is closed after each step."""
