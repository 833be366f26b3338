"""Binance: the combined trade stream.

A frame is
`{"stream":"btcusdt@trade","data":{"e":"trade","E":ms,"s":"BTCUSDT","t":id,"p":"price","q":"quantity","T":ms,"m":true}}`.
Trade ids (t) have no holes per symbol. E is when the event was sent, T when the trade was made: T is the tick's time.
Times are in milliseconds, or in microseconds where the address has timeUnit=MICROSECOND. A connection is cut after a
day.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from conf.text import brief
from ingestion import fields, history
from ingestion.feeds.subscription import Method, Subscription
from ingestion.feeds.venue import Venue
from ingestion.instruments import Instrument, of_table
from ingestion.pairs import Pair, rows_with
from ingestion.rest import Rest
from ingestion.ticks import Control, Event, Ignored, Reject, Tick

# The market-data-only address: keyless, and open where the trading address is not.
URL = "wss://data-stream.binance.vision/stream"

# What fits into an address.
STREAMS_IN_URL = 100

# Streams that are no trades, as Binance documents them: harmless if a server sends them unasked.
_OTHER_STREAM = re.compile(
    r"[a-z0-9]+@(aggTrade|avgPrice|bookTicker|miniTicker|ticker(_\w+)?|kline_\w+|depth\d*(@\d+ms)?)|!\w+@arr(@\d+ms)?"
)
_FIELDS = ("t", "p", "q", "T")


class Binance:
    """The trades of some instruments, on one connection."""

    name = "binance"
    has_trade_ids = True
    silence_seconds = 20.0
    connection_lifetime_seconds: float | None = 24 * 3600.0
    # "WebSocket connections have a limit of 5 incoming messages per second", pings and pongs too; whoever sends more is
    # disconnected. https://developers.binance.com/docs/binance-spot-api-docs/web-socket-streams
    request_seconds = 0.3

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None) -> None:
        self._base = url or URL
        self._streams = Subscription(instruments, _stream, _request)
        self._in_url = self._streams.names[:STREAMS_IN_URL]

    @property
    def url(self) -> str:
        self._in_url = self._streams.names[:STREAMS_IN_URL]
        return f"{self._base}{'&' if '?' in self._base else '?'}streams={'/'.join(self._in_url)}"

    def opening_frames(self) -> Sequence[str]:
        """The address names the streams; what does not fit in there is subscribed to."""
        in_url = set(self._in_url)
        return self._streams.opening([name for name in self._streams.names if name not in in_url])

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._streams.add(instruments)

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._streams.remove(instruments)

    @property
    def refused(self) -> Mapping[str, str]:
        return self._streams.refused

    def ask_refused(self) -> Sequence[str]:
        return self._streams.ask_refused()

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        message = fields.message(self.name, frame, received_ns)
        if isinstance(message, Reject):
            return [message]
        stream, trade = message.get("stream"), message.get("data")
        if not isinstance(stream, str) or not isinstance(trade, dict):
            return [self._other(message, frame, received_ns)]
        instrument = self._streams.find(stream)
        if instrument is None:
            if _OTHER_STREAM.fullmatch(stream):
                return [Ignored(stream.partition("@")[2])]
            return [Reject(received_ns, self.name, f"unknown stream {brief(stream)}", frame)]
        return [self._trade(instrument, trade, frame, received_ns)]

    def _other(self, message: dict[str, object], frame: bytes, received_ns: int) -> Event:
        if "error" in message:
            return self._streams.refuse_request(message.get("id"), brief(message["error"]))
        if "result" in message and "id" in message:
            return Control("subscribed")
        event = message.get("event", message)
        if isinstance(event, dict) and event.get("e") == "serverShutdown":
            return Control("reconnect", "the server is about to shut down")
        return Reject(received_ns, self.name, "neither a stream with data nor a reply", frame)

    def _trade(self, instrument: Instrument, trade: dict[str, object], frame: bytes, received_ns: int) -> Tick | Reject:
        if trade.get("e") != "trade":
            return Reject(received_ns, self.name, f"event {brief(trade.get('e'))} on a trade stream", frame)
        if trade.get("s") != instrument.symbol:
            reason = f"unknown symbol {brief(trade.get('s'))} on the stream of {instrument.symbol}"
            return Reject(received_ns, self.name, reason, frame)
        event_ns = fields.unix_ns(trade.get("T"))
        return fields.trade(self.name, instrument, trade, _FIELDS, event_ns, frame, received_ns)


def _stream(instrument: Instrument) -> str:
    return f"{instrument.symbol.lower()}@trade"


def _request(method: Method, streams: list[str], number: int) -> dict[str, object]:
    return {"method": method.upper(), "params": streams, "id": number}


async def _pages(rest: Rest, trades: history.Trades, now_ns: Callable[[], int]) -> AsyncIterator[list[Tick | Reject]]:
    """From an id up (never aggTrades, which have other ids); weight 25 of 6,000 a minute."""
    at = trades.first
    while at <= trades.last:
        limit = min(history.PAGE, trades.last - at + 1)
        query: dict[str, str | int] = {"symbol": trades.instrument.symbol, "fromId": at, "limit": limit}
        page = history.rows(await rest.get("/api/v3/historicalTrades", query))
        ticks = []
        for row in page:
            event_ns = fields.unix_ns(row.get("time"))
            ticks.append(history.trade(Binance.name, trades, row, ("id", "price", "qty", "time"), event_ns, now_ns()))
        if not ticks:
            return
        yield ticks
        at = max(at, max(tick.trade_id or 0 for tick in ticks)) + 1


async def _pairs(rest: Rest) -> list[Pair]:
    """https://developers.binance.com: GET /api/v3/exchangeInfo."""
    answer = await rest.get("/api/v3/exchangeInfo", {"permissions": "SPOT"})
    rows = answer.get("symbols") if isinstance(answer, dict) else None
    return [
        (str(row["symbol"]), str(row["baseAsset"]), str(row["quoteAsset"]))
        for row in rows_with(rows, "symbol", "baseAsset", "quoteAsset")
        if row.get("status") == "TRADING"
    ]


VENUE = Venue(
    name=Binance.name,
    instruments=of_table("{ticker}USDT", "USDT"),
    contiguous_ids=True,
    feed=lambda instruments, url, _: Binance(instruments, url),
    rest_url="https://api.binance.com",
    # "A single connection can listen to a maximum of 1024 streams", and "300 connections per attempt every 5 minutes
    # per IP". https://developers.binance.com/docs/binance-spot-api-docs/web-socket-streams
    most_instruments=1_000,
    attempts=(250, 300.0),
    # https://developers.binance.com/docs/binance-spot-api-docs/faqs/market_data_only
    market_data_url="https://data-api.binance.vision",
    history=history.History(0.5, _pages),
    pairs=_pairs,
)
