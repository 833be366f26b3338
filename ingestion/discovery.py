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
from collections.abc import Sequence

from conf.settings import Settings
from conf.text import brief
from ingestion.feeds import VENUES, Venue, coincap, named_instruments
from ingestion.gaps import GapTracker
from ingestion.instruments import NAME, QUOTES, TICKERS, Instrument
from ingestion.pairs import Pair
from ingestion.proxies import proxy_of
from ingestion.rest import LARGEST_LIST, Rest, RestBusy, RestRefused
from ingestion.source import Source

log = logging.getLogger(__name__)

# Two lists at a start, and then one now and then.
LEAST_SECONDS = 1.0
NAMED_AT_MOST = 20


class Discovery:
    """What one feed is to follow, by the settings."""

    def __init__(self, settings: Settings, feed: str, *, some: bool = False) -> None:
        """`some`: of the named assets those that the venue trades, as long as there are any."""
        self._settings = settings
        self._feed = feed
        self._some = some
        self._odd_names: list[str] = []
        self.left_out: tuple[str, ...] = ()
        """Names that the contract does not take, so that nobody follows them; fit for a log line."""

    async def find(self) -> list[Instrument]:
        """What is to be followed now.

        Raises RestBusy or RestRefused, or SettingsError for an asset that is not traded.
        """
        self._odd_names.clear()
        instruments = await self._find()
        self._name_left_out()
        return instruments

    async def _find(self) -> list[Instrument]:
        venue = VENUES.get(self._feed)
        if venue is None:
            return named_instruments(self._feed, [])
        if self._settings.discover == "named":
            assets = self._settings.assets
            if self._some and venue.all_symbol is None:
                assets = [asset for asset in assets if asset in venue.instruments] or assets
            return named_instruments(self._feed, assets)
        if self._settings.discover == "all":
            if venue.all_symbol is not None:
                return named_instruments(self._feed, [venue.all_symbol])
            return _instruments_of(venue, await self._pairs(venue), {})
        largest = await self._largest_assets()
        if venue.all_symbol is not None:
            return [Instrument(slug, slug, "USD") for slug, _ in largest]
        names = {ticker: slug for slug, ticker in largest[::-1]}
        by_asset: dict[str, Instrument] = {}
        for instrument in _instruments_of(venue, await self._pairs(venue), names):
            other = by_asset.get(instrument.asset)
            # One symbol an asset: the table's own quote before others.
            if other is None or instrument == venue.instruments.get(instrument.asset):
                by_asset[instrument.asset] = instrument
        return [by_asset[slug] for slug, _ in largest if slug in by_asset]

    async def _largest_assets(self) -> list[tuple[str, str]]:
        """CoinCap's names and tickers of the largest assets, largest first."""
        key = self._settings.coincap_api_key
        bearer = None if key is None else key.get_secret_value()
        url = self._settings.rest_urls.get("coincap", coincap.REST_URL)
        async with self._rest(url, bearer) as rest:
            largest = await coincap.largest_assets(rest, self._settings.top_assets)
        self._odd_names.extend([slug for slug, _ in largest if not NAME.fullmatch(slug)])
        return [(slug, ticker) for slug, ticker in largest if NAME.fullmatch(slug)]

    def _rest(self, url: str, bearer: str | None = None, market_data_url: str | None = None) -> Rest:
        return Rest(
            url,
            LEAST_SECONDS,
            bearer,
            proxy=proxy_of(url, self._settings.venue_proxy),
            market_data_url=market_data_url,
            largest_answer=LARGEST_LIST,
        )

    async def _pairs(self, venue: Venue) -> list[Pair]:
        assert venue.pairs is not None, "a venue without all_symbol has them"
        url = self._settings.rest_urls.get(venue.name, venue.rest_url)
        other = self._settings.market_data_urls.get(venue.name, venue.market_data_url)
        async with self._rest(url, market_data_url=other) as rest:
            pairs = await venue.pairs(rest)
        wanted = [pair for pair in pairs if pair[2] in QUOTES]
        self._odd_names.extend([symbol for symbol, _, _ in wanted if not NAME.fullmatch(symbol)])
        return [pair for pair in wanted if NAME.fullmatch(pair[0])]

    def _name_left_out(self) -> None:
        """Say which names are not followed, where they are others than the last time."""
        before, self.left_out = self.left_out, tuple(map(brief, self._odd_names))
        if self.left_out and self.left_out != before:
            log.warning(
                "%s: left out %d instruments whose names are not 1 to 64 of A-Z a-z 0-9 / . _ -: %s",
                self._feed,
                len(self.left_out),
                ", ".join(self.left_out[:NAMED_AT_MOST]),
            )


