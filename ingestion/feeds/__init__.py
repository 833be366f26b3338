"""Venues: what is particular to each is one module here; all else reads it from VENUES."""

from __future__ import annotations

from collections.abc import Sequence

from conf.settings import SettingsError
from ingestion.feeds import binance, coinbase, coincap, kraken
from ingestion.feeds.venue import Feed, Venue
from ingestion.instruments import Instrument

__all__ = ["VENUES", "Feed", "Venue", "feed_of", "make_feed", "named_instruments"]

VENUES: dict[str, Venue] = {module.VENUE.name: module.VENUE for module in (binance, coinbase, kraken, coincap)}


def named_instruments(name: str, assets: Sequence[str]) -> list[Instrument]:
    """What the named venue calls these assets. One whose names are the canonical ones also has its `all_symbol`.

    Raises SettingsError if there is no such venue, or it does not trade one of the assets.
    """
    venue = VENUES.get(name)
    if venue is None:
        raise SettingsError(f"feed = {name!r}: there is no such feed; there are: {', '.join(VENUES)}")
    instruments = venue.instruments
    if venue.all_symbol is not None:
        instruments = {asset: Instrument(asset, asset, "USD") for asset in assets}
        if venue.all_symbol in instruments and len(instruments) > 1:
            raise SettingsError(f"assets: {venue.all_symbol} stands alone")
    unknown = [asset for asset in assets if asset not in instruments]
    if unknown:
        raise SettingsError(f"assets: {name} has no {', '.join(unknown)}; it has: {', '.join(instruments)}")
    return [instruments[asset] for asset in dict.fromkeys(assets)]


def feed_of(name: str, instruments: Sequence[Instrument], url: str | None = None, api_key: str | None = None) -> Feed:
    """The named venue's feed of these instruments, at its own address or at `url`. Only CoinCap takes a key."""
    return VENUES[name].feed(instruments, url, api_key)


def make_feed(name: str, assets: Sequence[str], url: str | None = None, api_key: str | None = None) -> Feed:
    """The named venue's feed of these assets.

    Raises SettingsError if there is no such feed, or it does not trade one of the assets.
    """
    return feed_of(name, named_instruments(name, assets), url, api_key)
