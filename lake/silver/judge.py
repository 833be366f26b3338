"""Classify one Kafka record: a tick, a gap report, or a rejection with the first rule that it breaks.

This is the reference, in plain Python over lake/contract.py. lake/silver/read.py reads most records faster, and must
agree.
A record takes some ten microseconds. No value of a record makes `judge` raise or take more than linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Context, Decimal
from typing import Any, NoReturn

from lake.contract import (
    DECIMALS,
    DEFAULT_QUOTE,
    DEFAULT_SOURCE,
    DEFAULT_TRADE_EPOCH,
    EARLIEST,
    FIELDS,
    GAP_ID,
    GAP_STATUSES,
    ID_LIMIT,
    INTEGER_DIGITS,
    INTEGERS,
    NAME,
    NAMES,
    NESTING,
    NOTIONAL_DECIMALS,
    NOTIONAL_DIGITS,
    NUMBER,
    NUMBER_LENGTH,
    QUOTED_LENGTH,
    REASON_LENGTH,
    REQUIRED,
    TIME,
    TIME_LENGTH,
    TIME_LIMIT,
    VALUE_BYTES,
    TickRules,
    event_id,
    gold_time,
)
from lake.silver.gaps import Gap
from lake.times import DAY, EPOCH, to_micros, to_time

InstrumentId = tuple[str, str, int, int]
"""source, symbol, trade_epoch, trade_id"""

_FIRST_DAY = EPOCH.toordinal()
_ID_CHARACTERS = len(str(ID_LIMIT))
_SMALLEST = Decimal(1).scaleb(-DECIMALS)
_NUMBER_LIMIT = Decimal(10) ** INTEGER_DIGITS
# Room for every number of NUMBER written out: 128 digits, an exponent of 999, and 12 decimals.
_EXACT = Context(prec=1_200)
# A product from this value on would be rounded up to the limit.
_NOTIONAL_LIMIT = _EXACT.subtract(Decimal(10) ** NOTIONAL_DIGITS, Decimal(5).scaleb(-NOTIONAL_DECIMALS - 1))

_is_name = re.compile(NAME).fullmatch
_is_time = re.compile(TIME).fullmatch
_is_number = re.compile(NUMBER).fullmatch
_is_gap_id = re.compile(GAP_ID).fullmatch


@dataclass(frozen=True, slots=True)
class Tick:
    """A row of silver.ticks without is_late: prices as silver keeps them, times in microseconds since 1970."""

    event_id: str
    source: str
    symbol: str
    asset: str
    quote: str
    price_usd: Decimal
    quantity: Decimal | None
    trade_id: int | None
    trade_epoch: int
    event_time: int
    received_at: int
    producer: str | None
    sequence: int | None
    kafka_partition: int
    kafka_offset: int
    is_future: bool
    event_date: date

    @property
    def gold_time(self) -> int:
        """The time that places the tick in gold's windows, in microseconds since 1970."""
        return gold_time(self.event_time, self.received_at, self.is_future)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record for silver.quarantine: the rule that it breaks, and why in words."""

    rule: str
    reason: str
    instrument_ids: InstrumentId | None = None
    """The trade that the record names, if all parts of its id are valid. Such a trade does not count as missing."""


class _BrokenRule(Exception):
    """A record breaks a rule. The first one raised is the record's rule."""

    def __init__(self, rule: str, reason: str) -> None:
        self.rule, self.reason = rule, reason


def judge(
    value: bytes | None, topic: str, partition: int, offset: int, ingested_at: datetime, rules: TickRules
) -> Tick | Rejection | Gap:
    """Classify a record.

    ingested_at: when bronze took it, with a zone. Every topic but rules.rejects_topic and rules.gaps_topic is one of
    ticks.
    """
    message = _object(value)
    is_report = topic == rules.gaps_topic
    if topic == rules.rejects_topic and not is_report:
        return Rejection("reject", _reason_of_feed(message), _instrument_ids(message))
    if message is None:
        complaint = f"the value is not a JSON object of at most {VALUE_BYTES} bytes that has each key once"
        return Rejection("gap" if is_report else "json", complaint)
    try:
        if is_report:
            return _report(message)
        return _tick(message, (topic, partition, offset), to_micros(ingested_at), rules)
    except _BrokenRule as broken:
        return Rejection(broken.rule, broken.reason, _instrument_ids(message))


# JSON


class _Integer(str):
    """The digits of a JSON integer. Python's int refuses thousands of digits, and takes quadratic time."""

    __slots__ = ()


class _Fraction(str):
    """The digits of a JSON number with a point or an exponent; it never becomes a float."""

    __slots__ = ()


