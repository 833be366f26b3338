"""The oracle itself, on cases small enough to compute by hand."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from tests.oracle import Record, differences, lake_of, trades_in
from tests.oracle_gold import half_up, volatility_pct

VALID: dict[str, object] = {"timestamp": "2024-08-09T10:00:00.000001Z", "asset": "bitcoin", "price_usd": "100"}


def record(offset: int, message: dict[str, object], topic: str = "ticks") -> Record:
    return Record(topic, 0, offset, b"key", json.dumps(message).encode())


def trade(trade_id: int, price: str, quantity: str | None, time: str) -> dict[str, object]:
    return {
        **VALID,
        "timestamp": "2024-08-09T10:05:00Z",
        "source": "binance",
        "symbol": "BTCUSDT",
        "price_usd": price,
        "quantity": quantity,
        "trade_id": trade_id,
        "event_time": time,
    }


def test_a_minute_is_summarised_in_the_order_of_its_trades_whatever_the_delivery() -> None:
    lake = lake_of(
        [
            record(0, trade(3, "10", "1", "2024-08-09T10:00:59.999999Z")),
            record(1, trade(2, "13", "2", "2024-08-09T10:00:00Z")),
            record(2, trade(1, "12", None, "2024-08-09T10:00:00Z")),
            record(3, trade(1, "12", None, "2024-08-09T10:00:00Z")),
            record(4, trade(4, "99", "1", "2024-08-09T10:01:00Z")),
        ]
    )
    assert set(lake.silver) == {f"binance:BTCUSDT:0:{number}" for number in (1, 2, 3, 4)}
    assert lake.silver["binance:BTCUSDT:0:1"].kafka_offset == 2, "among repeats the lowest offset wins"
    first = lake.price_1m["binance", "bitcoin", datetime(2024, 8, 9, 10, tzinfo=UTC)]
    assert [first.open, first.high, first.low, first.close] == [12, 13, 10, 10]
    assert first.average == Decimal("11.666666666667")
    assert [first.volume, first.vwap, first.tick_count] == [3, 12, 3]
    assert first.volatility_pct == pytest.approx(100 * (7 / 3) ** 0.5 / (35 / 3))
    assert first.last_event_time == datetime(2024, 8, 9, 10, 0, 59, 999999, tzinfo=UTC)
    assert lake.current_price["bitcoin"].event_id == "binance:BTCUSDT:0:4"


def test_the_current_price_is_the_newest_by_what_was_known_when_it_came() -> None:
    """A venue's clock that runs ahead does not win over a price received later."""
    ahead = {**trade(1, "1", None, "2024-08-09T10:00:04Z"), "timestamp": "2024-08-09T10:00:00Z"}
    later = {**trade(2, "2", None, "2024-08-09T10:00:01Z"), "timestamp": "2024-08-09T10:00:02Z"}
    assert lake_of([record(0, ahead), record(1, later)]).current_price["bitcoin"].price_usd == 2


def test_a_time_too_far_ahead_of_its_receipt_counts_in_the_minute_of_the_receipt() -> None:
    future = {**VALID, "event_time": "2024-08-10T10:00:00.000001Z"}
    lake = lake_of([record(0, future)])
    (tick,) = lake.silver.values()
    assert tick.is_future
    assert tick.event_date == date(2024, 8, 10)
    assert [row.window_start for row in lake.price_1m.values()] == [datetime(2024, 8, 9, 10, tzinfo=UTC)]
    assert not next(iter(lake_of([record(0, future)], future_tolerance=timedelta(days=1)).silver.values())).is_future


def test_a_tick_without_trade_id_is_known_by_its_producer_and_one_without_that_by_its_place() -> None:
    named = {**VALID, "producer": "a", "sequence": 7}
    lake = lake_of([record(0, named), record(1, named), record(2, VALID), record(3, VALID)])
    assert set(lake.silver) == {"a:7", "ticks:0:2", "ticks:0:3"}
    tick = lake.silver["ticks:0:2"]
    assert (tick.source, tick.symbol, tick.quote, tick.trade_epoch) == ("unknown", "bitcoin", "USD", 0)
    assert (tick.event_time, tick.quantity, tick.trade_id) == (tick.received_at, None, None)


def test_only_the_chosen_symbol_of_an_asset_feeds_gold() -> None:
    one, other = ({**VALID, "source": "s", "symbol": symbol} for symbol in ("BTCUSDT", "BTCUSDC"))
    lake = lake_of([record(0, one), record(1, other)], gold_symbols={"s:bitcoin": "BTCUSDC"})
    assert len(lake.silver) == 2
    assert [row.tick_count for row in lake.price_1m.values()] == [1]
    assert lake.current_price["bitcoin"].event_id == "ticks:0:1"


