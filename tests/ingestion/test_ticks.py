"""The message contract: exact digits, exact times, one order of fields."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestion.ticks import (
    END_OF_TIME_NS,
    RAW_LIMIT,
    Reject,
    Tick,
    is_price,
    is_quantity,
    shortened_reject,
    utc,
)

TICK = Tick(
    received_ns=1_723_161_600_164_378_285,
    asset="bitcoin",
    price_usd="61685.99000000",
    quote="USDT",
    source="binance",
    symbol="BTCUSDT",
    event_ns=1_723_161_601_437_000_000,
    quantity="0.00017000",
    trade_id=3735693016,
)


def test_a_tick_is_this_message() -> None:
    assert TICK.to_json("a1b2", 7) == (
        b'{"timestamp":"2024-08-09T00:00:00.164378Z","asset":"bitcoin","price_usd":"61685.99000000","quote":"USDT",'
        b'"source":"binance","symbol":"BTCUSDT","event_time":"2024-08-09T00:00:01.437000Z","quantity":"0.00017000",'
        b'"trade_id":3735693016,"trade_epoch":0,"producer":"a1b2","sequence":7}'
    )
    assert TICK.key == b"binance:BTCUSDT"


def test_what_a_venue_does_not_tell_is_null() -> None:
    message = json.loads(Tick(0, "bitcoin", "1", "USD", "coincap", "bitcoin").to_json("p", 1))
    assert message["event_time"] is message["quantity"] is message["trade_id"] is None
    assert message["timestamp"] == "1970-01-01T00:00:00.000000Z"


@given(st.integers(min_value=0, max_value=END_OF_TIME_NS - 1))
def test_a_time_is_exact_to_the_microsecond(nanoseconds: int) -> None:
    text = utc(nanoseconds)
    assert len(text) == len("2024-08-09T00:00:00.164378Z")
    since = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z") - datetime(1970, 1, 1, tzinfo=UTC)
    assert since // timedelta(microseconds=1) == nanoseconds // 1000


@pytest.mark.parametrize("text", ["1", "0.000000000001", "9999999999999999.999999999999", "0016.50", "61685.99000000"])
def test_a_price_is_a_plain_decimal_above_zero(text: str) -> None:
    assert is_price(text)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.0", "000", "-1", "+1", " 1", "1 ", "1\n", "1.", ".5", "1,5", "1e3", "NaN", "1_000", "0.0000000000001",
     "10000000000000000", "\u0661", 1, 1.5, None],
)  # fmt: skip
def test_anything_else_is_no_price(text: object) -> None:
    assert not is_price(text)


def test_a_quantity_may_be_zero() -> None:
    assert is_quantity("0.00000000")
    assert not is_quantity("-0.1")


def test_a_reject_carries_the_beginning_of_the_frame_as_text() -> None:
    raw = b'quote " backslash \\ byte \xff ' + b"x" * (2 * RAW_LIMIT)
    message = json.loads(Reject(1_723_161_600_164_378_285, "binance", "why", raw, "BTCUSDT", 5).to_json())
    assert list(message) == ["source", "reason", "received_at", "symbol", "trade_id", "raw"]
    assert message["received_at"] == "2024-08-09T00:00:00.164378Z"
    assert message["raw"].startswith('quote " backslash \\ byte \\xff xxx')
    assert len(message["raw"]) == RAW_LIMIT + len("\\xff") - 1


def test_the_largest_reject_fits_a_kafka_message() -> None:
    for worst in (b"\xff", b"\x00", b'"', "\u20ac".encode()):
        assert len(Reject(0, "binance", "why", worst * RAW_LIMIT).to_json()) < 1_000_000


@pytest.mark.parametrize("most", [200, 1_024, 65_536, 1 << 20])
def test_a_shortened_reject_keeps_all_but_a_part_of_its_frame(most: int) -> None:
    for worst in (b"\xff", b"\x00", b'"', "\u20ac".encode(), "\U0001f600".encode()):
        whole = Reject(0, "binance", "why", worst * RAW_LIMIT, "BTCUSDT", 5).to_json()
        short = shortened_reject(whole, most)
        assert len(short) <= most
        before, after = json.loads(whole), json.loads(short)
        assert before["raw"].startswith(after.pop("raw"))
        assert after.items() < before.items()


def test_what_is_no_reject_is_not_shortened() -> None:
    for value in (TICK.to_json("p", 1), b"no JSON", b"[]", b'{"raw":5}'):
        assert shortened_reject(value, 1) == value