def _instruments_of(venue: Venue, pairs: Sequence[Pair], names: dict[str, str]) -> list[Instrument]:
    """Instruments with canonical names; `names` are those that tickers have elsewhere."""
    # A base currency that the table knows keeps its name in every quote.
    bases = {TICKERS[asset]: asset for asset in venue.instruments}
    instruments = []
    for symbol, base, quote in pairs:
        asset = bases.get(base)
        if asset is None:
            asset = names.get(base)
            # The table's own assets are those that it names, and no others.
            if asset is None or asset in TICKERS:
                asset = base.lower()
                asset = f"{asset}-{venue.name}" if asset in TICKERS else asset
        if not NAME.fullmatch(asset):
            # The venue's symbol is fit to be a name where its currency is not.
            asset = symbol.lower()
        instruments.append(Instrument(asset, symbol, quote))
    return instruments


class Refresh:
    """Keeps a feed on what discovery finds, while it runs."""

    def __init__(
        self,
        discovery: Discovery,
        source: Source,
        tracker: GapTracker,
        seconds: float,
    ) -> None:
        self._discovery = discovery
        self._source = source
        self._tracker = tracker
        self._seconds = seconds
        self._followed: dict[str, Instrument] = {}

    def instrument(self, symbol: str) -> Instrument | None:
        """What is followed under this symbol."""
        return self._followed.get(symbol)

    def begin(self, instruments: Sequence[Instrument]) -> None:
        """What the feed follows from the start."""
        self._followed = {instrument.symbol: instrument for instrument in instruments}
        all_symbol = VENUES[self._source.name].all_symbol
        self._source.liveness.follow(each for each in instruments if each.symbol != all_symbol)
        log.info("%s: following %d symbols", self._source.name, len(instruments))

    async def run(self, *, look_up: bool = True) -> None:
        """Until cancelled, every so often: ask again for what the venue has refused, and look the assets up again.

        Where the list cannot be had, the old one stays. Without `look_up` it always does.
        """
        while True:
            await asyncio.sleep(self._seconds)
            self._source.ask_refused()
            if look_up:
                await self._look_up()

    async def _look_up(self) -> None:
        try:
            instruments = await self._discovery.find()
        except (RestBusy, RestRefused) as error:
            log.warning("%s: the assets cannot be looked up: %s; the old ones stay", self._source.name, error)
            return
        if not instruments:
            log.warning("%s: the assets' list is empty; the old ones stay", self._source.name)
            return
        self.follow(instruments)

    def follow(self, instruments: Sequence[Instrument]) -> None:
        """Subscribe to what is new and unsubscribe from what is not wanted any more; the others notice nothing."""
        wanted = {instrument.symbol: instrument for instrument in instruments}
        added = [wanted[symbol] for symbol in wanted if symbol not in self._followed]
        left = [self._followed[symbol] for symbol in self._followed if symbol not in wanted]
        if not added and not left:
            return
        log.info("%s: %d symbols more, %d fewer", self._source.name, len(added), len(left))
        for instrument in (*added, *left):
            self._tracker.follow_anew(self._source.name, instrument.symbol)
        self._followed = wanted
        self._source.follow(added, left)
