"""What a venue has to provide. A feed does no input or output; the connection does it for the feed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ingestion.history import History
from ingestion.instruments import Instrument
from ingestion.pairs import Pairs
from ingestion.ticks import Event


class Feed(Protocol):
    """One venue's side of a conversation over WebSocket."""

    @property
    def name(self) -> str:
        """The venue, as `source` of its ticks."""

    @property
    def has_trade_ids(self) -> bool:
        """Whether its ticks have ids, by which a repeat is known."""

    @property
    def url(self) -> str:
        """Where to connect, read before each connection. It may hold a key: a log has this without its query."""

    @property
    def silence_seconds(self) -> float:
        """A connection that says nothing for so long is not believed to be alive."""

    @property
    def connection_lifetime_seconds(self) -> float | None:
        """After so long the venue cuts a connection off; None: it does not."""

    @property
    def request_seconds(self) -> float:
        """The least time between two frames that we send on one connection."""

    @property
    def refused(self) -> Mapping[str, str]:
        """The venue's reason for each symbol that it refuses."""

    def ask_refused(self) -> Sequence[str]:
        """What to send on a connection that is up to ask once more for what was refused."""

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


MakeFeed = Callable[[Sequence[Instrument], str | None, str | None], Feed]
"""A feed of these instruments, at its own address or at the one that is given, with a key if the venue takes one."""


@dataclass(frozen=True, slots=True)
class Venue:
    """All that is particular to a venue. Its module in ingestion/feeds/ holds one, as VENUE."""

    name: str
    """`source` of its ticks, and its name in the settings."""
    instruments: Mapping[str, Instrument]
    """What it calls the assets of the table, by canonical name, and what their prices are in."""
    contiguous_ids: bool
    """Whether a symbol's trade ids have no holes, so that a hole is a missing trade. Else its ticks must have no id."""
    feed: MakeFeed
    rest_url: str
    """Its own REST: of its past trades and its pairs."""
    most_instruments: int = 0
    """On one connection; 0: any number."""
    attempts: tuple[int, float] = (0, 1.0)
    """So many connections may be made within so many seconds; 0: any number."""
    market_data_url: str | None = None
    """Serves the same lists and trades, also where `rest_url` is closed for legal reasons."""
    history: History | None = None
    """Its past trades, with which gaps are filled; None: they cannot be had."""
    pairs: Pairs | None = None
    """What it trades now; None: nobody can list that, and `all_symbol` stands for it."""
    all_symbol: str | None = None
    """At a venue whose symbols are the canonical names, of whatever asset: the symbol for all of them."""

    def __post_init__(self) -> None:
        if self.history is not None and not self.contiguous_ids:
            raise ValueError(f"{self.name}: gaps are filled by trade ids without holes")
        if (self.pairs is None) == (self.all_symbol is None):
            raise ValueError(f"{self.name}: either it lists its pairs, or a symbol stands for all")
