"""Promise 4 across a crash: what the spool has taken is known again, and so is what was reported."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ingestion.gaps import Gap, GapTracker
from ingestion.intake import Topics
from ingestion.recovery import recover_tracker
from ingestion.spool import Spool
from ingestion.state import State
from ingestion.ticks import Tick

TOPICS = Topics("ticks", "rejects", "gaps")
NOW = 1_723_161_600_000_000_000


def tick(trade_id: int) -> Tick:
    made = NOW + trade_id * 1_000_000
    return Tick(made, "bitcoin", "1.5", "USDT", "binance", "BTCUSDT", event_ns=made, quantity="2", trade_id=trade_id)


def after_a_crash(folder: Path, taken: list[Tick | Gap]) -> GapTracker:
    """The tracker of an ingester that was killed when its spool had taken these, and had never saved its state."""

    async def run() -> GapTracker:
        spool = Spool(folder, 0.0, 1 << 30)
        writing = asyncio.create_task(spool.run())
        for number, item in enumerate(taken):
            value = item.to_json("p", number) if isinstance(item, Tick) else item.to_json()
            spool.append(TOPICS.ticks if isinstance(item, Tick) else TOPICS.gaps, item.key, value)
        spool.stop()
        await writing
        try:
            return recover_tracker(State.load(folder), spool, TOPICS)
        finally:
            spool.close()

    return asyncio.run(run())


def reported(ids: list[int]) -> list[Gap]:
    """What a tracker reports that has seen these trades."""
    tracker = GapTracker()
    for trade_id in ids:
        tracker.observe(tick(trade_id))
    return tracker.changes(NOW + 10**12)


def brief(rows: list[Gap]) -> list[tuple[int | None, int | None, str]]:
    return [(row.first_missing, row.last_missing, row.status) for row in rows]


def test_a_gap_that_was_reported_and_filled_before_the_crash_is_reported_as_filled(tmp_path: Path) -> None:
    (gap,) = reported([1, 2, 6, 7])
    tracker = after_a_crash(tmp_path, [*map(tick, (1, 2, 6, 7)), gap, *map(tick, (3, 4, 5))])
    assert brief(tracker.changes(NOW + 10**12)) == [(3, 5, "filled")]
    assert tracker.open_gap_count("binance") == 0


def test_a_gap_that_was_reported_is_not_reported_again_and_stays_open(tmp_path: Path) -> None:
    (gap,) = reported([1, 2, 6, 7])
    tracker = after_a_crash(tmp_path, [*map(tick, (1, 2, 6, 7)), gap])
    assert tracker.changes(NOW + 10**12) == []
    assert tracker.open_gaps()[0][0] == gap


def test_a_gap_that_was_given_up_is_not_taken_up_again(tmp_path: Path) -> None:
    (gap,) = reported([1, 2, 6, 7])
    tracker = GapTracker()
    for trade_id in (1, 2, 6, 7):
        tracker.observe(tick(trade_id))
    tracker.changes(NOW + 10**12)
    (given_up,) = tracker.give_up(gap, "the venue forgets", NOW)
    again = after_a_crash(tmp_path, [*map(tick, (1, 2, 6, 7)), gap, given_up])
    assert again.changes(NOW + 10**12) == []
    assert again.open_gaps() == []


def test_what_was_split_off_is_reported_even_if_its_row_was_lost(tmp_path: Path) -> None:
    (gap,) = reported([1, 2, 6, 7])
    tracker = GapTracker()
    for trade_id in (1, 2, 6, 7):
        tracker.observe(tick(trade_id))
    tracker.changes(NOW + 10**12)
    tracker.observe_backfilled(tick(3), 0)
    filled, _ = tracker.changes(NOW + 10**12)
    again = after_a_crash(tmp_path, [*map(tick, (1, 2, 6, 7)), gap, tick(3), filled])
    assert brief(again.changes(NOW + 10**12)) == [(4, 5, "open")]
