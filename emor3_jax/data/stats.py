"""Counts of the rows that were left out, each once and by its reason."""

from collections.abc import Mapping, Sequence

from emor3_jax.data.encode import REASONS


class RowStats:
    """Counts of the rows that were left out."""

    def __init__(self) -> None:
        self._ids: dict[str, dict[str, None]] = {reason: {} for reason in REASONS}
        self._cut: dict[str, None] = {}
        self._before = dict.fromkeys(REASONS, 0)
        self.images_moved = 0

    def add(self, reason: str, row_id: str) -> bool:
        """Counts a row once; returns whether it is new."""
        new = row_id not in self._ids[reason]
        self._ids[reason][row_id] = None
        return new

    def add_cut(self, row_id: str) -> bool:
        """Counts a row whose question was cut, once; returns whether it is new."""
        new = row_id not in self._cut
        self._cut[row_id] = None
        return new

    def begin_reading(self) -> None:
        """Says that what is added from now on is found in reading, as damaged images are."""
        self._before = self.counts()

    def found_in_reading(self) -> dict[str, list[str]]:
        """Returns the ids found in reading, by reason, and under "cut" those of cut questions."""
        found = {reason: list(ids)[self._before[reason] :] for reason, ids in self._ids.items()}
        found["cut"] = list(self._cut)
        return {reason: ids for reason, ids in found.items() if ids}

    def restore(self, found: Mapping[str, Sequence[str]]) -> None:
        """Counts what `found_in_reading` returned, in place of what was found since."""
        for reason, ids in self._ids.items():
            kept = list(ids)[: self._before[reason]]
            self._ids[reason] = dict.fromkeys((*kept, *found.get(reason, ())))
        self._cut = dict.fromkeys(found.get("cut", ()))

    @property
    def questions_cut(self) -> int:
        """The number of rows whose question was cut to fit."""
        return len(self._cut)

    def counts(self) -> dict[str, int]:
        """Returns the number of rows left out for each reason, all reasons included."""
        return {reason: len(ids) for reason, ids in self._ids.items()}

    def ids(self, reason: str) -> list[str]:
        """Returns the ids of the rows left out for a reason, in the order of their discovery."""
        return list(self._ids[reason])

    def describe(self) -> str:
        """Returns the reasons that occurred with numbers and examples, for a message."""
        found = [(reason, list(ids)) for reason, ids in self._ids.items() if ids]
        return "; ".join(
            f"{len(ids)} {reason} ({REASONS[reason]}): {', '.join(ids[:3])}"
            + (", …" if len(ids) > 3 else "")
            for reason, ids in found
        )
