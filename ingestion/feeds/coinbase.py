"""Coinbase Exchange: the channels matches, ticker and heartbeat.

A match is one trade:
`{"type":"match","trade_id":10,"sequence":50,"maker_order_id":"...","taker_order_id":"...","time":"2014-11-07T08:19:27.028459Z",
"product_id":"BTC-USD","size":"5.23512","price":"400.23","side":"sell"}`.
trade_id has no holes per product; sequence counts other messages too. The answer to a subscription is a `last_match` a
product, the latest trade before it. Heartbeats (one a second and product) and tickers tell the latest trade's id, which
is how a missing last trade is noticed. Who has not subscribed within 5 s is cut off. The latest trade's id in a
heartbeat was seen to be always 0: then it says nothing.
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
from ingestion.ticks import ID_LIMIT, Control, Event, Ignored, Reject, Tick

URL = "wss://ws-feed.exchange.coinbase.com"
CHANNELS = ("matches", "ticker", "heartbeat")

# An error's text is searched for products so far.
ERROR_LENGTH = 10_000
_product = re.compile(r"\b[A-Z0-9]{1,32}-[A-Z0-9]{1,32}\b")

_FIELDS = ("trade_id", "price", "size", "time")
_OTHER_TYPES = {
    "snapshot", "l2update", "status", "received", "open", "done", "change", "activate", "auction", "rfq_matches"
}  # fmt: skip


class Coinbase:
    """The trades of some instruments, on one connection."""

    name = "coinbase"
    has_trade_ids = True
    # A heartbeat comes every second.
    silence_seconds = 4.0
    connection_lifetime_seconds: float | None = None
    # 8 requests a second and IP. https://docs.cdp.coinbase.com/exchange/websocket-feed/rate-limits
    request_seconds = 0.15

    def __init__(self, instruments: Sequence[Instrument], url: str | None = None) -> None:
        self.url = url or URL
        self._products = Subscription(instruments, lambda instrument: instrument.symbol, _request)
        self._confirmed: set[str] = set()

    def opening_frames(self) -> Sequence[str]:
        self._confirmed.clear()
        return self._products.opening(self._products.names)

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._products.add(instruments)

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str]:
        return self._products.remove(instruments)

    @property
    def refused(self) -> Mapping[str, str]:
        return self._products.refused

    def ask_refused(self) -> Sequence[str]:
        return self._products.ask_refused()

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        message = fields.message(self.name, frame, received_ns)
        if isinstance(message, Reject):
            return [message]
        kind = message.get("type")
        if kind in ("match", "last_match", "ticker", "heartbeat"):
            return [self._of_product(message, frame, received_ns)]
        if kind == "subscriptions":
            self._confirm(message.get("channels"))
            return [Control("subscribed")]
        if kind == "error":
            return [self._error(message)]
        if isinstance(kind, str):
            # New types may come at any time, and a client is to ignore those that it does not know.
            return [Ignored(kind if kind in _OTHER_TYPES else "another type")]
        return [Reject(received_ns, self.name, f"type is {brief(kind)}", frame)]

    def _confirm(self, channels: object) -> None:
        """Note for which products the venue sends the channel of the trades."""
        for channel in channels if isinstance(channels, list) else ():
            if isinstance(channel, dict) and channel.get("name") == CHANNELS[0]:
                products = channel.get("product_ids")
                names = products if isinstance(products, list) else ()
                self._confirmed = {name for name in names if self._products.find(name) is not None}

    def _error(self, message: dict[str, object]) -> Control:
        """A request that names a product which is not to be had is refused as a whole; the reason names the product."""
        reason = f"{brief(message.get('message'))}: {brief(message.get('reason'))}"
        named = _product.findall(f"{message.get('message')} {message.get('reason')}"[:ERROR_LENGTH])
        ours = [name for name in dict.fromkeys(named) if self._products.find(name) is not None]
        if ours:
            return self._products.refuse(ours, reason, others_too=True)
        return Control("error", reason) if named else self._products.refuse_unnamed(reason, self._confirmed)

    def _of_product(self, message: dict[str, object], frame: bytes, received_ns: int) -> Event:
        product = message.get("product_id")
        instrument = self._products.find(product)
        if instrument is None:
            return Reject(received_ns, self.name, f"unknown product {brief(product)}", frame)
        if message["type"] in ("match", "last_match"):
            event_ns = fields.utc_ns(message.get("time"))
            return fields.trade(self.name, instrument, message, _FIELDS, event_ns, frame, received_ns)
        latest = message.get("last_trade_id" if message["type"] == "heartbeat" else "trade_id")
        if type(latest) is not int or not 0 < latest < ID_LIMIT:
            latest = None
        return Control("heartbeat", symbol=instrument.symbol, last_trade_id=latest)


def _request(method: Method, products: list[str], _: int) -> dict[str, object]:
    return {"type": method, "product_ids": products, "channels": list(CHANNELS)}


async def _pages(rest: Rest, trades: history.Trades, now_ns: Callable[[], int]) -> AsyncIterator[list[Tick | Reject]]:
    """Before a cursor, which is a trade id, newest first; 10 requests a second."""
    cursor = trades.last + 1
    while cursor > trades.first:
        query = {"limit": min(history.PAGE, cursor - trades.first), "after": cursor}
        page = history.rows(await rest.get(f"/products/{trades.instrument.symbol}/trades", query))
        ticks = []
        for row in page:
            event_ns = fields.utc_ns(row.get("time"))
            ticks.append(history.trade(Coinbase.name, trades, row, _FIELDS, event_ns, now_ns()))
        lowest = min((tick.trade_id or 0 for tick in ticks), default=0)
        if not ticks or lowest >= cursor:
            return
        # Oldest first, like a feed.
        yield ticks[::-1]
        cursor = lowest


async def _pairs(rest: Rest) -> list[Pair]:
    """https://docs.cdp.coinbase.com/exchange: GET /products."""
    return [
        (str(row["id"]), str(row["base_currency"]), str(row["quote_currency"]))
        for row in rows_with(await rest.get("/products", {}), "id", "base_currency", "quote_currency")
        if row.get("status") == "online" and not row.get("trading_disabled")
    ]


VENUE = Venue(
    name=Coinbase.name,
    instruments=of_table("{ticker}-USD", "USD", without=("binance-coin", "tron")),
    contiguous_ids=True,
    feed=lambda instruments, url, _: Coinbase(instruments, url),
    # "Spread subscriptions over more than one websocket client connection"; 8 requests a second and IP.
    # https://docs.cdp.coinbase.com/exchange/websocket-feed/best-practices, .../rate-limits
    most_instruments=300,
    attempts=(5, 1.0),
    rest_url="https://api.exchange.coinbase.com",
    history=history.History(0.2, _pages),
    pairs=_pairs,
)
