"""Nobody is measured who did another job than the others."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from benchmarks.backlog import WrongResult, check
from benchmarks.contestants import Windows

AT = datetime(2023, 11, 14, 22, 13, tzinfo=UTC)


def minutes(**figures: float) -> Windows:
    return {("binance", "bitcoin", AT): {"high": 2.5, "low": 1.5, "volume": 0.3, "tick_count": 10.0} | figures}


def test_figures_that_only_one_has_and_the_last_digits_of_floats_are_no_difference() -> None:
    check("floor", minutes(volume=0.30000000000000004, open=2.0), minutes(), 10)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (minutes(tick_count=9.0), "minutes have 9 ticks, not 10"),
        (minutes(high=2.6), "high is 2.6 of floor, 2.5 before it"),
        ({("binance", "ethereum", AT): {"tick_count": 10.0}}, "floor has other minutes"),
    ],
)
def test_any_other_difference_is_named(windows: Windows, message: str) -> None:
    with pytest.raises(WrongResult, match=message):
        check("floor", windows, minutes(), 10)
