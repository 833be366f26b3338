"""One record: promise 5, a record that is no tick is known, with its rule, whatever its bytes are."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from lake.contract import QUOTED_LENGTH, REASON_LENGTH, TickRules
from lake.silver.gaps import Gap
from lake.silver.judge import Rejection, Tick, judge
from lake.tables import SILVER_GAPS, SILVER_TICKS
from lake.times import to_micros, to_time
from tests.oracle import Tick as ExpectedTick
from tests.oracle import row_of, trade_named_by
from tests.ticks import CASES, GAP, INGESTED_AT, TICK, Case, compact, with_raw

RULES = TickRules("rejects", "gaps", 5.0)


def judged(value: bytes | None, topic: str = "ticks") -> Tick | Rejection | Gap:
    return judge(value, topic, 0, 7, INGESTED_AT, RULES)


def as_expected(tick: Tick) -> ExpectedTick:
    """A tick in the oracle's words."""
    row = {field.name: getattr(tick, field.name) for field in fields(tick)}
    return ExpectedTick(**{**row, "event_time": to_time(tick.event_time), "received_at": to_time(tick.received_at)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_record_breaks_this_rule(case: Case) -> None:
    verdict = judged(case.value, case.topic)
    expected = row_of(case.record(7))
    assert (verdict.rule if isinstance(verdict, Rejection) else None) == case.rule
    if isinstance(verdict, Tick):
        assert as_expected(verdict) == expected
        assert isinstance(expected, ExpectedTick)
        assert to_time(verdict.gold_time) == expected.gold_time
    elif isinstance(verdict, Rejection):
        assert expected is not None
        assert getattr(expected, "rule", None) == case.rule
        assert verdict.instrument_ids == trade_named_by(case.value)
        assert 0 < len(verdict.reason.encode()) <= 4 * REASON_LENGTH
    else:
        assert expected is None


def test_a_tick_has_silvers_columns_and_a_report_those_of_the_gaps() -> None:
    names = [field.name for field in fields(Tick)]
    assert names == [name for name in SILVER_TICKS.column_names if name != "is_late"]
    assert [field.name for field in fields(Gap)] == list(SILVER_GAPS.column_names)
    assert not hasattr(judged(compact(TICK)), "__dict__")


def test_a_tick_is_what_the_message_says_with_defaults_for_what_it_leaves_out() -> None:
    tick = judged(b'{"timestamp":"2024-08-09T02:00:01.5+02:00","asset":"bitcoin","price_usd":1e2,"event_time":null}')
    assert tick == Tick(
        event_id="ticks:0:7",
        source="unknown",
        symbol="bitcoin",
        asset="bitcoin",
        quote="USD",
        price_usd=Decimal(100),
        quantity=None,
        trade_id=None,
        trade_epoch=0,
        event_time=to_micros(datetime(2024, 8, 9, 0, 0, 1, 500_000, tzinfo=UTC)),
        received_at=to_micros(datetime(2024, 8, 9, 0, 0, 1, 500_000, tzinfo=UTC)),
        producer=None,
        sequence=None,
        kafka_partition=0,
        kafka_offset=7,
        is_future=False,
        event_date=date(2024, 8, 9),
    )


def test_a_reason_names_the_field_and_quotes_little_of_it() -> None:
    reasons = {
        "price_usd": "price_usd xx is not a number above 0",
        "asset": "asset x x is not a name of 1 to 64 of A-Z a-z 0-9 / . _ -",
    }
    for name, reason in reasons.items():
        value = reason.removeprefix(f"{name} ").partition(" is not")[0]
        verdict = judged(compact({**TICK, name: value}))
        assert isinstance(verdict, Rejection)
        assert verdict.reason == reason
    for name in TICK:
        verdict = judged(compact({**TICK, name: "\ud800" + "x!" * 5_000}))
        assert isinstance(verdict, Rejection)
        assert verdict.reason.startswith(name)
        assert verdict.reason.count("x!") <= QUOTED_LENGTH / 2


def test_a_reject_has_its_feeds_reason() -> None:
    reasons = {
        b'{"reason": "no price"}': "no price",
        b'{"reason": 7}': "rejected by its feed",
        b"{": "rejected by its feed",
        compact({"reason": "x" * 2_000}): "x" * REASON_LENGTH,
        b'{"reason": "\\ud800"}': "\\ud800",
    }
    for value, reason in reasons.items():
        assert judged(value, "rejects") == Rejection("reject", reason)


def test_a_rejected_record_names_its_trade_only_if_no_part_of_its_name_is_wrong() -> None:
    def named(**changes: object) -> object:
        verdict = judged(compact({**TICK, "price_usd": "x", **changes}))
        assert isinstance(verdict, Rejection)
        return verdict.instrument_ids

    assert named() == ("binance", "BTCUSDT", 0, 1)
    assert named(trade_epoch=None, trade_id=5) == ("binance", "BTCUSDT", 0, 5)
    assert named(trade_epoch=3) == ("binance", "BTCUSDT", 3, 1)
    wrong: dict[str, tuple[object, ...]] = {
        "source": (None, "", 5),
        "symbol": (None, "a b"),
        "trade_id": (None, "1", 1.0, -1, 10**18),
        "trade_epoch": ("1", -1, 10**18),
    }
    for name, values in wrong.items():
        for value in values:
            assert named(**{name: value}) is None, (name, value)
    reject = judged(b'{"reason": "no price", "source": "s", "symbol": "y", "trade_id": 4}', "rejects")
    assert reject == Rejection("reject", "no price", ("s", "y", 0, 4))


def test_a_report_has_times_in_utc() -> None:
    report = judged(
        compact({**GAP, "detected_at": "2024-08-09T02:00:00+02:00", "reason": "\ud800" + "x" * 5_000}), "gaps"
    )
    assert isinstance(report, Gap)
    assert report.detected_at == datetime(2024, 8, 9, tzinfo=UTC)
    assert report.detected_at.utcoffset() == timedelta()
    assert (report.first_missing, report.last_missing, report.filled_at) == (7, 9, None)
    assert report.reason == "\\ud800" + "x" * (REASON_LENGTH - 1)


def test_the_tolerances_are_the_settings() -> None:
    value = compact(TICK)
    strict = TickRules("rejects", "gaps", 0.999432, 0.5)
    tick = judge(value, "ticks", 0, 0, datetime(2024, 8, 9, 0, 0, 0, 734_567, tzinfo=UTC), strict)
    assert isinstance(tick, Tick)
    assert tick.is_future
    assert tick.gold_time == tick.received_at
    late = judge(value, "ticks", 0, 0, datetime(2024, 8, 9, 0, 0, 0, 734_566, tzinfo=UTC), strict)
    assert isinstance(late, Rejection)
    assert late.rule == "timestamp"
    assert judge(value, "frames", 0, 0, INGESTED_AT, TickRules("frames", "gaps", 5)) == Rejection(
        "reject", "rejected by its feed", ("binance", "BTCUSDT", 0, 1)
    )


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "a number of ones": lambda size: with_raw("price_usd", f'"{"1" * size}x"'),
    "a number with a point": lambda size: with_raw("quantity", f'"{"1" * (size // 2)}.{"1" * (size // 2)}x"'),
    "a JSON number": lambda size: with_raw("price_usd", "1" * size),
    "a fraction": lambda size: with_raw("price_usd", "0." + "1" * size),
    "an id": lambda size: with_raw("trade_id", "1" * size),
    "a time": lambda size: with_raw("timestamp", f'"2024-08-09T00:00:01.{"1" * size}Z"'),
    "a time of its venue": lambda size: with_raw("event_time", f'"{"2024-08-09T" * (size // 11)}"'),
    "a name": lambda size: with_raw("asset", f'"{"a" * size}!"'),
    "open brackets": lambda size: with_raw("mood", "[" * size),
    "quotes without an end": lambda size: b'{"' + b"[" * 70 + b'\\"' * (size // 2),
    "brackets side by side": lambda size: with_raw("price_usd", "[" + "[]," * (size // 3)),
    "open quotes": lambda size: b'{"[' * (size // 3),
    "keys": lambda size: b"{" + b",".join(b'"%d":0' % number for number in range(size // 10)) + b"}",
    "spaces": lambda size: compact(TICK) + b" " * size + b"x",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_value_is_judged_in_linear_time(kind: str) -> None:
    """Ten times the length takes some ten times as long, where one that is quadratic takes a hundred times."""

    def seconds(size: int) -> float:
        value, best = HOSTILE[kind](size), float("inf")
        # The collector looks through all objects of this test run, as often as many new ones are made.
        gc.disable()
        try:
            for _ in range(5):
                begin = time.process_time()
                assert isinstance(judged(value), Rejection)
                best = min(best, time.process_time() - begin)
        finally:
            gc.enable()
        return best

    assert seconds(1_000_000) < 40 * max(seconds(100_000), 0.000_2)
