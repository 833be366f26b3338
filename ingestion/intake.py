"""From a frame to messages: what a feed makes of it, numbered, into the spool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingestion.counts import Counts, RejectLog
from ingestion.feeds import Feed
from ingestion.spool import Spool
from ingestion.ticks import Control, Ignored, Reject, Tick


@dataclass(frozen=True, slots=True)
class Topics:
    """Where messages go in Kafka."""

    ticks: str
    rejects: str


class Intake:
    """Takes a feed's frames. Each tick gets the producer's next number; everything goes into the spool.

    A message is appended in the same step in which it is numbered: numbers rise in the spool, and so in each
    partition of Kafka, however many feeds share it.
    """

    def __init__(self, feed: Feed, spool: Spool, counts: Counts, topics: Topics) -> None:
        self.feed = feed
        self.counts = counts
        self.rejects = RejectLog()
        self._spool = spool
        self._topics = topics

    async def frame(self, frame: bytes, received_ns: int) -> Sequence[Control]:
        """Take what the frame says; waits while the spool has no room. What concerns the conversation is returned."""
        controls: list[Control] = []
        self.counts.frames += 1
        self.counts.bytes += len(frame)
        await self._spool.room()
        for event in self.feed.receive(frame, received_ns):
            if isinstance(event, Tick):
                self.tick(event)
            elif isinstance(event, Ignored):
                self.counts.ignored[event.kind] += 1
            elif isinstance(event, Control):
                self.counts.ignored[event.kind] += 1
                controls.append(event)
            else:
                self.reject(event)
        return controls

    def tick(self, tick: Tick) -> None:
        """Number it and take it."""
        self.counts.ticks += 1
        message = tick.to_json(self._spool.producer, self._spool.sequence + 1)
        self._spool.append(self._topics.ticks, tick.key, message, numbered=True)

    def reject(self, reject: Reject) -> None:
        """Count, name and take what is no tick."""
        self.counts.rejected += 1
        self.rejects.add(reject)
        self._spool.append(self._topics.rejects, reject.key, reject.to_json())
