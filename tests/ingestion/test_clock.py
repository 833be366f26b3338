"""A clock that is set while we run moves no tick."""

import pytest

from ingestion.clock import Clock
from ingestion.gaps import GapTracker
from ingestion.ticks import Tick


class Machine:
    """A machine's two clocks, in nanoseconds."""

    wall = 1_700_000_000_000_000_000
    elapsed = 5_000_000_000

    def pass_time(self, nanoseconds: int) -> None:
        self.wall += nanoseconds
        self.elapsed += nanoseconds


def test_a_stepped_clock_is_noticed_once_and_moves_no_receipt_time() -> None:
    machine = Machine()
    clock = Clock(lambda: machine.wall, lambda: machine.elapsed)
    machine.pass_time(1_000_000_000)
    assert clock.now_ns() == 1_700_000_001_000_000_000
    assert clock.check() == 0

    machine.wall -= 3_600_000_000_000
    machine.pass_time(1_000_000_000)
    assert clock.now_ns() == 1_700_000_002_000_000_000
    assert clock.check() == -3_600_000_000_000
    assert clock.check() == 0


def test_a_clock_that_is_slowly_kept_right_is_no_step() -> None:
    machine = Machine()
    clock = Clock(lambda: machine.wall, lambda: machine.elapsed)
    for _ in range(100):
        machine.pass_time(5_000_000_000)
        machine.wall += 20_000_000
        assert clock.check() == 0


def test_the_real_clock_tells_the_present() -> None:
    clock = Clock()
    first = clock.now_ns()
    assert first <= clock.now_ns()
    assert clock.check() == 0


SECOND, HOUR = 10**9, 3_600 * 10**9


def watched(machine: Machine, clock: Clock, seconds: int) -> int:
    """What `take_over` moves in so many seconds."""
    moved = 0
    for _ in range(seconds):
        machine.pass_time(SECOND)
        moved += clock.take_over()
    return moved


@pytest.mark.parametrize("step", [-HOUR, HOUR, 365 * 24 * HOUR, SECOND])
def test_a_step_that_persists_is_taken_over_once(step: int) -> None:
    machine = Machine()
    clock = Clock(lambda: machine.wall, lambda: machine.elapsed, 60.0)
    assert watched(machine, clock, 100) == 0
    machine.wall += step
    assert clock.ahead_ns == step
    assert watched(machine, clock, 59) == 0
    assert clock.now_ns() == machine.wall - step
    assert watched(machine, clock, 10) == step
    assert clock.now_ns() == machine.wall
    assert clock.ahead_ns == 0
    assert watched(machine, clock, 1_000) == 0


def test_a_clock_that_was_stepped_for_a_moment_moves_nothing_however_often() -> None:
    machine = Machine()
    clock = Clock(lambda: machine.wall, lambda: machine.elapsed, 60.0)
    for _ in range(10):
        machine.wall += HOUR
        assert watched(machine, clock, 50) == 0
        machine.wall -= HOUR
        assert watched(machine, clock, 5) == 0
    # Nor one that is set again and again: it is not known which of them is right.
    for _ in range(10):
        machine.wall += HOUR
        assert watched(machine, clock, 50) == 0


def test_a_hole_that_waits_to_be_reported_waits_no_longer_after_a_step_back() -> None:
    """Promise 4."""
    tracker = GapTracker()
    for number in (1, 2, 5):
        tracker.observe(Tick(10**18, "bitcoin", "1", "USDT", "binance", "BTCUSDT", 10**18, "1", number))
    tracker.mentioned("binance", "BTCUSDT", 9, 10**18)
    tracker.clock_moved(-HOUR)
    (first, second) = tracker.changes(10**18 - HOUR + 3 * SECOND)
    assert [(gap.first_missing, gap.last_missing) for gap in (first, second)] == [(3, 4), (6, 9)]
