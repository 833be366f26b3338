"""Feeds: what each venue's frames mean. A feed does no input or output; the connection does it for the feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from conf.settings import SettingsError
from ingestion.feeds.binance import Binance
from ingestion.instruments import INSTRUMENTS, Instrument
from ingestion.ticks import Event


class Feed(Protocol):
    """One venue's side of a conversation over WebSocket."""

    @property
    def name(self) -> str:
        """The venue, as `source` of its ticks."""

    @property
    def url(self) -> str:
        """Where to connect."""

    def opening_frames(self) -> Sequence[str]:
        """What to send as soon as the connection is up."""

    def receive(self, frame: bytes, received_ns: int) -> Sequence[Event]:
        """What a frame says. Never raises: a frame that cannot be understood is a Reject."""


FEEDS: dict[str, Callable[[Sequence[Instrument], str | None], Feed]] = {"binance": Binance}


def make_feed(name: str, assets: Sequence[str], url: str | None = None) -> Feed:
    """The named venue's feed of these assets, at its own address or at `url`.

    Raises SettingsError if there is no such feed, or it does not trade one of the assets.
    """
    if name not in FEEDS:
        raise SettingsError(f"feed = {name!r}: there is no such feed; there are: {', '.join(FEEDS)}")
    traded = INSTRUMENTS[name]
    unknown = [asset for asset in assets if asset not in traded]
    if unknown:
        raise SettingsError(f"assets: {name} has no {', '.join(unknown)}; it has: {', '.join(traded)}")
    return FEEDS[name]([traded[asset] for asset in dict.fromkeys(assets)], url)