def test_only_the_own_quote_of_a_venue_feeds_gold() -> None:
    ticks = [
        {**VALID, "source": source, "symbol": f"BTC{quote}", "quote": quote}
        for source in ("kraken", "binance", "s")
        for quote in ("USD", "USDT")
    ]
    lake = lake_of([record(number, tick) for number, tick in enumerate(ticks)])
    assert len(lake.silver) == 6
    assert {row.source: row.tick_count for row in lake.price_1m.values()} == {"kraken": 1, "binance": 2, "s": 2}
    chosen = lake_of([record(0, ticks[0]), record(1, ticks[1])], gold_symbols={"kraken:bitcoin": "BTCUSDT"})
    assert chosen.current_price["bitcoin"].event_id == "ticks:0:1"


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("type", {"price_usd": True}),
        ("type", {"trade_id": "12"}),
        ("type", {"asset": 5}),
        ("missing", {"price_usd": None}),
        ("missing", {"timestamp": None}),
        ("name", {"asset": "bit coin"}),
        ("name", {"symbol": ""}),
        ("timestamp", {"timestamp": "2024-08-09T10:00:00"}),
        ("timestamp", {"timestamp": "2024-13-09T10:00:00Z"}),
        ("event_time", {"event_time": "noon"}),
        ("price", {"price_usd": "0"}),
        ("price", {"price_usd": "-1"}),
        ("price", {"price_usd": "NaN"}),
        ("precision", {"price_usd": "1.0000000000001"}),
        ("precision", {"price_usd": "1e-30"}),
        ("precision", {"quantity": "0.0000000000001"}),
        ("range", {"price_usd": "1" + 30 * "0"}),
        ("price", {"price_usd": "1e999999999"}),
        ("price", {"price_usd": "1" + 128 * "0"}),
        ("range", {"trade_id": 10**18}),
        ("range", {"sequence": -1}),
        ("range", {"trade_epoch": 2**70}),
        ("timestamp", {"timestamp": "1969-12-31T23:59:59.999999Z"}),
        ("timestamp", {"timestamp": "3000-01-01T00:00:00Z"}),
        ("event_time", {"event_time": "1970-01-01T00:00:00+00:01"}),
        ("range", {"price_usd": "1" + 15 * "0", "quantity": "100000"}),
        ("quantity", {"quantity": "-1"}),
        ("quantity", {"quantity": "many"}),
    ],
)
def test_a_record_that_breaks_a_rule_is_quarantined_under_it(rule: str, change: dict[str, object]) -> None:
    lake = lake_of([record(0, {**VALID, **change})])
    assert [row.rule for row in lake.quarantine.values()] == [rule]
    assert not lake.silver
    assert len(lake.bronze) == 1


@pytest.mark.parametrize(
    "value", [None, b"", b"{", b'{"a": 1} x', b"\xff", b"[]", b"7", b'{"a":1,"a":1}', b'{"a":NaN}']
)
def test_a_record_that_is_no_json_object_is_quarantined(value: bytes | None) -> None:
    lake = lake_of([Record("ticks", 0, 0, None, value)])
    assert [row.rule for row in lake.quarantine.values()] == ["json"]


def test_a_receipt_is_at_most_a_day_ahead_of_the_time_at_which_bronze_took_the_record() -> None:
    taken = datetime(2024, 8, 8, 10, 0, 0, 1, tzinfo=UTC)
    for ingested_at, rules in ((taken, []), (taken - timedelta(microseconds=1), ["timestamp"])):
        lake = lake_of([replace(record(0, VALID), ingested_at=ingested_at)])
        assert [row.rule for row in lake.quarantine.values()] == rules


def test_a_reject_is_quarantined_as_such() -> None:
    assert [row.rule for row in lake_of([record(0, VALID, "rejects")]).quarantine.values()] == ["reject"]


def test_tiny_and_huge_prices_keep_every_digit() -> None:
    prices = ["0.000000000001", "9999999999999999.999999999999", "1.5000000000000000"]
    lake = lake_of([record(offset, {**VALID, "price_usd": price}) for offset, price in enumerate(prices)])
    assert [format(tick.price_usd, "f") for tick in lake.silver.values()] == [*prices[:2], "1.500000000000"]
    (minute,) = lake.price_1m.values()
    assert minute.average == Decimal("3333333333333333.833333333333")


def test_a_numeric_price_keeps_its_digits() -> None:
    value = json.dumps(VALID).replace('"100"', "61685.990000000001").encode()
    (tick,) = lake_of([Record("ticks", 0, 0, None, value)]).silver.values()
    assert tick.price_usd == Decimal("61685.990000000001")


def test_rounding_is_half_up_and_volatility_is_the_sample_s() -> None:
    assert half_up(Fraction(5, 10**13)) == Decimal("0.000000000001")
    assert half_up(Fraction(4, 10**13)) == 0
    assert volatility_pct([1]) is None
    assert volatility_pct([1, 3]) == pytest.approx(100 * 2**0.5 / 2)


def test_trades_are_read_from_a_recording_of_the_combined_stream(tmp_path: Path) -> None:
    recording = tmp_path / "recording.gz"
    data = {"e": "trade", "E": 1, "s": "ETHUSDT", "t": 9, "p": "2680.10000000", "q": "0.5", "T": 1723161601273}
    frames = [{"stream": "ethusdt@trade", "data": data}, {"stream": "ethusdt@bookTicker", "data": {"u": 1}}]
    with gzip.open(recording, "wt") as lines:
        lines.writelines(f"1723161600001658384 {json.dumps(frame)}\n" for frame in frames)
    (found,) = trades_in(recording)
    assert (found.asset, found.price_usd, found.trade_id) == ("ethereum", Decimal("2680.1"), 9)
    assert found.event_time == datetime(2024, 8, 9, 0, 0, 1, 273000, tzinfo=UTC)


def test_differences_name_the_row_and_the_column() -> None:
    expected = lake_of([record(0, VALID)]).silver
    (key,) = expected
    row = dict(vars(expected[key]))
    assert differences(expected, {key: row}) == []
    assert differences(expected, {}) == ["missing: ticks:0:0"]
    assert "price_usd" in differences(expected, {key: {**row, "price_usd": Decimal("100.000000000001")}})[0]
    assert "price_usd" in differences(expected, {key: {**row, "price_usd": 100.0}})[0]
    assert len(differences(expected, {**{str(n): row for n in range(9)}}, limit=3)) == 4
