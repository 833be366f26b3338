"""Sources of the same assets in order of preference: while one delivers no ticks, the next one is listened to.

Two sources that speak at the same time do no harm: every tick says where it is from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from ingestion.source import Source

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2


class Failover:
    """Decides which sources are listened to."""

    def __init__(
        self, sources: Sequence[Source], *, failover_seconds: float, healthy_seconds: float, at_once: bool
    ) -> None:
        self.sources = sources
        self._failover_seconds = failover_seconds
        self._healthy_seconds = healthy_seconds
        self._at_once = at_once
        self.takeovers = 0

    async def run(self) -> None:
        """Until cancelled. Raises VenueRefused when no source is left."""
        self.sources[0].start()
        while True:
            if self._at_once:
                for source in self.sources:
                    source.start()
            reliable = [source.look(self._failover_seconds) for source in self.sources]
            refusals = [source.refusal for source in self.sources if source.refusal is not None]
            if len(refusals) == len(self.sources):
                raise refusals[-1]
            if not self._at_once:
                self._choose(reliable)
            await asyncio.sleep(LOOK_SECONDS)

    def _choose(self, reliable: Sequence[bool]) -> None:
        """The first source that can be relied on is listened to, and those before it are waited for."""
        now = asyncio.get_running_loop().time()
        for source, relied_on in zip(self.sources, reliable, strict=True):
            if not source.is_wanted and source.refusal is None:
                self.takeovers += 1
                log.warning("%s takes over: those before it deliver no ticks", source.name)
                source.listen_anew()
                source.start()
                return
            if relied_on:
                if source.speaks_since is not None and now - source.speaks_since >= self._healthy_seconds:
                    for later in self.sources[self.sources.index(source) + 1 :]:
                        if later.is_wanted:
                            log.info("%s is healthy again: %s is closed", source.name, later.name)
                            later.stop()
                return

    async def stop(self, seconds: float) -> None:
        """Say goodbye to all, and read what they had sent, at most so long."""
        for source in self.sources:
            source.stop()
        try:
            async with asyncio.timeout(seconds):
                for source in self.sources:
                    await source.ended()
        except TimeoutError:
            for source in self.sources:
                source.cancel()
                await source.ended()
