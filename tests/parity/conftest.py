"""One table of all comparisons: case, largest and mean difference, tolerance, verdict."""

from collections.abc import Callable

import numpy as np
import pytest

# Rows are properties of their tests: those come back from the processes that run them.
_PROPERTY = "parity"


@pytest.fixture
def compare(enter: Callable[..., None]) -> Callable[..., None]:
    """A function that compares two arrays and enters the result in the table.

    compare(case, actual, expected, tolerance, scale=1.0): differences are divided by `scale` and
    must be at most `tolerance`.
    """

    def check(case: str, actual, expected, tolerance: float, scale: float = 1.0) -> None:
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, case
        difference = np.abs(actual - expected) / scale
        enter(case, float(difference.max()), float(difference.mean()), tolerance)

    return check


@pytest.fixture
def enter(
    record_property: Callable[[str, object], None],
) -> Callable[[str, float, float, float], None]:
    """A function that enters a difference in the table and asserts that it is tolerated."""

    def record(case: str, largest: float, mean: float, tolerance: float) -> None:
        # Plain numbers, as other processes can send them.
        row = (case, float(largest), float(mean), float(tolerance))
        record_property(_PROPERTY, row)
        assert largest <= tolerance, f"{case}: {largest} > {tolerance}"

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = (
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
    )
    rows = sorted(
        row
        for report in reports
        if report.when == "call"
        for name, row in report.user_properties
        if name == _PROPERTY
    )
    if not rows:
        return
    width = max(len(case) for case, *_ in rows)
    terminalreporter.section("parity")
    terminalreporter.line(
        f"{'case':<{width}}  {'largest':>9}  {'mean':>9}  {'tolerance':>9}  verdict"
    )
    for case, largest, mean, tolerance in rows:
        verdict = "equal" if largest <= tolerance else "DIFFERS"
        terminalreporter.line(
            f"{case:<{width}}  {largest:>9.1e}  {mean:>9.1e}  {tolerance:>9.0e}  {verdict}"
        )
