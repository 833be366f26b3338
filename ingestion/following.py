"""What an ingester follows: its feeds, each with the instruments that discovery has found for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial

from conf.settings import Settings, SettingsError
from ingestion.discovery import Discovery
from ingestion.errors import VenueRefused
from ingestion.feeds import VENUES, Feed, feed_of
from ingestion.gaps import GapTracker
from ingestion.instruments import Instrument
from ingestion.rest import RestBusy, RestRefused

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Followed:
    """A feed, what it follows at the start, and who looks that up again."""

    feed: Feed
    """Of all its instruments; several connections that share them have feeds by `make_feed`."""
    make_feed: Callable[[Sequence[Instrument]], Feed]
    instruments: list[Instrument]
    discovery: Discovery
    rest_url: str | None
    """Of the past trades. A feed at another address than its venue's own has none but the one that is set: a simulated
    venue's gaps are not to be filled with real trades."""
    market_data_url: str | None
    """Asked instead where that one is closed for legal reasons."""

    @property
    def symbols(self) -> Container[str]:
        symbols = {instrument.symbol for instrument in self.instruments}
        return _Every() if VENUES[self.feed.name].all_symbol in symbols else symbols


class _Every:
    """Holds every symbol."""

    def __contains__(self, symbol: object) -> bool:
        return True


async def find_feeds(settings: Settings) -> list[Followed]:
    """The preferred venue and those that may take over, with what each is to follow.

    Waits while a list cannot be had. A venue that refuses its list is left out. Raises SettingsError, or VenueRefused
    where no venue is left.
    """
    names = [settings.feed, *settings.fallback_feeds]
    if len(set(names)) < len(names) or not set(settings.fallback_urls) <= set(settings.fallback_feeds):
        raise SettingsError("fallback_feeds and fallback_urls name other venues than feed, each once")
    key = None if settings.coincap_api_key is None else settings.coincap_api_key.get_secret_value()
    sources: list[Followed] = []
    refusal: VenueRefused | None = None
    for name in names:
        discovery = Discovery(settings, name, some=name != settings.feed)
        url = settings.url if name == settings.feed else settings.fallback_urls.get(name)
        try:
            instruments = await _find(discovery, name)
        except VenueRefused as error:
            log.error("%s", error)
            refusal = error
            continue
        venue = VENUES[name]
        own = venue.rest_url if url is None and venue.history is not None else None
        rest_url = settings.rest_urls.get(name, own)
        market_data_url = settings.market_data_urls.get(name, venue.market_data_url if rest_url == own else None)
        make_feed = partial(feed_of, name, url=url, api_key=key)
        sources.append(Followed(make_feed(instruments), make_feed, instruments, discovery, rest_url, market_data_url))
    if refusal is not None and not sources:
        raise refusal
    return sources


async def _find(discovery: Discovery, name: str) -> list[Instrument]:
    while True:
        try:
            instruments = await discovery.find()
        except RestBusy as busy:
            log.warning("%s: the assets cannot be looked up: %s; asking again in %.0f s", name, busy, busy.wait)
            await asyncio.sleep(busy.wait)
        except RestRefused as refused:
            raise VenueRefused(f"{name}: the assets cannot be looked up: {refused}") from None
        else:
            if not instruments:
                raise SettingsError(f"discover: {name} has none of the assets that are wanted")
            return instruments


def resume(tracker: GapTracker, followed: list[Followed], *, all_at_once: bool) -> None:
    """After a restart: what is not listened to any more, or not yet, has no gap; all else since its last tick."""
    symbols = {each.feed.name: each.symbols for each in (followed if all_at_once else followed[:1])}
    for source in tracker.sources():
        tracker.follow_only(source, symbols.get(source, ()))
    tracker.resumed()
