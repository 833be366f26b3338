"""Which instruments to follow: the named assets, the largest by market capitalisation, or all that a venue has.

    named   those of the setting `assets`, by the one table of names
    top     the setting `top_assets` largest by CoinCap's REST, /v3/assets, of those that the venue trades
    all     every pair of a venue that is quoted in USD or USDT and traded now, by the venue's REST

A symbol of the table has the table's name for its asset. For another one the name is CoinCap's, if CoinCap's list tells
it, else the venue's base currency in lower case; with the venue's name behind it where the table means another asset.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from conf.settings import Settings
from ingestion.connection import Connection
from ingestion.feeds import FEEDS, Feed, coincap, named_instruments
from ingestion.gaps import GapTracker
from ingestion.history import KRAKEN_NAMES, VENUES
from ingestion.instruments import INSTRUMENTS, NAME, Instrument
from ingestion.rest import Rest, RestBusy, RestRefused

log = logging.getLogger(__name__)

COINCAP_URL = "https://rest.coincap.io"
# Two lists at a start, and then one now and then.
LEAST_SECONDS = 1.0
QUOTES = ("USD", "USDT")
_KRAKEN_SYMBOLS = {name: symbol for symbol, name in KRAKEN_NAMES.items()}

Pair = tuple[str, str, str]
"""A venue's symbol, and its base and quote currency."""


class Discovery:
    """What one feed is to follow, by the settings."""

    def __init__(self, settings: Settings, feed: str, *, some: bool = False) -> None:
        """`some`: of the named assets those that the venue trades, as long as there are any."""
        self._settings = settings
        self._feed = feed
        self._some = some

    async def find(self) -> list[Instrument]:
        """What is to be followed now.

        Raises RestBusy or RestRefused, or SettingsError for an asset that is not traded.
        """
        if self._settings.discover == "named":
            assets = self._settings.assets
            traded = INSTRUMENTS.get(self._feed, {})
            if self._some and self._feed != "coincap":
                assets = [asset for asset in assets if asset in traded] or assets
            return named_instruments(self._feed, assets)
        if self._feed not in FEEDS:
            return named_instruments(self._feed, [])
        if self._settings.discover == "all":
            if self._feed == "coincap":
                return named_instruments(self._feed, [coincap.ALL])
            return _named(self._feed, await self._pairs(), {})
        ranked = await self._ranked()
        if self._feed == "coincap":
            return [Instrument(slug, slug, "USD") for slug, _ in ranked]
        by_asset: dict[str, Instrument] = {}
        for instrument in _named(self._feed, await self._pairs(), {ticker: slug for slug, ticker in ranked[::-1]}):
            known = by_asset.get(instrument.asset)
            # One symbol an asset: the table's own quote before others.
            if known is None or instrument == INSTRUMENTS[self._feed].get(instrument.asset):
                by_asset[instrument.asset] = instrument
        return [by_asset[slug] for slug, _ in ranked if slug in by_asset]

    async def _ranked(self) -> list[tuple[str, str]]:
        """CoinCap's names and tickers of the largest assets, largest first."""
        key = self._settings.coincap_api_key
        bearer = None if key is None else key.get_secret_value()
        async with Rest(self._settings.rest_urls.get("coincap", COINCAP_URL), LEAST_SECONDS, bearer) as rest:
            answer = await rest.get("/v3/assets", {"limit": self._settings.top_assets})
        rows = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(rows, list):
            raise RestBusy("/v3/assets: the answer has no list of assets")
        found = [(row.get("id"), row.get("symbol")) for row in rows if isinstance(row, dict)]
        return [
            (slug, ticker)
            for slug, ticker in found
            if isinstance(slug, str) and isinstance(ticker, str) and NAME.fullmatch(slug)
        ][: self._settings.top_assets]

    async def _pairs(self) -> list[Pair]:
        url = self._settings.rest_urls.get(self._feed, VENUES[self._feed].url)
        async with Rest(url, LEAST_SECONDS) as rest:
            pairs = await PAIRS[self._feed](rest)
        return [pair for pair in pairs if pair[2] in QUOTES and NAME.fullmatch(pair[0])]


async def binance_pairs(rest: Rest) -> list[Pair]:
    """https://developers.binance.com: GET /api/v3/exchangeInfo."""
    answer = await rest.get("/api/v3/exchangeInfo", {"permissions": "SPOT"})
    rows = answer.get("symbols") if isinstance(answer, dict) else None
    return [
        (str(row["symbol"]), str(row["baseAsset"]), str(row["quoteAsset"]))
        for row in _objects(rows, "symbol", "baseAsset", "quoteAsset")
        if row.get("status") == "TRADING"
    ]


