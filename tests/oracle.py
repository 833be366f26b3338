"""What the tables must hold, computed from Kafka's records with plain Python, decimals and fractions.

No Spark and nothing of lake/, so that a mistake there cannot hide here. `lake_of` takes the records as delivered and
returns the rows by the contract: those of bronze and silver here, gold's by tests/oracle_gold.py. `trades_in` reads a
recording of Binance's combined stream without ingestion's code.
Not computed, because they depend on when the job ran: updated_at, ingested_at, quarantined_at, is_late.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

from tests.oracle_gold import (
    DIGITS_AFTER_POINT,
    MINUTE,
    Alert,
    CurrentPrice,
    GoldRow,
    Mover,
    PriceWindow,
    RollingPrice,
    alerts_of,
    current_prices_of,
    half_up,
    rolling_prices_of,
    top_movers_of,
    windows_of,
)

NAME = re.compile(r"[A-Za-z0-9/._-]{1,64}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
DIGITS_BEFORE_POINT = 16
NOTIONAL_LIMIT = 10**20
ASSETS = {
    "BTCUSDT": "bitcoin",
    "ETHUSDT": "ethereum",
    "ADAUSDT": "cardano",
    "SOLUSDT": "solana",
    "DOGEUSDT": "dogecoin",
}

Json = None | bool | int | str | Decimal | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Record:
    """A Kafka record as delivered."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    kafka_timestamp: datetime = datetime(2024, 1, 1, tzinfo=UTC)

    @property
    def place(self) -> tuple[str, int, int]:
        return self.topic, self.partition, self.offset


@dataclass(frozen=True)
class Tick:
    """A row of silver.ticks, without is_late."""

    event_id: str
    source: str
    symbol: str
    asset: str
    quote: str
    price_usd: Decimal
    quantity: Decimal | None
    trade_id: int | None
    trade_epoch: int
    event_time: datetime
    received_at: datetime
    producer: str | None
    sequence: int | None
    kafka_partition: int
    kafka_offset: int
    is_future: bool
    event_date: date

    @property
    def gold_time(self) -> datetime:
        return self.received_at if self.is_future else self.event_time


@dataclass(frozen=True)
class Quarantined:
    """A row of silver.quarantine, without its reason in words and its time."""

    value: bytes | None
    rule: str
    topic: str
    partition: int
    offset: int


Row = Record | Tick | Quarantined | GoldRow


@dataclass
class Lake:
    """The expected tables, each by its key."""

    bronze: dict[Hashable, Record] = field(default_factory=dict)
    silver: dict[Hashable, Tick] = field(default_factory=dict)
    quarantine: dict[Hashable, Quarantined] = field(default_factory=dict)
    price_1m: dict[Hashable, PriceWindow] = field(default_factory=dict)
    price_5m: dict[Hashable, PriceWindow] = field(default_factory=dict)
    price_1h: dict[Hashable, PriceWindow] = field(default_factory=dict)
    price_1d: dict[Hashable, PriceWindow] = field(default_factory=dict)
    rolling_price: dict[Hashable, RollingPrice] = field(default_factory=dict)
    current_price: dict[Hashable, CurrentPrice] = field(default_factory=dict)
    alerts: dict[Hashable, Alert] = field(default_factory=dict)
    top_movers: dict[Hashable, Mover] = field(default_factory=dict)


class NotATick(ValueError):
    """A record that goes to quarantine; the message is the rule that it breaks."""


def lake_of(
    records: Iterable[Record],
    *,
    future_tolerance: timedelta = timedelta(seconds=5),
    ticks_topic: str = "ticks",
    gaps_topic: str = "gaps",
    gold_symbols: dict[str, str] | None = None,
    volatility: timedelta = MINUTE,
    alert_threshold_pct: float = 2.0,
    alert_window: timedelta = timedelta(seconds=10),
    alert_cooldown: timedelta = timedelta(seconds=60),
) -> Lake:
    """The tables that these records make. Among repeats the lowest offset wins."""
    lake = Lake()
    for record in sorted(records, key=lambda record: record.place):
        lake.bronze[record.place] = record
        if record.topic == gaps_topic and _is_gap(record.value):
            continue
        try:
            if record.topic != ticks_topic:
                raise NotATick("gap" if record.topic == gaps_topic else "reject")
            tick = tick_of(record, future_tolerance)
        except NotATick as error:
            lake.quarantine[record.place] = Quarantined(record.value, str(error), *record.place)
        else:
            lake.silver.setdefault(tick.event_id, tick)
    chosen = gold_symbols or {}
    gold = [
        tick for tick in lake.silver.values() if chosen.get(f"{tick.source}:{tick.asset}", tick.symbol) == tick.symbol
    ]
    lake.price_1m = _by_start(windows_of(gold, MINUTE))
    lake.price_5m = _by_start(windows_of(gold, timedelta(minutes=5)))
    lake.price_1h = _by_start(windows_of(gold, timedelta(hours=1)))
    lake.price_1d = _by_start(windows_of(gold, timedelta(days=1)))
    lake.rolling_price = {(row.source, row.asset, row.as_of): row for row in rolling_prices_of(gold, volatility)}
    lake.current_price = {row.asset: row for row in current_prices_of(gold)}
    alerts = alerts_of(gold, threshold_pct=alert_threshold_pct, window=alert_window, cooldown=alert_cooldown)
    lake.alerts = {row.alert_id: row for row in alerts}
    lake.top_movers = {(row.window_start, row.rank): row for row in top_movers_of(lake.price_1m.values())}
    return lake


