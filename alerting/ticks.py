"""A record of topic `ticks` as the alerts' rule wants it: the same records are ticks as in lake/ticks.py."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

from lake.alerts import AlertTick
from lake.summaries import EXACT, LARGEST, SMALLEST, Pair, to_micros
from lake.ticks import INTEGERS, NAME, NUMBER, STRINGS, TIME


class _Number(str):
    """A number of JSON as it is written: no text, and through no float."""


class NotATick(ValueError):
    """The record goes to silver.quarantine, where its reason stands."""


@dataclass(frozen=True)
class Told:
    """A tick, whose it is, and its venue's name for it."""

    pair: Pair
    symbol: str
    tick: AlertTick


def read(value: bytes | None, place: str, future_tolerance_seconds: float) -> Told:
    """place: topic:partition:offset, the event_id of a tick that has no better one. Raises NotATick."""
    try:
        row = json.loads((value or b"").decode("utf-8"), parse_float=_Number, parse_constant=_Number)
    except (ValueError, RecursionError):
        raise NotATick("json") from None
    if not isinstance(row, dict):
        raise NotATick("json")
    _require(all(row.get(name) is None or type(row[name]) is str for name in STRINGS))
    _require(all(row.get(name) is None or type(row[name]) is int for name in INTEGERS))
    price = row.get("price_usd")
    _require(isinstance(price, str) or type(price) is int)
    _require(type(row.get("timestamp")) is str and type(row.get("asset")) is str)
    asset, source, producer = row["asset"], _or(row.get("source"), "unknown"), row.get("producer")
    symbol = _or(row.get("symbol"), asset)
    names = (asset, source, symbol, _or(row.get("quote"), "USD"), _or(producer, "none"))
    _require(all(re.fullmatch(NAME, name) for name in names))
    received_at = _time(row["timestamp"])
    event_time = received_at if row.get("event_time") is None else _time(row["event_time"])
    exact = _number(str(price))
    _require(exact > 0)
    if row.get("quantity") is not None:
        _require(EXACT.multiply(exact, _number(row["quantity"])) < Decimal(10) ** 20)
    ahead = event_time - received_at > future_tolerance_seconds * 1_000_000
    if row.get("trade_id") is not None:
        event_id = f"{source}:{symbol}:{row.get('trade_epoch') or 0}:{row['trade_id']}"
    elif producer is not None and row.get("sequence") is not None:
        event_id = f"{producer}:{row['sequence']}"
    else:
        event_id = place
    return Told((source, asset), symbol, AlertTick(received_at if ahead else event_time, exact, event_id))


def _or(text: str | None, default: str) -> str:
    return default if text is None else text


def _require(holds: bool) -> None:
    if not holds:
        raise NotATick("a field is missing, or not what it should be")


def _time(text: str) -> int:
    try:
        _require(re.fullmatch(TIME, text) is not None)
        return to_micros(datetime.fromisoformat(text).astimezone(UTC))
    except (ValueError, OverflowError):
        raise NotATick("time") from None


def _number(text: str) -> Decimal:
    try:
        _require(re.fullmatch(NUMBER, text) is not None)
        number = Decimal(text)
    except InvalidOperation:
        raise NotATick("number") from None
    _require(0 <= number < LARGEST and EXACT.quantize(number, SMALLEST) == number)
    return number
