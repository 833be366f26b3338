"""From a frame to messages: what a feed makes of it, numbered, on its way to Kafka."""

from __future__ import annotations

from ingestion.counts import Counts, RejectLog
from ingestion.feeds import Feed
from ingestion.publisher import Publisher
from ingestion.ticks import Control, Ignored, Reject, Tick


class Intake:
    """Takes a feed's frames. Each tick gets the next number of this producer, and goes to the publisher."""

    def __init__(
        self, feed: Feed, publisher: Publisher, counts: Counts, *, producer: str, ticks_topic: str, rejects_topic: str
    ) -> None:
        self.feed = feed
        self.counts = counts
        self.rejects = RejectLog()
        self._publisher = publisher
        self._producer = producer
        self._ticks_topic = ticks_topic
        self._rejects_topic = rejects_topic

    async def frame(self, frame: bytes, received_ns: int) -> None:
        """Publish what the frame says; waits while the publisher has no room. Raises DeliveryFailed."""
        self.counts.frames += 1
        for event in self.feed.receive(frame, received_ns):
            if isinstance(event, Tick):
                self.counts.ticks += 1
                message = event.to_json(self._producer, self.counts.ticks)
                await self._publisher.send(self._ticks_topic, event.key, message)
            elif isinstance(event, Ignored | Control):
                self.counts.ignored[event.kind] += 1
            else:
                await self.reject(event)

    async def reject(self, reject: Reject) -> None:
        """Count, name and publish what is no tick."""
        self.counts.rejected += 1
        self.rejects.add(reject)
        await self._publisher.send(self._rejects_topic, reject.key, reject.to_json())