def minutes_of(ticks: Iterable[Tick]) -> Iterator[PriceWindow]:
    """gold.price_1m of distinct ticks in any order."""
    return windows_of(ticks, MINUTE)


def _by_start(rows: Iterable[PriceWindow]) -> dict[Hashable, PriceWindow]:
    return {(row.source, row.asset, row.window_start): row for row in rows}


def tick_of(record: Record, future_tolerance: timedelta) -> Tick:
    """The tick that a record of topic ticks holds. Raises NotATick with the first rule that it breaks."""
    message = _object(record.value)
    for name in ("timestamp", "asset", "source", "symbol", "quote", "event_time", "quantity", "producer"):
        _require(message.get(name) is None or isinstance(message[name], str), "type")
    for name in ("trade_id", "trade_epoch", "sequence"):
        number = message.get(name)
        _require(number is None or (type(number) is int and -(2**63) <= number < 2**63), "type")
    price = message.get("price_usd")
    _require(price is None or (isinstance(price, str | int | Decimal) and not isinstance(price, bool)), "type")
    for name in ("timestamp", "asset", "price_usd"):
        _require(message.get(name) is not None, "missing")

    asset = _text(message, "asset", "")
    source, symbol = _text(message, "source", "unknown"), _text(message, "symbol", asset)
    quote = _text(message, "quote", "USD")
    producer = message.get("producer")
    for name in (source, symbol, asset, quote, *([producer] if isinstance(producer, str) else [])):
        _require(NAME.fullmatch(name) is not None, "name")

    received_at = _time(_text(message, "timestamp", ""), "timestamp")
    venue_time = message.get("event_time")
    event_time = received_at if venue_time is None else _time(str(venue_time), "event_time")

    price_usd = _decimal(str(price), "price")
    _require(price_usd > 0, "price")
    quantity = None if message.get("quantity") is None else _decimal(str(message["quantity"]), "quantity")
    _require(quantity is None or quantity >= 0, "quantity")
    numbers = [price_usd] if quantity is None else [price_usd, quantity]
    _require(all(number.adjusted() < DIGITS_BEFORE_POINT for number in numbers if number), "range")
    _require(all(_digits_after_point(number) <= DIGITS_AFTER_POINT for number in numbers), "precision")
    _require(quantity is None or Fraction(price_usd) * Fraction(quantity) < NOTIONAL_LIMIT, "range")

    trade_id, trade_epoch, sequence = (message.get(name) for name in ("trade_id", "trade_epoch", "sequence"))
    trade_epoch = 0 if trade_epoch is None else trade_epoch
    if trade_id is not None:
        event_id = f"{source}:{symbol}:{trade_epoch}:{trade_id}"
    elif producer is not None and sequence is not None:
        event_id = f"{producer}:{sequence}"
    else:
        event_id = f"{record.topic}:{record.partition}:{record.offset}"
    return Tick(
        event_id=event_id,
        source=source,
        symbol=symbol,
        asset=asset,
        quote=quote,
        price_usd=half_up(Fraction(price_usd)),
        quantity=None if quantity is None else half_up(Fraction(quantity)),
        trade_id=trade_id if isinstance(trade_id, int) else None,
        trade_epoch=trade_epoch if isinstance(trade_epoch, int) else 0,
        event_time=event_time,
        received_at=received_at,
        producer=producer if isinstance(producer, str) else None,
        sequence=sequence if isinstance(sequence, int) else None,
        kafka_partition=record.partition,
        kafka_offset=record.offset,
        is_future=event_time - received_at > future_tolerance,
        event_date=event_time.date(),
    )


