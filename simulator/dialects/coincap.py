"""CoinCap: the price list, in parts; assets by market capitalisation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

from ingestion.instruments import TICKERS
from simulator.dialects import NOT_FOUND, Answer, Listing, Reply, number
from simulator.frames import Frame
from simulator.market import ASSETS, MADE_UP, Trade

ALL = "ALL"
# Prices that changed within so long share a frame.
PART_MS = 100


class CoinCap:
    path = "/prices"
    heartbeat_seconds: float | None = None
    most_streams: int | None = None
    message_limit: tuple[int, float] | None = None
    patience_seconds: float | None = None
    rest_limit = (10, 1.0)

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def frames(self, trades: Iterator[Trade], opened_ms: int) -> Iterator[Frame]:
        """For those who want all, what changed; for those who want one asset, that asset's."""
        for part, part_trades in itertools.groupby(trades, lambda trade: trade.at_ms // PART_MS):
            slugs = {
                self._listing.symbols[one.asset]: one.price for one in part_trades if self._listing.sends(one.asset)
            }
            at_ns = (part + 1) * PART_MS * 1_000_000
            if slugs:
                yield Frame(at_ns, ALL, json.dumps(slugs, separators=(",", ":")))
            for slug, price in slugs.items():
                yield Frame(at_ns, slug, f'{{"{slug}":"{price}"}}')

    def hello(self, query: Mapping[str, Sequence[str]]) -> Answer:
        return Answer(subscribe=[slug for slugs in query.get("assets", []) for slug in slugs.split(",")])

    def answer(self, text: str | bytes, streams: set[str]) -> Answer:
        return Answer()

    def heartbeats(self, streams: set[str]) -> Sequence[str]:
        return ()

    def rest(self, path: str, query: Mapping[str, Sequence[str]]) -> Reply:
        return assets(self._listing, query) if path == "/v3/assets" else NOT_FOUND

    def too_many_requests(self) -> Reply:
        return Reply(429, {"error": "You exceeded your requests per minute"})


def assets(listing: Listing, query: Mapping[str, Sequence[str]]) -> Reply:
    """The assets by market capitalisation: here in the order of the listing."""
    at, count = number(query, "offset", 0), min(number(query, "limit", 100), 2000)
    assets = [
        {
            "id": asset,
            "rank": str(rank),
            "symbol": TICKERS.get(asset, asset.upper()),
            "name": asset.title(),
            "priceUsd": str(ASSETS.get(asset, MADE_UP)[0]),
        }
        for rank, asset in enumerate(listing.assets, 1)
    ]
    return Reply(200, {"timestamp": 0, "data": assets[at : at + count]})
