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
from decimal import Decimal
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

# [0-9] and not \d, which takes the digits of every script.
NAME = re.compile(r"[A-Za-z0-9/._-]{1,64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})")
# Corrected: an exponent has at most three digits, and a minus is refused even before a zero, as the Spark judge did.
NUMBER = re.compile(r"[+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
# Corrected: no text is looked at beyond a bounded length. What is longer breaks the rule of its field.
LONGEST_VALUE = 2**20
LONGEST_NUMBER = 128
DEEPEST_JSON = 64
DIGITS_BEFORE_POINT = 16
NOTIONAL_LIMIT = 10**20
NOTIONAL_DIGITS_AFTER_POINT = 18
# Corrected: any integer of 64 bits was a number of a trade, and any year of four digits a time.
NUMBERS_OF_TRADES = range(10**18)
FIRST_TIME, END_OF_TIMES = datetime(1970, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC)
FUTURE_TOLERANCE, RECEIPT_TOLERANCE = timedelta(seconds=5), timedelta(days=1)
# Corrected: a candle of a venue that has both USD and USDT mixed them. Its own quote feeds gold, other venues' all do.
OWN_QUOTES = {"coinbase": "USD", "kraken": "USD", "coincap": "USD"}
ASSETS = {
    "BTCUSDT": "bitcoin",
    "ETHUSDT": "ethereum",
    "ADAUSDT": "cardano",
    "SOLUSDT": "solana",
    "DOGEUSDT": "dogecoin",
}


@dataclass(frozen=True)
class Digits:
    """A number of JSON as it is written; whole: without point and exponent."""

    text: str
    whole: bool


Json = None | bool | str | Digits | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Record:
    """A Kafka record as delivered."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    kafka_timestamp: datetime = datetime(2024, 1, 1, tzinfo=UTC)
    # When bronze took it. The default is after every receipt, so that none is too far ahead of it. It depends on when
    # the job ran, so it is no part of the row that bronze must hold.
    ingested_at: datetime = field(default=END_OF_TIMES - timedelta(days=1), compare=False)

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
    price_5s: dict[Hashable, PriceWindow] = field(default_factory=dict)
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
    future_tolerance: timedelta = FUTURE_TOLERANCE,
    receipt_tolerance: timedelta = RECEIPT_TOLERANCE,
    ticks_topic: str = "ticks",
    gaps_topic: str = "gaps",
    gold_symbols: dict[str, str] | None = None,
    gold_quotes: dict[str, str] | None = None,
    volatility: timedelta = MINUTE,
    alert_threshold_pct: float = 2.0,
    alert_window: timedelta = timedelta(seconds=10),
    alert_cooldown: timedelta = timedelta(seconds=60),
) -> Lake:
    """The tables that these records make. Among repeats the lowest offset wins."""
    lake = Lake()
    for record in sorted(records, key=lambda record: record.place):
        lake.bronze[record.place] = record
        row = row_of(
            record,
            future_tolerance=future_tolerance,
            receipt_tolerance=receipt_tolerance,
            ticks_topic=ticks_topic,
            gaps_topic=gaps_topic,
        )
        if isinstance(row, Tick):
            lake.silver.setdefault(row.event_id, row)
        elif row is not None:
            lake.quarantine[record.place] = row
    chosen, quotes = gold_symbols or {}, OWN_QUOTES if gold_quotes is None else gold_quotes
    gold = [
        tick
        for tick in lake.silver.values()
        if (
            chosen[f"{tick.source}:{tick.asset}"] == tick.symbol
            if f"{tick.source}:{tick.asset}" in chosen
            else tick.source not in quotes or quotes[tick.source] == tick.quote
        )
    ]
    lake.price_5s = _by_start(windows_of(gold, timedelta(seconds=5)))
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


def row_of(
    record: Record,
    *,
    future_tolerance: timedelta = FUTURE_TOLERANCE,
    receipt_tolerance: timedelta = RECEIPT_TOLERANCE,
    ticks_topic: str = "ticks",
    gaps_topic: str = "gaps",
) -> Tick | Quarantined | None:
    """The row of silver.ticks or silver.quarantine that a record makes; None: it reports a gap."""
    try:
        if record.topic == gaps_topic:
            _require(_is_gap(record.value), "gap")
            return None
        _require(record.topic == ticks_topic, "reject")
        return tick_of(record, future_tolerance, receipt_tolerance)
    except NotATick as error:
        return Quarantined(record.value, str(error), *record.place)


def tick_of(record: Record, future_tolerance: timedelta, receipt_tolerance: timedelta = RECEIPT_TOLERANCE) -> Tick:
    """The tick that a record of topic ticks holds. Raises NotATick with the first rule that it breaks."""
    message = _object(record.value)
    for name in ("timestamp", "asset", "source", "symbol", "quote", "event_time", "quantity", "producer"):
        _require(message.get(name) is None or isinstance(message[name], str), "type")
    whole = {name: message.get(name) for name in ("trade_id", "trade_epoch", "sequence")}
    # Corrected: an integer beyond 64 bits had the wrong type; now it is out of range, as every other below.
    _require(all(number is None or (isinstance(number, Digits) and number.whole) for number in whole.values()), "type")
    price = message.get("price_usd")
    _require(price is None or isinstance(price, str | Digits), "type")
    for name in ("timestamp", "asset", "price_usd"):
        _require(message.get(name) is not None, "missing")

    asset = _text(message, "asset", "")
    source, symbol = _text(message, "source", "unknown"), _text(message, "symbol", asset)
    quote = _text(message, "quote", "USD")
    producer = message.get("producer")
    for name in (source, symbol, asset, quote, *([producer] if isinstance(producer, str) else [])):
        _require(NAME.fullmatch(name) is not None, "name")

    received_at = _time(_text(message, "timestamp", ""), "timestamp")
    # Corrected: a receipt far ahead of its record is a clock that is wrong, and would be the newest tick for years.
    _require(received_at - record.ingested_at <= receipt_tolerance, "timestamp")
    venue_time = message.get("event_time")
    event_time = received_at if venue_time is None else _time(str(venue_time), "event_time")

    price_usd = _decimal(price.text if isinstance(price, Digits) else str(price), "price")
    _require(price_usd > 0, "price")
    quantity = None if message.get("quantity") is None else _decimal(str(message["quantity"]), "quantity")
    numbers = [price_usd] if quantity is None else [price_usd, quantity]
    # Corrected: precision comes before range, as in lake/ticks.py and in the contract's order of rules.
    _require(all(_digits_after_point(number) <= DIGITS_AFTER_POINT for number in numbers), "precision")
    _require(all(number.adjusted() < DIGITS_BEFORE_POINT for number in numbers if number), "range")
    # Corrected: what gold adds up is the rounded product, and 10^20 - 10^-24 is rounded to 10^20.
    _require(quantity is None or notional_of(price_usd, quantity) < NOTIONAL_LIMIT, "range")
    trade_id, trade_epoch, sequence = (None if number is None else _number(number) for number in whole.values())

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
        trade_id=trade_id,
        trade_epoch=trade_epoch,
        event_time=event_time,
        received_at=received_at,
        producer=producer if isinstance(producer, str) else None,
        sequence=sequence,
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
            if not column.compare:
                continue
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
        trade = trade_named_by(bad.value)
        if trade is not None and trade[:3] in seen and min(seen[trade[:3]]) < trade[3] < max(seen[trade[:3]]):
            seen[trade[:3]].add(trade[3])
    return {key: set(range(min(ids), max(ids))) - ids for key, ids in seen.items()}


def trade_named_by(value: bytes | None) -> tuple[str, str, int, int] | None:
    """source, symbol, trade_epoch and trade_id of a record that is no tick, if all are as a tick's must be.

    Corrected: names and numbers that no tick can have name no trade.
    """
    try:
        message = _object(value)
        source, symbol, epoch = message.get("source"), message.get("symbol"), message.get("trade_epoch")
        _require(isinstance(source, str) and NAME.fullmatch(source) is not None, "name")
        _require(isinstance(symbol, str) and NAME.fullmatch(symbol) is not None, "name")
        return str(source), str(symbol), 0 if epoch is None else _number(epoch), _number(message.get("trade_id"))
    except NotATick:
        return None


def _is_gap(value: bytes | None) -> bool:
    """Whether a value is a row of silver.gaps. Corrected: its fields are of the column's types, and bounded."""
    try:
        message = _object(value)
        for name in ("reason", "filled_by"):
            _require(message.get(name) is None or isinstance(message[name], str), "gap")
        for name in ("source", "symbol"):
            _require(isinstance(message.get(name), str) and NAME.fullmatch(str(message[name])) is not None, "gap")
        gap_id = message.get("gap_id")
        _require(isinstance(gap_id, str) and re.fullmatch(r"[A-Za-z0-9/._:-]{1,256}", gap_id) is not None, "gap")
        _require(message.get("status") in ("open", "filled", "unfillable"), "gap")
        _number(message.get("trade_epoch"))
        missing = [message.get(name) for name in ("first_missing", "last_missing")]
        if missing != [None, None]:
            first, last = map(_number, missing)
            _require(first <= last, "gap")
        times = {name: message.get(name) for name in ("detected_at", "disconnected_at", "filled_at")}
        _require(times["detected_at"] is not None, "gap")
        for time in times.values():
            _require(time is None or isinstance(time, str), "gap")
            if isinstance(time, str):
                _time(time, "gap")
    except NotATick:
        return False
    return True


def _object(value: bytes | None) -> dict[str, Json]:
    """Corrected: a key that stands twice, NaN, Infinity, and what is nested or long beyond measure are no JSON."""
    try:
        _require(value is not None and len(value) <= LONGEST_VALUE, "json")
        message = json.loads(
            (value or b"").decode("utf-8"),
            object_pairs_hook=_with_each_key_once,
            parse_int=lambda text: Digits(text, True),
            parse_float=lambda text: Digits(text, False),
            parse_constant=lambda _: _require(False, "json"),
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise NotATick("json") from None
    if not isinstance(message, dict):
        raise NotATick("json")
    level: list[Json] = [message]
    for _ in range(DEEPEST_JSON):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts]
    _require(not any(isinstance(part, dict | list) for part in level), "json")
    return message


def _with_each_key_once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    _require(len({key for key, _ in pairs}) == len(pairs), "json")
    return dict(pairs)


def _number(digits: Json) -> int:
    """A whole number that a trade, an epoch or a tick of a producer can have. Raises NotATick."""
    if not isinstance(digits, Digits) or not digits.whole or len(digits.text) > 20:
        raise NotATick("range")
    _require(int(digits.text) in NUMBERS_OF_TRADES, "range")
    return int(digits.text)


def _text(message: dict[str, Json], name: str, default: str) -> str:
    found = message.get(name)
    return found if isinstance(found, str) else default


def _time(text: str, rule: str) -> datetime:
    try:
        _require(TIME.fullmatch(text) is not None, rule)
        time = datetime.fromisoformat(text)
        # As Java has it: offsets of at most 18 hours, whose minutes are minutes.
        _require(abs(time.utcoffset() or timedelta()) <= timedelta(hours=18), rule)
        _require(text.endswith("Z") or int(text[-2:]) < 60, rule)
        time = time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise NotATick(rule) from None
    _require(FIRST_TIME <= time < END_OF_TIMES, rule)
    return time


def _decimal(text: str, rule: str) -> Decimal:
    _require(len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text) is not None, rule)
    return Decimal(text)


def notional_of(price: Decimal, quantity: Decimal) -> Fraction:
    """price * quantity, half up."""
    scale = 10**NOTIONAL_DIGITS_AFTER_POINT
    return Fraction(math.floor(Fraction(price) * Fraction(quantity) * scale + Fraction(1, 2)), scale)


def _digits_after_point(number: Decimal) -> int:
    """Significant ones: 1.50 has one. (No arithmetic, which would round to the context's precision.)"""
    _, digits, exponent = number.as_tuple()
    significant = "".join(map(str, digits)).rstrip("0")
    return -int(exponent) - (len(digits) - len(significant)) if significant else 0


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise NotATick(rule)