@dataclass(frozen=True)
class RecordedTrade:
    """What a recorded trade must become, whoever received it and whenever."""

    source: str
    symbol: str
    asset: str
    price_usd: Decimal
    quantity: Decimal
    trade_id: int
    event_time: datetime


def trades_in(recording: Path) -> Iterator[RecordedTrade]:
    """The trades of a recording of Binance's combined stream, in the order received."""
    with gzip.open(recording, "rt", encoding="utf-8") as lines:
        for line in lines:
            frame = json.loads(line.partition(" ")[2])
            if frame["stream"].endswith("@trade"):
                yield trade_in(frame["data"])


def trade_in(data: dict[str, str | int]) -> RecordedTrade:
    """The trade in the `data` of a Binance trade frame; its time T counts milliseconds."""
    return RecordedTrade(
        source="binance",
        symbol=str(data["s"]),
        asset=ASSETS[str(data["s"])],
        price_usd=half_up(Fraction(str(data["p"]))),
        quantity=half_up(Fraction(str(data["q"]))),
        trade_id=int(data["t"]),
        event_time=datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=int(data["T"])),
    )


def traded(tick: Tick) -> RecordedTrade:
    """The part of a tick that a recording determines."""
    if tick.quantity is None or tick.trade_id is None:
        raise ValueError(f"{tick.event_id} is no trade of a recording")
    return RecordedTrade(
        tick.source, tick.symbol, tick.asset, tick.price_usd, tick.quantity, tick.trade_id, tick.event_time
    )


def differences(
    expected: Mapping[Hashable, Row], found: Mapping[Hashable, Mapping[str, object]], *, limit: int = 5
) -> list[str]:
    """Where the found rows are not the expected ones, in words; doubles may differ by 1e-9, nothing else may."""
    told = [f"missing: {key}" for key in expected.keys() - found.keys()]
    told += [f"not expected: {key}" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        for column in fields(expected[key]):
            want, have = getattr(expected[key], column.name), found[key][column.name]
            if not _equal(want, have):
                told.append(f"{key} {column.name}: expected {want!r}, found {have!r}")
    return [*told[:limit], f"and {len(told) - limit} more"] if len(told) > limit else told


def _equal(want: object, have: object) -> bool:
    if isinstance(want, float) and isinstance(have, float):
        return math.isclose(want, have, rel_tol=1e-9, abs_tol=1e-9)
    return type(want) is type(have) and want == have


def missing_ids(lake: Lake) -> dict[tuple[str, str, int], set[int]]:
    """Of each instrument the trade ids between those in silver that neither silver nor quarantine has."""
    seen: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for tick in lake.silver.values():
        if tick.trade_id is not None:
            seen[tick.source, tick.symbol, tick.trade_epoch].add(tick.trade_id)
    for bad in lake.quarantine.values():
        try:
            message = _object(bad.value)
        except NotATick:
            continue
        key = (message.get("source"), message.get("symbol"), message.get("trade_epoch") or 0)
        trade_id = message.get("trade_id")
        if isinstance(trade_id, int) and key in seen and min(seen[key]) < trade_id < max(seen[key]):
            seen[key].add(trade_id)
    return {key: set(range(min(ids), max(ids))) - ids for key, ids in seen.items()}


def _is_gap(value: bytes | None) -> bool:
    try:
        message = _object(value)
    except NotATick:
        return False
    required = ("gap_id", "source", "symbol", "trade_epoch", "detected_at", "status")
    return all(message.get(name) is not None for name in required)


def _object(value: bytes | None) -> dict[str, Json]:
    try:
        message = json.loads((value or b"").decode("utf-8"), parse_float=Decimal, parse_constant=Decimal)
    except ValueError:
        raise NotATick("json") from None
    if not isinstance(message, dict):
        raise NotATick("json")
    return message


def _text(message: dict[str, Json], name: str, default: str) -> str:
    found = message.get(name)
    return found if isinstance(found, str) else default


def _time(text: str, rule: str) -> datetime:
    try:
        _require(TIME.fullmatch(text) is not None, rule)
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise NotATick(rule) from None


def _decimal(text: str, rule: str) -> Decimal:
    try:
        _require(NUMBER.fullmatch(text) is not None, rule)
        return Decimal(text)
    except InvalidOperation:
        raise NotATick(rule) from None


def _digits_after_point(number: Decimal) -> int:
    """Significant ones: 1.50 has one. (No arithmetic, which would round to the context's precision.)"""
    _, digits, exponent = number.as_tuple()
    significant = "".join(map(str, digits)).rstrip("0")
    return -int(exponent) - (len(digits) - len(significant)) if significant else 0


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise NotATick(rule)
