"""How each venue says things: its frames, its answers, and its REST."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ingestion.feeds import VENUES
from simulator.frames import Frame
from simulator.history import History
from simulator.market import Trade


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets for a request, and which streams it has from then on, or no more."""

    texts: Sequence[str] = ()
    subscribe: Sequence[str] = ()
    unsubscribe: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response."""

    status: int
    body: object
    headers: Mapping[str, str] = field(default_factory=dict)


# Assets that only the simulator has are this and a number.
MADE_UP_NAME = "coin"

NOT_FOUND = Reply(404, {"message": "NotFound"})


class Dialect(Protocol):
    """One venue's language."""

    path: str
    """Of its WebSocket."""
    heartbeat_seconds: float | None
    patience_seconds: float | None
    """Who has not subscribed by then is cut off."""
    most_streams: int | None
    """A client that wants more on one connection is cut off."""
    message_limit: tuple[int, float] | None
    """And one that says more than so much within so many seconds."""
    rest_limit: tuple[int, float]
    """So many REST requests within so many seconds are answered."""

    def frames(self, trades: Iterator[Trade], opened_ms: int) -> Iterator[Frame]:
        """The trades of a market that opened at `opened_ms`, as frames; without those of what the venue has not."""

    def hello(self, query: Mapping[str, Sequence[str]]) -> Answer:
        """What connecting to an address with this query brings."""

    def answer(self, text: str | bytes, streams: set[str]) -> Answer:
        """What a client's frame brings that has these streams."""

    def heartbeats(self, streams: set[str]) -> Sequence[str]:
        """What a client with these streams gets every `heartbeat_seconds`."""

    def rest(self, path: str, query: Mapping[str, Sequence[str]]) -> Reply:
        """What a GET brings."""

    def too_many_requests(self) -> Reply:
        """The answer beyond `rest_limit`."""


@dataclass
class Listing:
    """What a simulated venue trades; may change while it runs. `history` is what it remembers of that.

    An asset that is `delisted` is one that it traded: its REST still lists it, and a subscription to it is refused.
    """

    venue: str
    assets: list[str]
    history: History = field(default_factory=History)
    delisted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.symbols = {asset: instrument.symbol for asset, instrument in VENUES[self.venue].instruments.items()}
        for asset in self.assets:
            if asset.startswith(MADE_UP_NAME):
                self.symbols[asset] = self.symbols["bitcoin"].replace("BTC", asset.upper()).replace("bitcoin", asset)
        self.asset_of = {symbol: asset for asset, symbol in self.symbols.items()}

    def refuses(self, symbol: str) -> bool:
        """Whether a subscription to this symbol is refused."""
        return self.asset_of.get(symbol) is None or self.asset_of[symbol] in self.delisted

    def sends(self, asset: str) -> bool:
        """Whether trades of this asset are sent."""
        return asset in self.symbols and asset not in self.delisted

    def listed(self) -> list[str]:
        """The symbols that can be had now."""
        return [self.symbols[asset] for asset in self.assets if asset in self.symbols]


def number(query: Mapping[str, Sequence[str]], name: str, default: int) -> int:
    """A whole number of a query; the default if it is absent or none."""
    text = query.get(name, [""])[0]
    return int(text) if text.isdecimal() else default
