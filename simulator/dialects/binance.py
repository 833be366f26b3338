"""Binance: combined trade streams by address or by SUBSCRIBE; historicalTrades and exchangeInfo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from simulator.dialects import NOT_FOUND, Answer, Listing, Reply, number
from simulator.frames import Frame
from simulator.history import Execution
from simulator.market import Trade


class Binance:
    path = "/stream"
    heartbeat_seconds: float | None = None
    most_streams: int | None = 1024
    message_limit: tuple[int, float] | None = (5, 1.0)
    patience_seconds: float | None = None
    # historicalTrades has a weight of 25 of 6,000 a minute.
    rest_limit = (240, 60.0)

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def frames(self, trades: Iterator[Trade], opened_ms: int) -> Iterator[Frame]:
        symbols = self._listing.symbols
        for trade in trades:
            if not self._listing.sends(trade.asset):
                continue
            symbol, at = symbols[trade.asset], opened_ms + trade.at_ms
            stream = f"{symbol.lower()}@trade"
            maker = "true" if trade.buyer_is_maker else "false"
            yield Frame(
                trade.at_ms * 1_000_000,
                stream,
                f'{{"stream":"{stream}","data":{{"e":"trade","E":{at},"s":"{symbol}","t":{trade.trade_id},'
                f'"p":"{trade.price}","q":"{trade.quantity}","T":{at},"m":{maker},"M":true}}}}',
                (Execution(trade, at),),
            )

    def hello(self, query: Mapping[str, Sequence[str]]) -> Answer:
        return Answer(subscribe=[name for names in query.get("streams", []) for name in names.split("/")])

    def answer(self, text: str | bytes, streams: set[str]) -> Answer:
        try:
            request = json.loads(text)
            method, at = request["method"], request.get("id")
            requested = [str(stream) for stream in request.get("params", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Answer([json.dumps({"error": {"code": 3, "msg": f"Invalid JSON: {error}"}})])
        reply = [json.dumps({"result": None, "id": at})]
        if method == "SUBSCRIBE":
            return Answer(reply, subscribe=requested)
        if method == "UNSUBSCRIBE":
            return Answer(reply, unsubscribe=requested)
        if method == "LIST_SUBSCRIPTIONS":
            return Answer([json.dumps({"result": sorted(streams), "id": at})])
        return Answer(
            [json.dumps({"error": {"code": 2, "msg": f"Invalid request: unknown method {method}"}, "id": at})]
        )

    def heartbeats(self, streams: set[str]) -> Sequence[str]:
        return ()

    def rest(self, path: str, query: Mapping[str, Sequence[str]]) -> Reply:
        if path == "/api/v3/historicalTrades":
            return self._historical_trades(query)
        if path == "/api/v3/exchangeInfo":
            return Reply(200, {"symbols": [_symbol(symbol) for symbol in self._listing.listed()]})
        return NOT_FOUND

    def _historical_trades(self, query: Mapping[str, Sequence[str]]) -> Reply:
        asset = self._listing.asset_of.get(query.get("symbol", [""])[0])
        if asset is None:
            return Reply(400, {"code": -1121, "msg": "Invalid symbol."})
        count = min(number(query, "limit", 500), 1000)
        history = self._listing.history
        executions = (
            history.from_id(asset, number(query, "fromId", 0), count)
            if "fromId" in query
            else history.latest(asset, count)
        )
        trades = [
            {
                "id": execution.trade.trade_id,
                "price": execution.trade.price,
                "qty": execution.trade.quantity,
                "time": execution.at_ms,
                "isBuyerMaker": execution.trade.buyer_is_maker,
                "isBestMatch": True,
            }
            for execution in executions
        ]
        return Reply(200, trades, {"X-MBX-USED-WEIGHT-1M": "25"})

    def too_many_requests(self) -> Reply:
        return Reply(429, {"code": -1003, "msg": "Too much request weight used."}, {"Retry-After": "1"})


def _symbol(symbol: str) -> dict[str, object]:
    return {
        "symbol": symbol,
        "status": "TRADING",
        "baseAsset": symbol.removesuffix("USDT"),
        "quoteAsset": "USDT",
        "isSpotTradingAllowed": True,
    }
