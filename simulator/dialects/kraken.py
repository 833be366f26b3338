"""Kraken: the trade channel of v2 with its snapshot; Trades since a time, and AssetPairs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

from ingestion.ticks import utc
from simulator.dialects import NOT_FOUND, Answer, Listing, Reply, number
from simulator.frames import Frame
from simulator.history import Execution
from simulator.market import Trade

# Currencies that REST calls by another name.
REST_NAMES = {"BTC": "XBT", "DOGE": "XDG"}
SNAPSHOT_TRADES = 50


class Kraken:
    path = "/v2"
    heartbeat_seconds: float | None = 1.0
    most_streams: int | None = None
    message_limit: tuple[int, float] | None = None
    patience_seconds: float | None = None
    rest_limit = (2, 1.5)

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._pairs = {_rest_name(symbol): symbol for symbol in listing.asset_of}

    def frames(self, trades: Iterator[Trade], opened_ms: int) -> Iterator[Frame]:
        """An order's trades share a frame."""
        for (at_ms, asset), fills in itertools.groupby(trades, lambda trade: (trade.at_ms, trade.asset)):
            if self._listing.sends(asset):
                symbol = self._listing.symbols[asset]
                executions = tuple(Execution(trade, opened_ms + at_ms) for trade in fills)
                yield Frame(at_ms * 1_000_000, symbol, _trades("update", symbol, executions), executions)

    def hello(self, query: Mapping[str, Sequence[str]]) -> Answer:
        status = {"api_version": "v2", "connection_id": 1, "system": "online", "version": "2.0.0"}
        return Answer([json.dumps({"channel": "status", "type": "update", "data": [status]})])

    def answer(self, text: str | bytes, streams: set[str]) -> Answer:
        try:
            request = json.loads(text)
            method, params = request["method"], request.get("params", {})
            symbols, snapshot = [str(symbol) for symbol in params.get("symbol", [])], bool(params.get("snapshot"))
            channel = params.get("channel")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Answer([json.dumps({"error": f"Malformed request: {error}", "method": "", "success": False})])
        if method == "ping":
            return Answer([json.dumps({"method": "pong", "req_id": request.get("req_id")})])
        if method not in ("subscribe", "unsubscribe") or channel != "trade":
            return Answer([json.dumps({"error": "Unsupported", "method": method, "success": False})])
        texts, channels = [], []
        for symbol in symbols:
            head = {"method": method, "req_id": request.get("req_id")}
            if self._listing.refuses(symbol):
                reason = f"Currency pair not supported {symbol}"
                texts.append(json.dumps({"error": reason, **head, "success": False, "symbol": symbol}))
                continue
            channels.append(symbol)
            texts.append(json.dumps({**head, "result": {"channel": "trade", "symbol": symbol}, "success": True}))
            if method == "subscribe" and snapshot:
                latest = self._listing.history.latest(self._listing.asset_of[symbol], SNAPSHOT_TRADES)
                if latest:
                    texts.append(_trades("snapshot", symbol, latest))
        return Answer(texts, subscribe=channels) if method == "subscribe" else Answer(texts, unsubscribe=channels)

    def heartbeats(self, streams: set[str]) -> Sequence[str]:
        return ['{"channel":"heartbeat"}'] if streams else []

    def rest(self, path: str, query: Mapping[str, Sequence[str]]) -> Reply:
        if path == "/0/public/AssetPairs":
            return Reply(200, {"error": [], "result": dict(map(_pair, self._listing.listed()))})
        if path != "/0/public/Trades":
            return NOT_FOUND
        pair = query.get("pair", [""])[0]
        if pair not in self._pairs:
            return Reply(200, {"error": ["EQuery:Unknown asset pair"]})
        asset = self._listing.asset_of[self._pairs[pair]]
        since, count = number(query, "since", 0), min(number(query, "count", 1000), 1000)
        executions = self._listing.history.since(asset, since, count)
        last = executions[-1].at_ms * 1_000_000 if executions else since
        # Whoever goes on from `last` must miss none that shares its millisecond.
        same = [one for one in self._listing.history.since(asset, last - 1, 1000) if one.at_ms * 1_000_000 == last]
        ids = {one.trade.trade_id for one in executions}
        executions = [*executions, *(one for one in same if one.trade.trade_id not in ids and executions)]
        trades = [
            [
                one.trade.price,
                one.trade.quantity,
                one.at_ms / 1000,
                "s" if one.trade.buyer_is_maker else "b",
                "l",
                "",
                one.trade.trade_id,
            ]
            for one in executions
        ]
        return Reply(200, {"error": [], "result": {pair: trades, "last": str(last)}})

    def too_many_requests(self) -> Reply:
        return Reply(200, {"error": ["EGeneral:Too many requests"]})


def _trades(kind: str, symbol: str, trades: Sequence[Execution]) -> str:
    data = ",".join(
        f'{{"symbol":"{symbol}","side":"{"sell" if one.trade.buyer_is_maker else "buy"}","price":{one.trade.price},'
        f'"qty":{one.trade.quantity},"ord_type":"limit","trade_id":{one.trade.trade_id},'
        f'"timestamp":"{utc(one.at_ms * 1_000_000)}"}}'
        for one in trades
    )
    return f'{{"channel":"trade","type":"{kind}","data":[{data}]}}'


def _rest_name(symbol: str) -> str:
    base, _, quote = symbol.partition("/")
    return f"{REST_NAMES.get(base, base)}{quote}"


def _pair(symbol: str) -> tuple[str, dict[str, object]]:
    base, _, quote = symbol.partition("/")
    base = REST_NAMES.get(base, base)
    name = f"X{base}Z{quote}" if base == "XBT" else f"{base}{quote}"
    return name, {"altname": f"{base}{quote}", "wsname": f"{base}/{quote}", "quote": f"Z{quote}", "status": "online"}
