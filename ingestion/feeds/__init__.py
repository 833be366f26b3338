"""Feeds: what each venue's frames mean. A feed does no input or output; the connection does it for the feed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from conf.settings import SettingsError
from ingestion.feeds import coincap
from ingestion.feeds.binance import Binance
from ingestion.feeds.coinbase import Coinbase
from ingestion.feeds.coincap import CoinCap
from ingestion.feeds.kraken import Kraken
from ingestion.instruments import INSTRUMENTS, Instrument
from ingestion.ticks import Event


class Feed(Protocol):
    """One venue's side of a conversation over WebSocket."""

    @property
    def name(self) -> str:
        """The venue, as `source` of its ticks."""

    @property
    def url(self) -> str:
        """Where to connect. It may hold a key: what is logged is this without its query."""

    @property
    def silence_seconds(self) -> float:
        """A connection that says nothing for so long is not believed to be alive."""

    @property
    def connection_lifetime_seconds(self) -> float | None:
        """After so long the venue cuts a connection off; None: it does not."""

    def opening_frames(self) -> Sequence[str]:
        """What to send as soon as the connection is up."""

    def subscribe(self, instruments: Sequence[Instrument]) -> Sequence[str] | None:
        """Want these too, now and on every later connection; what to send on a connection that is up.

        None: the venue takes no such wish; a new connection, up before the old one is closed, has it.
        """

    def unsubscribe(self, instruments: Sequence[Instrument]) -> Sequence[str] | None:
        """Want these no more; as `subscribe`. What still comes of them is a tick all the same."""

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        """What a frame says. Never raises: a frame that cannot be understood is a Reject."""


FEEDS = ("binance", "coinbase", "kraken", "coincap")


def named_instruments(name: str, assets: Sequence[str]) -> list[Instrument]:
    """What the named venue calls these assets. CoinCap's own names are the canonical ones; it also has ALL.

    Raises SettingsError if there is no such venue, or it does not trade one of the assets.
    """
    if name not in FEEDS:
        raise SettingsError(f"feed = {name!r}: there is no such feed; there are: {', '.join(FEEDS)}")
    traded = INSTRUMENTS[name]
    if name == "coincap":
        traded = {asset: Instrument(asset, asset, "USD") for asset in assets}
        if coincap.ALL in traded and len(traded) > 1:
            raise SettingsError(f"assets: {coincap.ALL} stands alone")
    unknown = [asset for asset in assets if asset not in traded]
    if unknown:
        raise SettingsError(f"assets: {name} has no {', '.join(unknown)}; it has: {', '.join(traded)}")
    return [traded[asset] for asset in dict.fromkeys(assets)]


def feed_of(name: str, instruments: Sequence[Instrument], url: str | None = None, api_key: str | None = None) -> Feed:
    """The named venue's feed of these instruments, at its own address or at `url`. Only CoinCap takes a key."""
    if name == "binance":
        return Binance(instruments, url)
    if name == "coinbase":
        return Coinbase(instruments, url)
    if name == "kraken":
        return Kraken(instruments, url)
    return CoinCap(instruments, url, api_key)


def make_feed(name: str, assets: Sequence[str], url: str | None = None, api_key: str | None = None) -> Feed:
    """The named venue's feed of these assets.

    Raises SettingsError if there is no such feed, or it does not trade one of the assets.
    """
    return feed_of(name, named_instruments(name, assets), url, api_key)
