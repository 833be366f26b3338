"""Kraken: the trade channel of its WebSocket API v2, with its snapshot.

A frame has several trades:
`{"channel":"trade","type":"update","data":[{"symbol":"MATIC/USD","side":"sell","price":0.5117,"qty":40.0,
"ord_type":"market","trade_id":4665906,"timestamp":"2023-09-25T07:49:37.708706Z"}]}`.
Prices and quantities are bare numbers. trade_id counts the trades of a pair. A subscription is answered with a
snapshot: the latest 50 trades, which are trades like others. A heartbeat comes about every second in which nothing else
does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ingestion.feeds import fields
from ingestion.feeds.subscription import Method, Subscription
from ingestion.instruments import Instrument
from ingestion.ticks import Control, Event, Ignored, Reject

URL = "wss://ws.kraken.com/v2"

_FIELDS = ("trade_id", "price", "qty", "timestamp")
_OTHER_CHANNELS = {"status", "ticker", "book", "level3", "ohlc", "instrument"}


class Kraken:
    """The trades of some instruments, on one connection."""

    name = "kraken"
    silence_seconds = 4.0
    connection_lifetime_seconds: float | None = None

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None) -> None:
        self.url = url or URL
        self._requests = itertools.count(1)
        self._pairs = Subscription(instruments, lambda instrument: instrument.symbol, self._request)

    def opening_frames(self) -> Sequence[str]:
        return self._pairs.frames("subscribe", self._pairs.names)

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._pairs.add(instruments)

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._pairs.remove(instruments)

    def _request(self, method: Method, symbols: list[str]) -> dict[str, object]:
        params = {"channel": "trade", "symbol": symbols, "snapshot": True}
        return {"method": method, "params": params, "req_id": next(self._requests)}

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        message = fields.message(self.name, frame, received_ns)
        if isinstance(message, Reject):
            return [message]
        channel, trades = message.get("channel"), message.get("data")
        if channel == "trade":
            if not isinstance(trades, list):
                return [Reject(received_ns, self.name, f"the trade channel's data is {fields.shown(trades)}", frame)]
            return [self._trade(trade, frame, received_ns) for trade in trades]
        if channel == "heartbeat":
            return [Control("heartbeat")]
        if isinstance(channel, str):
            return [Ignored(channel if channel in _OTHER_CHANNELS else "another channel")]
        if "method" in message or "error" in message:
            if message.get("error") is not None or message.get("success") is False:
                return [Control("error", f"{fields.shown(message.get('error'))}"[:200])]
            return [Control("subscribed")]
        return [Reject(received_ns, self.name, "neither a channel's message nor a reply", frame)]

    def _trade(self, trade: object, frame: bytes, received_ns: int) -> Event:
        if not isinstance(trade, dict):
            return Reject(received_ns, self.name, f"a trade is {fields.shown(trade)}", frame)
        instrument = self._pairs.find(trade.get("symbol"))
        if instrument is None:
            return Reject(received_ns, self.name, f"unknown symbol {fields.shown(trade.get('symbol'))}", frame)
        event_ns = fields.utc_ns(trade.get("timestamp"))
        return fields.trade(self.name, instrument, trade, _FIELDS, event_ns, frame, received_ns)
