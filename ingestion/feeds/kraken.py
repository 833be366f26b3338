"""Kraken: the trade channel of its WebSocket API v2, with its snapshot.

A frame has several trades:
`{"channel":"trade","type":"update","data":[{"symbol":"MATIC/USD","side":"sell","price":0.5117,"qty":40.0,
"ord_type":"market","trade_id":4665906,"timestamp":"2023-09-25T07:49:37.708706Z"}]}`.
Prices and quantities are bare numbers. trade_id counts the trades of a pair. A subscription is answered with a
snapshot: the latest 50 trades, which are trades like others. A heartbeat comes about every second in which nothing else
does.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from conf.text import brief, shown
from ingestion import fields, history
from ingestion.feeds.subscription import Method, Subscription
from ingestion.feeds.venue import Venue
from ingestion.instruments import Instrument, of_table
from ingestion.pairs import Pair, rows_with
from ingestion.rest import Rest, RestBusy, RestRefused
from ingestion.ticks import Control, Event, Ignored, Reject, Tick

URL = "wss://ws.kraken.com/v2"

# REST has its own names of two currencies.
REST_NAMES = {"BTC": "XBT", "DOGE": "XDG"}
_SYMBOLS = {name: symbol for symbol, name in REST_NAMES.items()}

_already = re.compile("already subscribed", re.IGNORECASE).search

# Errors that stay: the question is wrong. All others pass, as EGeneral:Temporary lockout, EGeneral:Internal error,
# EService:Unavailable or EAPI:Rate limit exceeded; W is a warning.
# https://docs.kraken.com/api/docs/guides/spot-errors
_REFUSALS = (
    "EQuery:",
    "EGeneral:Invalid arg",
    "EGeneral:Permission",
    "EGeneral:Unknown method",
    "EAPI:Invalid",
    "EAPI:Bad",
)

_FIELDS = ("trade_id", "price", "qty", "timestamp")
_OTHER_CHANNELS = {"status", "ticker", "book", "level3", "ohlc", "instrument"}


class Kraken:
    """The trades of some instruments, on one connection."""

    name = "kraken"
    has_trade_ids = True
    silence_seconds = 4.0
    connection_lifetime_seconds: float | None = None
    # Kraken documents no number ("Exceeded msg rate" depends on its load), so this is a cautious one.
    # https://docs.kraken.com/api/docs/guides/spot-ratelimits
    request_seconds = 0.3

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None) -> None:
        self.url = url or URL
        self._pairs = Subscription(instruments, lambda instrument: instrument.symbol, _request)

    def opening_frames(self) -> Sequence[str]:
        return self._pairs.opening(self._pairs.names)

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._pairs.add(instruments)

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._pairs.remove(instruments)

    @property
    def refused(self) -> Mapping[str, str]:
        return self._pairs.refused

    def ask_refused(self) -> Sequence[str]:
        return self._pairs.ask_refused()

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        message = fields.message(self.name, frame, received_ns)
        if isinstance(message, Reject):
            return [message]
        channel, trades = message.get("channel"), message.get("data")
        if channel == "trade":
            if not isinstance(trades, list):
                return [Reject(received_ns, self.name, f"the trade channel's data is {brief(trades)}", frame)]
            return [self._trade(trade, frame, received_ns) for trade in trades]
        if channel == "heartbeat":
            return [Control("heartbeat")]
        if isinstance(channel, str):
            return [Ignored(channel if channel in _OTHER_CHANNELS else "another channel")]
        if "method" in message or "error" in message:
            if message.get("error") is not None or message.get("success") is False:
                return [self._error(message)]
            return [Control("subscribed")]
        return [Reject(received_ns, self.name, "neither a channel's message nor a reply", frame)]

    def _error(self, message: dict[str, object]) -> Control:
        """A reply is about one symbol where it names one; else about its whole request."""
        reason, symbol = brief(message.get("error")), message.get("symbol")
        if message.get("method") == "unsubscribe":
            return Control("error", reason)
        if isinstance(symbol, str) and self._pairs.find(symbol) is not None:
            if _already(str(message.get("error"))):
                return Control("subscribed")
            return self._pairs.refuse([symbol], reason, others_too=False)
        return self._pairs.refuse_request(message.get("req_id"), reason)

    def _trade(self, trade: object, frame: bytes, received_ns: int) -> Event:
        if not isinstance(trade, dict):
            return Reject(received_ns, self.name, f"a trade is {brief(trade)}", frame)
        instrument = self._pairs.find(trade.get("symbol"))
        if instrument is None:
            return Reject(received_ns, self.name, f"unknown symbol {brief(trade.get('symbol'))}", frame)
        event_ns = fields.utc_ns(trade.get("timestamp"))
        return fields.trade(self.name, instrument, trade, _FIELDS, event_ns, frame, received_ns)


def _request(method: Method, symbols: list[str], number: int) -> dict[str, object]:
    return {"method": method, "params": {"channel": "trade", "symbol": symbols, "snapshot": True}, "req_id": number}


async def _pages(rest: Rest, trades: history.Trades, now_ns: Callable[[], int]) -> AsyncIterator[list[Tick | Reject]]:
    """Since a time in nanoseconds, oldest first; about one request a second."""
    if trades.before_ns is None:
        raise RestRefused("Kraken is asked by time, and the time of the trade before the gap is not known")
    base, _, quote = trades.instrument.symbol.partition("/")
    pair = f"{REST_NAMES.get(base, base)}{quote}"
    since = trades.before_ns - 1
    while True:
        answer = await rest.get("/0/public/Trades", {"pair": pair, "since": since, "count": history.PAGE})
        page, last = _past_trades(answer)
        names = ("id", "price", "volume", "time")
        ticks = [history.trade(Kraken.name, trades, row, names, event_ns, now_ns()) for row, event_ns in page]
        if ticks:
            yield ticks
        if not ticks or last <= since or max(tick.trade_id or 0 for tick in ticks) >= trades.last:
            return
        since = last


def _past_trades(answer: object) -> tuple[list[tuple[dict[str, object], int | None]], int]:
    """The trades of an answer with their times, and from where to go on."""
    if not isinstance(answer, dict):
        raise RestBusy("the answer is not an object")
    errors = answer.get("error")
    if isinstance(errors, list) and errors:
        text = shown(", ".join(map(str, errors)))
        if any(str(one).startswith(_REFUSALS) for one in errors):
            raise RestRefused(text)
        if any(not str(one).startswith("W") for one in errors):
            raise RestBusy(text)
    result = answer.get("result")
    if not isinstance(result, dict) or not str(result.get("last", "")).isdecimal():
        raise RestBusy("the answer has no trades")
    trades = next((rows for name, rows in result.items() if name != "last" and isinstance(rows, list)), [])
    rows: list[tuple[dict[str, object], int | None]] = []
    for trade in trades:
        if not isinstance(trade, list) or len(trade) < 7:
            raise RestBusy("a trade of the answer has not seven fields")
        row = {"price": trade[0], "volume": trade[1], "time": trade[2], "id": trade[6]}
        rows.append((row, fields.epoch_ns(trade[2])))
    return rows, int(str(result["last"]))


async def _pairs(rest: Rest) -> list[Pair]:
    """https://docs.kraken.com: GET /0/public/AssetPairs. Its wsname is v1's: v2 says BTC for XBT and DOGE for XDG."""
    answer = await rest.get("/0/public/AssetPairs", {})
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, dict):
        raise RestBusy("/0/public/AssetPairs: the answer has no result")
    pairs = []
    for row in rows_with(list(result.values())):
        base, separator, quote = str(row.get("wsname", "")).partition("/")
        if separator and row.get("status") == "online":
            base = _SYMBOLS.get(base, base)
            pairs.append((f"{base}/{quote}", base, quote))
    return pairs


VENUE = Venue(
    name=Kraken.name,
    instruments=of_table("{ticker}/USD", "USD", without=("binance-coin",)),
    contiguous_ids=True,
    feed=lambda instruments, url, _: Kraken(instruments, url),
    # Kraken documents no numbers for its public feed: these are cautious ones.
    most_instruments=300,
    attempts=(100, 600.0),
    rest_url="https://api.kraken.com",
    history=history.History(1.0, _pages),
    pairs=_pairs,
)
