"""Coinbase Exchange: matches, ticker and heartbeat by subscription; trades by cursor, and products."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

from ingestion.ticks import utc
from simulator.dialects import NOT_FOUND, Answer, Listing, Reply, number
from simulator.frames import Frame
from simulator.history import Execution
from simulator.market import Trade

CHANNELS = ("matches", "ticker", "heartbeat")


class Coinbase:
    path = "/"
    heartbeat_seconds: float | None = 1.0
    most_streams: int | None = None
    message_limit: tuple[int, float] | None = (20, 1.0)
    patience_seconds: float | None = 5.0
    rest_limit = (10, 1.0)

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        # Counts orders too at the real venue: here every other number is an order's.
        self._sequence = itertools.count(90_000_000, 2)

    def frames(self, trades: Iterator[Trade], opened_ms: int) -> Iterator[Frame]:
        for trade in trades:
            if not self._listing.sends(trade.asset):
                continue
            product = self._listing.symbols[trade.asset]
            execution, sequence = Execution(trade, opened_ms + trade.at_ms), next(self._sequence)
            at_ns = trade.at_ms * 1_000_000
            yield Frame(at_ns, f"{product}@matches", _match("match", product, execution, sequence), (execution,))
            ticker = {
                "type": "ticker",
                "sequence": sequence,
                "product_id": product,
                "price": trade.price,
                "side": "sell" if trade.buyer_is_maker else "buy",
                "time": _time(execution),
                "trade_id": trade.trade_id,
                "last_size": trade.quantity,
            }
            yield Frame(at_ns, f"{product}@ticker", json.dumps(ticker, separators=(",", ":")))

    def hello(self, query: Mapping[str, Sequence[str]]) -> Answer:
        return Answer()

    def answer(self, text: str | bytes, streams: set[str]) -> Answer:
        try:
            request = json.loads(text)
            kind, products = request["type"], [str(product) for product in request["product_ids"]]
            channels = [str(channel) for channel in request["channels"]]
        except (ValueError, KeyError, TypeError) as error:
            return Answer([_error("Malformed JSON", str(error))])
        refused = [product for product in products if self._listing.refuses(product)]
        if refused:
            why = "delisted" if refused[0] in self._listing.asset_of else "not a valid product"
            return Answer([_error("Failed to subscribe", f"{refused[0]} is {why}")])
        if kind not in ("subscribe", "unsubscribe") or not set(channels) <= set(CHANNELS):
            return Answer([_error("Failed to subscribe", f"{kind} {channels} is not known")])
        channel_streams = {f"{product}@{channel}" for product in products for channel in channels}
        after = streams | channel_streams if kind == "subscribe" else streams - channel_streams
        having = {
            channel: sorted(one.partition("@")[0] for one in after if one.endswith(channel)) for channel in CHANNELS
        }
        texts = [
            json.dumps(
                {
                    "type": "subscriptions",
                    "channels": [{"name": name, "product_ids": have} for name, have in having.items() if have],
                }
            )
        ]
        if kind == "unsubscribe":
            return Answer(texts, unsubscribe=sorted(channel_streams))
        if "matches" in channels:
            for product in products:
                for execution in self._listing.history.latest(self._listing.asset_of[product], 1):
                    texts.append(_match("last_match", product, execution, 0))
        return Answer(texts, subscribe=sorted(channel_streams))

    def heartbeats(self, streams: set[str]) -> Sequence[str]:
        texts = []
        for stream in sorted(streams):
            product, _, channel = stream.partition("@")
            latest = self._listing.history.latest(self._listing.asset_of[product], 1)
            if channel == "heartbeat" and latest:
                heartbeat = {
                    "type": "heartbeat",
                    "sequence": 0,
                    "last_trade_id": latest[-1].trade.trade_id,
                    "product_id": product,
                    "time": _time(latest[-1]),
                }
                texts.append(json.dumps(heartbeat, separators=(",", ":")))
        return texts

    def rest(self, path: str, query: Mapping[str, Sequence[str]]) -> Reply:
        if path == "/products":
            return Reply(200, [_product(product) for product in self._listing.listed()])
        place = path.split("/")
        if len(place) == 4 and place[1] == "products" and place[3] == "trades":
            return self._trades(place[2], query)
        return NOT_FOUND

    def _trades(self, product: str, query: Mapping[str, Sequence[str]]) -> Reply:
        asset = self._listing.asset_of.get(product)
        if asset is None:
            return NOT_FOUND
        count = min(number(query, "limit", 1000), 1000)
        history = self._listing.history
        executions = (
            history.before_id(asset, number(query, "after", 0), count)
            if "after" in query
            else history.latest(asset, count)
        )
        trades = [
            {
                "trade_id": execution.trade.trade_id,
                "side": _side(execution.trade),
                "size": execution.trade.quantity,
                "price": execution.trade.price,
                "time": _time(execution),
            }
            for execution in reversed(executions)
        ]
        cursors = {"CB-BEFORE": str(trades[0]["trade_id"]), "CB-AFTER": str(trades[-1]["trade_id"])} if trades else {}
        return Reply(200, trades, cursors)

    def too_many_requests(self) -> Reply:
        return Reply(429, {"message": "Public rate limit exceeded"})


def _match(kind: str, product: str, execution: Execution, sequence: int) -> str:
    trade = execution.trade
    return (
        f'{{"type":"{kind}","trade_id":{trade.trade_id},"maker_order_id":"00000000-0000-0000-0000-000000000001",'
        f'"taker_order_id":"00000000-0000-0000-0000-000000000002","side":"{_side(trade)}","size":"{trade.quantity}",'
        f'"price":"{trade.price}","product_id":"{product}","sequence":{sequence},"time":"{_time(execution)}"}}'
    )


def _side(trade: Trade) -> str:
    """The maker's side."""
    return "buy" if trade.buyer_is_maker else "sell"


def _time(execution: Execution) -> str:
    return utc(execution.at_ms * 1_000_000)


def _error(message: str, reason: str) -> str:
    return json.dumps({"type": "error", "message": message, "reason": reason})


def _product(product: str) -> dict[str, object]:
    base, _, quote = product.partition("-")
    return {
        "id": product,
        "base_currency": base,
        "quote_currency": quote,
        "status": "online",
        "trading_disabled": False,
    }
