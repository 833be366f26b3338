"""Binance: the combined trade stream.

A frame is
`{"stream":"btcusdt@trade","data":{"e":"trade","E":ms,"s":"BTCUSDT","t":id,"p":"price","q":"quantity","T":ms,"m":true}}`.
Trade ids (t) have no holes per symbol. E is when the event was sent, T when the trade was made: T is the tick's time.
A connection is cut after 24 hours.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

from ingestion.feeds import fields
from ingestion.instruments import Instrument
from ingestion.ticks import Control, Event, Ignored, Reject, Tick

# The market-data-only address: keyless, and open where the trading address is not.
URL = "wss://data-stream.binance.vision/stream"

# What fits into an address, and into one request.
STREAMS_IN_URL, STREAMS_IN_REQUEST = 100, 100

# Streams that are no trades, as Binance documents them: harmless if a server sends them unasked.
_OTHER_STREAM = re.compile(
    r"[a-z0-9]+@(aggTrade|avgPrice|bookTicker|miniTicker|ticker(_\w+)?|kline_\w+|depth\d*(@\d+ms)?)|!\w+@arr(@\d+ms)?"
)
_FIELDS = ("t", "p", "q", "T")


class Binance:
    """The trades of some instruments, on one connection."""

    name = "binance"
    silence_seconds = 20.0
    connection_lifetime_seconds: float | None = 24 * 3600.0

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None) -> None:
        self._base = url or URL
        # A stream that was left may still send what was under way.
        self._known: dict[str, Instrument] = {}
        self._wanted: dict[str, Instrument] = {}
        self._requests = itertools.count(1)
        self._add(instruments)

    @property
    def url(self) -> str:
        names = "/".join(list(self._wanted)[:STREAMS_IN_URL])
        return f"{self._base}{'&' if '?' in self._base else '?'}streams={names}"

    def opening_frames(self) -> Sequence[str]:
        """The address names the streams; what does not fit in there is subscribed to."""
        return self._request("SUBSCRIBE", list(self._wanted)[STREAMS_IN_URL:])

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._request("SUBSCRIBE", self._add(instruments))

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        streams = [_stream(instrument) for instrument in instruments]
        for stream in streams:
            self._wanted.pop(stream, None)
        return self._request("UNSUBSCRIBE", streams)

    def _add(self, instruments: Sequence[Instrument]) -> list[str]:
        added = {_stream(instrument): instrument for instrument in instruments}
        self._known |= added
        self._wanted |= added
        return list(added)

    def _request(self, method: str, streams: list[str]) -> list[str]:
        return [
            json.dumps(
                {"method": method, "params": streams[at : at + STREAMS_IN_REQUEST], "id": next(self._requests)},
                separators=(",", ":"),
            )
            for at in range(0, len(streams), STREAMS_IN_REQUEST)
        ]

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        try:
            message = fields.decode(frame)
        except ValueError as error:
            return [Reject(received_ns, self.name, f"not JSON: {error}"[:200], frame)]
        if not isinstance(message, dict):
            return [Reject(received_ns, self.name, "not a JSON object", frame)]
        stream, trade = message.get("stream"), message.get("data")
        if not isinstance(stream, str) or not isinstance(trade, dict):
            return [self._other(message, frame, received_ns)]
        instrument = self._known.get(stream)
        if instrument is None:
            if _OTHER_STREAM.fullmatch(stream):
                return [Ignored(stream.partition("@")[2])]
            return [Reject(received_ns, self.name, f"unknown stream {stream[:80]!r}", frame)]
        return [self._trade(instrument, trade, frame, received_ns)]

    def _other(self, message: dict[str, object], frame: bytes, received_ns: int) -> Event:
        if "error" in message:
            return Control("error", fields.shown(message["error"]))
        if "result" in message and "id" in message:
            return Control("subscribed")
        event = message.get("event", message)
        if isinstance(event, dict) and event.get("e") == "serverShutdown":
            return Control("reconnect", "the server is about to shut down")
        return Reject(received_ns, self.name, "neither a stream with data nor a reply", frame)

    def _trade(self, instrument: Instrument, trade: dict[str, object], frame: bytes, received_ns: int) -> Tick | Reject:
        if trade.get("e") != "trade":
            return Reject(received_ns, self.name, f"event {fields.shown(trade.get('e'))} on a trade stream", frame)
        if trade.get("s") != instrument.symbol:
            reason = f"unknown symbol {fields.shown(trade.get('s'))} on the stream of {instrument.symbol}"
            return Reject(received_ns, self.name, reason, frame)
        made_at = trade.get("T")
        event_ns = made_at * 1_000_000 if type(made_at) is int else None
        return fields.trade(self.name, instrument, trade, _FIELDS, event_ns, frame, received_ns)


def _stream(instrument: Instrument) -> str:
    return f"{instrument.symbol.lower()}@trade"
