"""One table of all comparisons: case, largest and mean difference, tolerance, verdict."""

from collections.abc import Callable

import numpy as np
import pytest

_ROWS: list[tuple[str, float, float, float]] = []


@pytest.fixture
def compare() -> Callable[..., None]:
    """A function that compares two arrays and enters the result in the table.

    compare(case, actual, expected, tolerance, scale=1.0): differences are divided by `scale` and
    must be at most `tolerance`.
    """

    def check(case: str, actual, expected, tolerance: float, scale: float = 1.0) -> None:
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, case
        difference = np.abs(actual - expected) / scale
        record(case, float(difference.max()), float(difference.mean()), tolerance)

    return check


@pytest.fixture
def enter() -> Callable[[str, float, float, float], None]:
    """A function that enters a difference in the table and asserts that it is tolerated."""
    return record


def record(case: str, largest: float, mean: float, tolerance: float) -> None:
    _ROWS.append((case, largest, mean, tolerance))
    assert largest <= tolerance, f"{case}: {largest} > {tolerance}"


def pytest_terminal_summary(terminalreporter) -> None:
    if not _ROWS:
        return
    width = max(len(case) for case, *_ in _ROWS)
    terminalreporter.section("parity")
    terminalreporter.line(
        f"{'case':<{width}}  {'largest':>9}  {'mean':>9}  {'tolerance':>9}  verdict"
    )
    for case, largest, mean, tolerance in _ROWS:
        verdict = "equal" if largest <= tolerance else "DIFFERS"
        terminalreporter.line(
            f"{case:<{width}}  {largest:>9.1e}  {mean:>9.1e}  {tolerance:>9.0e}  {verdict}"
        )
