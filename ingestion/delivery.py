"""From the spool to Kafka."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from ingestion.errors import DeliveryFailed, MessageTooLarge
from ingestion.publisher import KafkaPublisher
from ingestion.spool import Spool

log = logging.getLogger(__name__)

# How soon after Kafka's answer the spool may forget.
SETTLE_SECONDS = 0.01
RETRY_SECONDS = 5.0
# A broker or a topic may take less than is usual (max.message.bytes). Batches, and rejects with the frames in them, are
# then made smaller, down to this.
LEAST_BYTES = 1024


class Delivery:
    """Sends what the spool holds, in order, and lets it forget what Kafka has acknowledged.

    Only what is durable is sent: a number that Kafka has seen is never given to another tick.
    """

    def __init__(self, spool: Spool, connect: Callable[[], KafkaPublisher]) -> None:
        self._spool = spool
        self._connect = connect
        self._publisher: KafkaPublisher | None = None
        self._earlier = 0
        self._largest: int | None = None
        """Bytes of a batch, where Kafka has refused larger ones."""
        # Where runs of positions begin: what had been sent before, and the position before the run's first record.
        self._runs: deque[tuple[int, int]] = deque()

    @property
    def published(self) -> int:
        """Messages that Kafka has acknowledged, repeats too."""
        return self._earlier + (self._publisher.published if self._publisher else 0)

    @property
    def in_flight(self) -> int:
        return self._publisher.in_flight if self._publisher else 0

    async def run(self) -> None:
        """Until cancelled. Raises SpoolDamaged. What Kafka refuses stays in the spool and is tried again."""
        while True:
            wait = RETRY_SECONDS
            self._spool.rewind()
            self._runs.clear()
            publisher = self._publisher = self._connect()
            publisher.largest = self._largest or publisher.largest
            try:
                await publisher.start()
                await self._forward(publisher)
            except MessageTooLarge as error:
                if publisher.largest <= LEAST_BYTES:
                    log.error("%s; it stays in the spool; trying again in %.0f s", error, RETRY_SECONDS)
                else:
                    self._largest, wait = max(LEAST_BYTES, publisher.largest // 4), 0.0
                    log.warning("%s; going on with at most %d bytes at a time", error, self._largest)
            except DeliveryFailed as error:
                log.error("%s; it stays in the spool; trying again in %.0f s", error, RETRY_SECONDS)
            finally:
                self._settle(publisher)
                self._earlier, self._publisher = self._earlier + publisher.published, None
                await publisher.close()
            await asyncio.sleep(wait)

    async def _forward(self, publisher: KafkaPublisher) -> None:
        sent = 0
        while True:
            records = self._spool.read()
            waiting = publisher.in_flight
            self._settle(publisher)
            # Also while nothing more is to be sent.
            publisher.check()
            if not records:
                await self._spool.more(SETTLE_SECONDS if waiting else None)
                continue
            self._runs.append((sent, self._spool.position - len(records)))
            for record in records:
                await publisher.send(*record)
            sent += len(records)
            # Others have their turn between two batches, even while Kafka takes all at once.
            await asyncio.sleep(0)

    def _settle(self, publisher: KafkaPublisher) -> None:
        """Let the spool forget what has been acknowledged since the last time."""
        published = publisher.published
        while len(self._runs) > 1 and self._runs[1][0] <= published:
            self._runs.popleft()
        if self._runs:
            sent, position = self._runs[0]
            self._spool.forget(position + published - sent)

    async def drain(self, seconds: float) -> None:
        """Wait until Kafka has everything that is durable, at most so long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._spool.delivered < self._spool.durable_end:
            await asyncio.sleep(SETTLE_SECONDS)
            if loop.time() >= until:
                return