_Message = Mapping[str, Any]


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_decode = json.JSONDecoder(
    object_pairs_hook=_object_of, parse_int=_Integer, parse_float=_Fraction, parse_constant=_refuse
).decode
# An unterminated string matches to the end of the text. Else the search would start again at each quote in it.
_string_or_bracket = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def _object(value: bytes | None) -> _Message | None:
    """A value's JSON object; None if it is not one."""
    if value is None or len(value) > VALUE_BYTES:
        return None
    # Few values have so many brackets, so few are scanned.
    if value.count(b"{") + value.count(b"[") > NESTING and _is_too_deep(value):
        return None
    try:
        message = _decode(value.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return message if type(message) is dict else None


def _is_too_deep(value: bytes) -> bool:
    """Whether more than NESTING brackets are open at once, not counting those in strings."""
    depth = 0
    for token in _string_or_bracket.finditer(value):
        first = value[token.start()]
        if first in b"[{":
            depth += 1
            if depth > NESTING:
                return True
        elif first in b"]}":
            depth -= 1
    return False


# The rules, in order. If a field breaks several, the first one counts.

_NONE = type(None)
_ALLOWED = {
    name: frozenset({_Integer, _NONE} if name in INTEGERS else {str, _NONE}) for name in FIELDS if name != "price_usd"
}
_ALLOWED["price_usd"] = frozenset({str, _Integer, _Fraction, _NONE})
_TYPES = tuple((name, _ALLOWED[name]) for name in FIELDS)


def _tick(message: _Message, place: tuple[str, int, int], ingested_at: int, rules: TickRules) -> Tick:
    """Raises _BrokenRule."""
    get = message.get
    for name, allowed in _TYPES:
        if type(get(name)) not in allowed:
            raise _BrokenRule("type", f"{name} has the wrong type")
    for name in REQUIRED:
        if get(name) is None:
            raise _BrokenRule("missing", f"{name} is missing")
    for name in NAMES:
        text = get(name)
        if text is not None and not _is_name(text):
            raise _BrokenRule("name", f"{_quoted(name, text)} is not a name of 1 to 64 of A-Z a-z 0-9 / . _ -")

    received_at = _time("timestamp", message["timestamp"], "timestamp")
    if received_at - ingested_at > rules.receipt_tolerance:
        raise _BrokenRule("timestamp", f"{_quoted('timestamp', message['timestamp'])} is too far ahead of its arrival")
    venue_time = get("event_time")
    event_time = received_at if venue_time is None else _time("event_time", venue_time, "event_time")

    price = _number(message["price_usd"])
    if not price:
        raise _BrokenRule("price", f"{_quoted('price_usd', message['price_usd'])} is not a number above 0")
    quantity_text: str | None = message.get("quantity")
    quantity = None if quantity_text is None else _number(quantity_text)
    if quantity is None and quantity_text is not None:
        raise _BrokenRule("quantity", f"{_quoted('quantity', quantity_text)} is not a number of at least 0")
    price = _exact("price_usd", price, message["price_usd"])
    quantity = None if quantity is None else _exact("quantity", quantity, message["quantity"])
    _require_room("price_usd", price, message["price_usd"])
    if quantity is not None:
        _require_room("quantity", quantity, message["quantity"])
        if _EXACT.multiply(price, quantity) >= _NOTIONAL_LIMIT:
            raise _BrokenRule("range", f"price_usd * quantity has more than {NOTIONAL_DIGITS} digits before the point")
    trade_id, trade_epoch, sequence = (_id(name, get(name)) for name in INTEGERS)

    asset: str = message["asset"]
    source, symbol, quote, producer = get("source"), get("symbol"), get("quote"), get("producer")
    source = DEFAULT_SOURCE if source is None else source
    symbol = asset if symbol is None else symbol
    trade_epoch = DEFAULT_TRADE_EPOCH if trade_epoch is None else trade_epoch
    identity = event_id(
        source=source,
        symbol=symbol,
        trade_epoch=trade_epoch,
        trade_id=trade_id,
        producer=producer,
        sequence=sequence,
        place=place,
    )
    return Tick(
        identity,
        source,
        symbol,
        asset,
        DEFAULT_QUOTE if quote is None else quote,
        price,
        quantity,
        trade_id,
        trade_epoch,
        event_time,
        received_at,
        producer,
        sequence,
        place[1],
        place[2],
        event_time - received_at > rules.future_tolerance,
        date.fromordinal(_FIRST_DAY + event_time // DAY),
    )


def _report(message: _Message) -> Gap:
    """Raises _BrokenRule with rule `gap`."""
    get = message.get
    gap_id, status = get("gap_id"), get("status")
    if type(gap_id) is not str or not _is_gap_id(gap_id):
        raise _BrokenRule("gap", f"{_quoted('gap_id', gap_id)} is not 1 to 256 of A-Z a-z 0-9 / . _ : -")
    for name in ("source", "symbol"):
        if type(get(name)) is not str or not _is_name(message[name]):
            raise _BrokenRule("gap", f"{_quoted(name, get(name))} is not a name of 1 to 64 of A-Z a-z 0-9 / . _ -")
    if type(status) is not str or status not in GAP_STATUSES:
        raise _BrokenRule("gap", f"{_quoted('status', status)} is none of {', '.join(GAP_STATUSES)}")
    for name in ("reason", "filled_by"):
        if type(get(name)) not in (str, _NONE):
            raise _BrokenRule("gap", f"{name} has the wrong type")
    trade_epoch = _id_in_report("trade_epoch", get("trade_epoch"))
    if trade_epoch is None:
        raise _BrokenRule("gap", "trade_epoch is missing")
    first, last = (_id_in_report(name, get(name)) for name in ("first_missing", "last_missing"))
    if (first is None) != (last is None):
        raise _BrokenRule("gap", "of first_missing and last_missing one is missing")
    if first is not None and last is not None and first > last:
        raise _BrokenRule("gap", f"first_missing {first} is above last_missing {last}")
    disconnected_at, detected_at, filled_at = (
        _time_in_report(name, get(name)) for name in ("disconnected_at", "detected_at", "filled_at")
    )
    if detected_at is None:
        raise _BrokenRule("gap", "detected_at is missing")
    return Gap(
        gap_id=gap_id,
        source=message["source"],
        symbol=message["symbol"],
        trade_epoch=trade_epoch,
        first_missing=first,
        last_missing=last,
        disconnected_at=disconnected_at,
        detected_at=detected_at,
        status=status,
        reason=_shorten(get("reason")),
        filled_at=filled_at,
        filled_by=_shorten(get("filled_by")),
    )


def _reason_of_feed(message: _Message | None) -> str:
    reason = None if message is None else message.get("reason")
    return _storable(reason[:REASON_LENGTH]) if type(reason) is str else "rejected by its feed"


def _instrument_ids(message: _Message | None) -> InstrumentId | None:
    """The trade that a message names; None unless source, symbol, epoch and number are valid as in a tick."""
    if message is None:
        return None
    source, symbol = message.get("source"), message.get("symbol")
    trade_id, trade_epoch = (_id_or_none(message.get(name)) for name in ("trade_id", "trade_epoch"))
    if message.get("trade_epoch") is None:
        trade_epoch = DEFAULT_TRADE_EPOCH
    if type(source) is not str or type(symbol) is not str or trade_id is None or trade_epoch is None:
        return None
    return (source, symbol, trade_epoch, trade_id) if _is_name(source) and _is_name(symbol) else None


# Fields


def _id(name: str, digits: _Integer | None) -> int | None:
    """Raises _BrokenRule with rule `range`."""
    number = _id_or_none(digits)
    if number is None and digits is not None:
        raise _BrokenRule("range", f"{_quoted(name, digits)} is not from 0 to below 10^18")
    return number


def _id_or_none(digits: object) -> int | None:
    """A JSON integer from 0 to below ID_LIMIT; None for anything else."""
    if type(digits) is not _Integer or len(digits) > _ID_CHARACTERS:
        return None
    number = int(digits)
    return number if 0 <= number < ID_LIMIT else None


def _id_in_report(name: str, digits: object) -> int | None:
    number = _id_or_none(digits)
    if number is None and digits is not None:
        raise _BrokenRule("gap", f"{_quoted(name, digits)} is not an integer from 0 to below 10^18")
    return number


def _time(name: str, text: str, rule: str) -> int:
    """In microseconds since 1970. Raises _BrokenRule."""
    if len(text) <= TIME_LENGTH and _is_time(text):
        try:
            time = to_micros(datetime.fromisoformat(text))
        except ValueError:
            pass  # a day that does not exist
        else:
            if EARLIEST <= time < TIME_LIMIT:
                return time
            raise _BrokenRule(rule, f"{_quoted(name, text)} is not from 1970 to before 3000 in UTC")
    raise _BrokenRule(rule, f"{_quoted(name, text)} is not an ISO-8601 time with a zone")


def _time_in_report(name: str, text: object) -> datetime | None:
    if text is None:
        return None
    if type(text) is not str:
        raise _BrokenRule("gap", f"{name} has the wrong type")
    return to_time(_time(name, text, "gap"))


def _number(text: str) -> Decimal | None:
    """The exact number; None if the text is not a number of at least 0."""
    return Decimal(text) if len(text) <= NUMBER_LENGTH and _is_number(text) else None


def _exact(name: str, number: Decimal, text: str) -> Decimal:
    """The number with exactly DECIMALS decimals, as in the tables. Raises _BrokenRule if that would round it."""
    exact = _EXACT.quantize(number, _SMALLEST)
    if exact != number:
        raise _BrokenRule("precision", f"{_quoted(name, text)} has more than {DECIMALS} decimals")
    return exact


def _require_room(name: str, number: Decimal, text: str) -> None:
    """Raises _BrokenRule with rule `range`."""
    if number >= _NUMBER_LIMIT:
        raise _BrokenRule("range", f"{_quoted(name, text)} has more than {INTEGER_DIGITS} digits before the point")


def _shorten(text: str | None) -> str | None:
    return None if text is None else _storable(text[:REASON_LENGTH])


def _quoted(name: str, value: object) -> str:
    """A field's name and the beginning of its value."""
    if value is None:
        return f"{name} null"
    return f"{name} {_storable(value[:QUOTED_LENGTH])}" if isinstance(value, str) else f"{name} of another type"


def _storable(text: str) -> str:
    """Escape lone surrogates: JSON allows them, UTF-8 and so the tables do not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