async def coinbase_pairs(rest: Rest) -> list[Pair]:
    """https://docs.cdp.coinbase.com/exchange: GET /products."""
    return [
        (str(row["id"]), str(row["base_currency"]), str(row["quote_currency"]))
        for row in _objects(await rest.get("/products", {}), "id", "base_currency", "quote_currency")
        if row.get("status") == "online" and not row.get("trading_disabled")
    ]


async def kraken_pairs(rest: Rest) -> list[Pair]:
    """https://docs.kraken.com: GET /0/public/AssetPairs. Its wsname is v1's: v2 says BTC for XBT and DOGE for XDG."""
    answer = await rest.get("/0/public/AssetPairs", {})
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, dict):
        raise RestBusy("/0/public/AssetPairs: the answer has no result")
    pairs = []
    for row in _objects(list(result.values())):
        base, separator, quote = str(row.get("wsname", "")).partition("/")
        if separator and row.get("status") == "online":
            base = _KRAKEN_SYMBOLS.get(base, base)
            pairs.append((f"{base}/{quote}", base, quote))
    return pairs


PAIRS: dict[str, Callable[[Rest], Awaitable[list[Pair]]]] = {
    "binance": binance_pairs,
    "coinbase": coinbase_pairs,
    "kraken": kraken_pairs,
}


def _objects(rows: object, *names: str) -> list[dict[str, object]]:
    """The rows that are objects with these fields as text. Raises RestBusy where there is no list."""
    if not isinstance(rows, list):
        raise RestBusy("the answer has no list of pairs")
    return [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)]


def _named(venue: str, pairs: Sequence[Pair], names: dict[str, str]) -> list[Instrument]:
    """Instruments with canonical names; `names` are those that tickers have elsewhere."""
    # A base currency that the table knows keeps its name in every quote.
    bases = {
        instrument.symbol.removesuffix(instrument.quote).rstrip("-/"): asset
        for asset, instrument in INSTRUMENTS[venue].items()
    }
    taken = {asset for instruments in INSTRUMENTS.values() for asset in instruments}
    found = []
    for symbol, base, quote in pairs:
        asset = bases.get(base)
        if asset is None:
            asset = names.get(base)
            # The table's own assets are those that it names, and no others.
            if asset is None or asset in taken:
                asset = base.lower()
                asset = f"{asset}-{venue}" if asset in taken else asset
        if NAME.fullmatch(asset):
            found.append(Instrument(asset, symbol, quote))
    return found


class Refresh:
    """Keeps a feed on what discovery finds, while it runs."""

    def __init__(
        self,
        discovery: Discovery,
        feed: Feed,
        connection: Callable[[], Connection | None],
        tracker: GapTracker,
        seconds: float,
    ) -> None:
        """`connection` is the one that there is now."""
        self._discovery = discovery
        self._feed = feed
        self._connection = connection
        self._tracker = tracker
        self._seconds = seconds
        self._followed: dict[str, Instrument] = {}

    def instrument(self, symbol: str) -> Instrument | None:
        """What is followed under this symbol."""
        return self._followed.get(symbol)

    def begin(self, instruments: Sequence[Instrument]) -> None:
        """What the feed follows from the start."""
        self._followed = {instrument.symbol: instrument for instrument in instruments}
        log.info("%s: following %d symbols", self._feed.name, len(instruments))

    async def run(self) -> None:
        """Until cancelled: look again every so often. Where the list cannot be had, the old one stays."""
        while True:
            await asyncio.sleep(self._seconds)
            try:
                found = await self._discovery.find()
            except (RestBusy, RestRefused) as error:
                log.warning("%s: the assets cannot be looked up: %s; the old ones stay", self._feed.name, error)
                continue
            if not found:
                log.warning("%s: the assets' list is empty; the old ones stay", self._feed.name)
                continue
            await self.follow(found)

    async def follow(self, instruments: Sequence[Instrument]) -> None:
        """Subscribe to what is new and unsubscribe from what is not wanted any more; the others notice nothing."""
        wanted = {instrument.symbol: instrument for instrument in instruments}
        added = [wanted[symbol] for symbol in wanted if symbol not in self._followed]
        left = [self._followed[symbol] for symbol in self._followed if symbol not in wanted]
        if not added and not left:
            return
        log.info("%s: %d symbols more, %d fewer", self._feed.name, len(added), len(left))
        for instrument in (*added, *left):
            self._tracker.follow_anew(self._feed.name, instrument.symbol)
        self._followed = wanted
        answers = [self._feed.subscribe(added)] if added else []
        answers += [self._feed.unsubscribe(left)] if left else []
        connection = self._connection()
        if connection is None:
            # The next one will have it.
            return
        if None in answers:
            connection.renew("other assets are wanted")
        for texts in answers:
            for text in texts or ():
                await connection.send(text)
