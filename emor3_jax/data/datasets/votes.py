"""A label from the votes or shares of several raters."""

from collections.abc import Mapping

from emor3_jax.data.datasets.checks import Checks


def label_of(
    votes: Mapping[str, float], row_id: str, checks: Checks, *, keep_ties: bool = True
) -> str | None:
    """Returns the label with most votes.

    Args:
      votes: label → votes or share, 0 or more, in the order that decides ties.
      row_id: names the row where a tie or a row without a vote is noted.
      checks: takes these.
      keep_ties: take the first of several labels with most votes; else such a row has none.

    Returns:
      The label; "" if there is no vote, None if the row is left out for a tie.
    """
    most = max(votes.values(), default=0)
    if not most:
        checks.note("no_share", row_id)
        return ""
    first, *others = (label for label, count in votes.items() if count == most)
    if others:
        checks.note("tie" if keep_ties else "tie_dropped", row_id)
        return first if keep_ties else None
    return first
