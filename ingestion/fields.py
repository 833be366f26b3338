"""Fields of venues' messages, read without losing a digit, and checked."""

from __future__ import annotations

import calendar
import json
import re
from decimal import Decimal
from functools import lru_cache

from conf.text import brief, shown
from ingestion.instruments import Instrument
from ingestion.ticks import DIGITS, END_OF_TIME_NS, ID_LIMIT, Reject, Tick, is_price, is_quantity

# A number from 0 up, as the lake takes it (lake/contract.py), which also has this bound on its length.
NUMBER_LENGTH = 128
_number = re.compile(r"\+?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?").fullmatch
# Whole milliseconds are below it until the year 5138, and microseconds above it since 1973.
_LEAST_MICROSECONDS = 10**14
_rfc3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?Z", re.ASCII).fullmatch
_epoch_seconds = re.compile(r"(\d{1,11})(?:\.(\d{1,9}))?", re.ASCII).fullmatch


def _no_number(text: str) -> str:
    raise ValueError(f"{text} is not JSON")


class _Bare(str):
    """A number with a point or an exponent as it stood in the JSON: no digit passes through a float."""

    __slots__ = ()


_decode = json.JSONDecoder(parse_float=_Bare, parse_constant=_no_number).decode


def decode(frame: bytes) -> object:
    """The JSON of a frame; its numbers with a point as text. Raises ValueError if it is not JSON."""
    try:
        return _decode(str(frame, "utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def message(source: str, frame: bytes, received_ns: int) -> dict[str, object] | Reject:
    """The JSON object that a frame is."""
    try:
        decoded = decode(frame)
    except ValueError as error:
        return Reject(received_ns, source, f"not JSON: {shown(error)}", frame)
    return decoded if isinstance(decoded, dict) else Reject(received_ns, source, "not a JSON object", frame)


def digits(value: object) -> object:
    """The decimal digits of a number that came as text or bare: those of the venue, where they are plain ones.

    An exponent is written out, and zeros that only pad are left away where there are too many. What is no number is
    returned as it is.
    """
    text = str(value) if type(value) is int or isinstance(value, _Bare) else value
    if not isinstance(text, str) or is_quantity(text) or len(text) > NUMBER_LENGTH or not _number(text):
        return text
    written_out = f"{Decimal(text):f}"
    if is_quantity(written_out) or "." not in written_out:
        return written_out
    return written_out.rstrip("0").rstrip(".")


@lru_cache(maxsize=1024)
def _seconds(year: str, month: str, day: str, hour: str, minute: str, second: str) -> int | None:
    fields = tuple(map(int, (year, month, day, hour, minute, second)))
    if not (fields[0] >= 1970 and 1 <= fields[1] <= 12 and fields[3] < 24 and fields[4] < 60 and fields[5] < 61):
        return None
    if not 1 <= fields[2] <= calendar.monthrange(fields[0], fields[1])[1]:
        return None
    return calendar.timegm(fields)


def utc_ns(text: object) -> int | None:
    """Nanoseconds since 1970 of `2021-04-17T16:43:30.244075Z`; None for anything else."""
    if not isinstance(text, str) or not (match := _rfc3339(text)):
        return None
    *whole, fraction = match.groups()
    seconds = _seconds(*whole)
    return None if seconds is None else seconds * 10**9 + int((fraction or "").ljust(9, "0"))


def unix_ns(value: object) -> int | None:
    """Nanoseconds since 1970 of whole milliseconds or microseconds; None for anything else."""
    if type(value) is not int:
        return None
    return value * (1_000 if value >= _LEAST_MICROSECONDS else 1_000_000)


def epoch_ns(value: object) -> int | None:
    """Nanoseconds since 1970 of seconds like `1688669597.8277369`, as text or whole; None for anything else."""
    match = _epoch_seconds(str(value)) if isinstance(value, str) or type(value) is int else None
    return int(match[1]) * 10**9 + int((match[2] or "").ljust(9, "0")) if match else None


def trade(
    source: str,
    instrument: Instrument,
    message: dict[str, object],
    names: tuple[str, str, str, str],
    event_ns: int | None,
    raw: bytes,
    received_ns: int,
    epoch: int = 0,
) -> Tick | Reject:
    """A trade of the instrument from the fields that the venue calls `names`: its id, price, quantity and time."""
    name_of_id, name_of_price, name_of_quantity, name_of_time = names
    trade_id = message.get(name_of_id)
    if type(trade_id) is not int or not 0 <= trade_id < ID_LIMIT:
        reason = f"trade id {name_of_id} is {brief(trade_id)}"
        return Reject(received_ns, source, reason, raw, instrument.symbol)
    price, quantity = digits(message.get(name_of_price)), digits(message.get(name_of_quantity))
    if not is_price(price):
        reason = f"price {name_of_price} is {brief(price)}: not above 0 with at most {DIGITS}"
    elif not is_quantity(quantity):
        reason = f"quantity {name_of_quantity} is {brief(quantity)}: not 0 or more with at most {DIGITS}"
    elif event_ns is None or not 0 < event_ns < END_OF_TIME_NS:
        reason = f"trade time {name_of_time} is {brief(message.get(name_of_time))}: not a time since 1970"
    else:
        return Tick(
            received_ns=received_ns,
            asset=instrument.asset,
            price_usd=price,
            quote=instrument.quote,
            source=source,
            symbol=instrument.symbol,
            event_ns=event_ns,
            quantity=quantity,
            trade_id=trade_id,
            trade_epoch=epoch,
        )
    return Reject(received_ns, source, reason, raw, instrument.symbol, trade_id)
