"""What a feed makes of a frame, and the Kafka messages that come of it.

A message on the topic `ticks` is one JSON object, in this order of fields:

    timestamp, asset, price_usd, quote, source, symbol, event_time, quantity, trade_id, trade_epoch, producer, sequence

A message on the topic `rejects` is one JSON object:

    source       the feed
    reason       one line: why the frame is no tick
    received_at  when it was received, like a tick's timestamp
    symbol       the venue's symbol and
    trade_id       number of the trade, where the frame still told them: a rejected trade is not a missing one
    raw          the frame as text, its first 64 KiB; a byte that is not UTF-8 is written as \\xNN

Times are integer nanoseconds since 1970 in UTC, written with microseconds. Prices and quantities are the venue's
digits.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeGuard

RAW_LIMIT = 64 * 1024
# The first nanosecond of the year 3000: the lake takes no later time (lake/contract.py).
END_OF_TIME_NS = 32_503_680_000 * 10**9
# Trade ids are below it: the lake's tables and the differences of ids must hold them.
ID_LIMIT = 10**18

# What DECIMAL(28,12) holds without rounding.
DIGITS = "16 digits before the point and 12 after it"
_decimal = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,12})?").fullmatch


def is_quantity(text: object) -> TypeGuard[str]:
    """Whether this is a plain decimal number from 0 up, with at most DIGITS."""
    return isinstance(text, str) and _decimal(text) is not None


def is_price(text: object) -> TypeGuard[str]:
    """Whether this is such a number above 0."""
    return isinstance(text, str) and _decimal(text) is not None and text.strip("0.") != ""


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def utc(nanoseconds: int) -> str:
    """ISO-8601 in UTC with exactly six digits of a second; what is below a microsecond is cut off."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06d}Z"


@dataclass(frozen=True, slots=True)
class Tick:
    """A trade or a price as a venue told it. All text is either a checked name or checked digits."""

    received_ns: int
    asset: str
    price_usd: str
    quote: str
    source: str
    symbol: str
    event_ns: int | None = None
    quantity: str | None = None
    trade_id: int | None = None
    trade_epoch: int = 0

    @property
    def key(self) -> bytes:
        """Kafka's key: one symbol's ticks stay in one partition, in order."""
        return f"{self.source}:{self.symbol}".encode()

    def to_json(self, producer: str, sequence: int) -> bytes:
        """The message; `sequence` is the producer's own count of its ticks.

        Put together by hand, in a third of json's time: no name or number in it needs escaping.
        """
        event_time = "null" if self.event_ns is None else f'"{utc(self.event_ns)}"'
        quantity = "null" if self.quantity is None else f'"{self.quantity}"'
        trade_id = "null" if self.trade_id is None else self.trade_id
        return (
            f'{{"timestamp":"{utc(self.received_ns)}","asset":"{self.asset}","price_usd":"{self.price_usd}",'
            f'"quote":"{self.quote}","source":"{self.source}","symbol":"{self.symbol}","event_time":{event_time},'
            f'"quantity":{quantity},"trade_id":{trade_id},"trade_epoch":{self.trade_epoch},'
            f'"producer":"{producer}","sequence":{sequence}}}'
        ).encode()


@dataclass(frozen=True, slots=True)
class Reject:
    """A frame, or a part of one, that is no tick."""

    received_ns: int
    source: str
    reason: str
    raw: bytes
    symbol: str | None = None
    trade_id: int | None = None

    @property
    def key(self) -> bytes:
        return self.source.encode()

    def to_json(self) -> bytes:
        message = {
            "source": self.source,
            "reason": self.reason,
            "received_at": utc(self.received_ns),
            "symbol": self.symbol,
            "trade_id": self.trade_id,
            "raw": self.raw[:RAW_LIMIT].decode("utf-8", "backslashreplace"),
        }
        return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()


def shortened_reject(value: bytes, most: int) -> bytes:
    """A reject's message with so much of its frame as `most` bytes hold; any other message as it is."""
    try:
        message = json.loads(value)
        # A character of the frame takes up to six bytes in JSON.
        frame_bytes = len(json.dumps(message["raw"], ensure_ascii=False).encode())
        message["raw"] = message["raw"][: max(0, most - len(value) + frame_bytes - 2) // 6]
    except (ValueError, KeyError, TypeError):
        return value
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class Ignored:
    """A well-formed frame that carries no tick: an answer to a subscription, or a stream nobody asked for."""

    kind: str


@dataclass(frozen=True, slots=True)
class Control:
    """What a venue says of the conversation itself, or of a symbol without a trade of its own.

    kind is one of
        subscribed   it has heard what we want
        heartbeat    it is alive; with a symbol, also which trade of that symbol is its latest
        reconnect    it will cut this connection soon: make a new one
        error        it will not do what we asked; the text says why, symbol which instrument it refuses, if it is one
        refused      it will not talk to us at all: connecting again changes nothing

    `frames` are to be sent to it on the same connection, `delay` seconds later: what an error has left undone.
    """

    kind: Literal["subscribed", "heartbeat", "reconnect", "error", "refused"]
    text: str = ""
    symbol: str | None = None
    last_trade_id: int | None = None
    frames: tuple[str, ...] = ()
    delay: float = 0.0


Event = Tick | Reject | Ignored | Control
