"""From a frame to messages: what a feed makes of it, numbered, into the spool."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ingestion.counts import Counts, RejectLog
from ingestion.feeds import Feed
from ingestion.gaps import Gap, GapTracker
from ingestion.liveness import Liveness
from ingestion.spool import Spool
from ingestion.ticks import Control, Event, Ignored, Reject, Tick


@dataclass(frozen=True, slots=True)
class Topics:
    """Where messages go in Kafka."""

    ticks: str
    rejects: str
    gaps: str


# So many prices of a symbol that has no trade ids tell where two connections' prices meet.
PRICES_COMPARED = 16


class Intake:
    """Takes a feed's frames. Each tick gets the producer's next number; everything goes into the spool.

    A message is appended in the same step in which it is numbered: numbers rise in the spool, and so in each
    partition of Kafka, however many feeds share it.
    """

    def __init__(
        self,
        feed: Feed,
        spool: Spool,
        counts: Counts,
        topics: Topics,
        tracker: GapTracker,
        liveness: Liveness | None = None,
    ) -> None:
        self.feed = feed
        self.counts = counts
        self.tracker = tracker
        self.liveness = Liveness() if liveness is None else liveness
        self.rejects = RejectLog()
        self.number = 0
        """Among the intakes of the same instruments."""
        self.symbols: Collection[str] | None = None
        """What its connection brings; None: all of the source."""
        self.takes_each_once = False
        """Whether a trade that has come already, as on another connection, is left out."""
        self.is_covered: Callable[[], bool] = lambda: False
        """Whether another connection brings the same."""
        self._last_prices: defaultdict[str, deque[str]] = defaultdict(partial(deque, maxlen=PRICES_COMPARED))
        """Of each symbol that has no trade ids, in the order in which they came."""
        self._spool = spool
        self._topics = topics

    async def frame(self, frame: bytes, received_ns: int) -> Sequence[Control]:
        """Take what the frame says; waits while the spool has no room. What concerns the conversation is returned."""
        self._count(frame)
        await self._spool.room()
        return self._take(self.feed.receive(frame, received_ns), received_ns)

    async def overlapping(self, frames: Sequence[tuple[bytes, int]]) -> Sequence[Control]:
        """Take the frames of a new connection that came while the one before was still read, with their times.

        Both told the same prices. Without ids, the repeats are those that end as what was taken before ends.
        """
        await self._spool.room()
        events: list[tuple[Event, int]] = []
        for frame, received_ns in frames:
            self._count(frame)
            events += [(event, received_ns) for event in self.feed.receive(frame, received_ns)]
        prices: defaultdict[str, list[str]] = defaultdict(list)
        for event, _ in events:
            if isinstance(event, Tick):
                prices[event.symbol].append(event.price_usd)
        repeats = {symbol: _repeats(tuple(self._last_prices[symbol]), came) for symbol, came in prices.items()}
        controls: list[Control] = []
        for event, received_ns in events:
            if isinstance(event, Tick) and repeats[event.symbol]:
                repeats[event.symbol] -= 1
                self.counts.ignore("a repeated price")
            else:
                controls += self._take([event], received_ns)
        return controls

    def _count(self, frame: bytes) -> None:
        self.counts.frames += 1
        self.counts.bytes += len(frame)

    def _take(self, events: Iterable[Event], received_ns: int) -> list[Control]:
        controls: list[Control] = []
        for event in events:
            if self.takes_each_once and isinstance(event, Tick | Reject) and self.tracker.has(event):
                self.counts.repeats += 1
            elif isinstance(event, Tick):
                tick = self.tracker.observe(event)
                self.liveness.tick(tick)
                if tick.trade_id is None:
                    self._last_prices[tick.symbol].append(tick.price_usd)
                self._tick(tick)
            elif isinstance(event, Ignored):
                self.counts.ignore(event.kind)
            elif isinstance(event, Control):
                self.counts.ignore(event.kind)
                controls.append(event)
                if event.symbol is not None and event.last_trade_id is not None:
                    self.tracker.mentioned(self.feed.name, event.symbol, event.last_trade_id, received_ns)
            else:
                self.reject(event)
        return controls

    def _tick(self, tick: Tick) -> None:
        """Number it and take it."""
        self.counts.ticks += 1
        message = tick.to_json(self._spool.producer, self._spool.sequence + 1)
        self._spool.append(self._topics.ticks, tick.key, message, numbered=True)

    def reject(self, reject: Reject) -> None:
        """Count, name and take what is no tick."""
        self.counts.rejected += 1
        self.rejects.add(reject)
        self.tracker.observe_reject(reject)
        self._spool.append(self._topics.rejects, reject.key, reject.to_json())

    def disconnected(self, at_ns: int) -> None:
        """Until the next connection is up nothing comes from this feed, unless another connection brings the same."""
        if not self.is_covered():
            self.tracker.disconnected(self.feed.name, at_ns, self.symbols)

    async def room(self) -> None:
        """Wait until the spool takes more. What the tracker has noted is taken in the same step: it cannot be lost."""
        await self._spool.room()

    def backfilled(self, trade: Tick | Reject) -> None:
        """Take a trade that the venue's history had."""
        if isinstance(trade, Tick):
            self.counts.backfilled += 1
            self._tick(trade)
        else:
            self.reject(trade)

    def report(self, gap: Gap) -> None:
        """Take a row of silver.gaps."""
        self._spool.append(self._topics.gaps, gap.key, gap.to_json())


def _repeats(taken: Sequence[str], came: Sequence[str]) -> int:
    """How many of the prices that came, from the first on, were taken already: they end as `taken` does."""
    for count in range(len(came), 0, -1):
        compared = min(count, len(taken))
        if compared and list(came[count - compared : count]) == list(taken[-compared:]):
            return count
    return 0
