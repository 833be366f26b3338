"""Sources of the same assets in order of preference: while one delivers no ticks, the next one is listened to.

Two sources that speak at the same time do no harm: every tick says where it is from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from ingestion.connection import Connection
from ingestion.errors import VenueRefused
from ingestion.instruments import Instrument
from ingestion.intake import Intake

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2


class Source:
    """A venue, and its connection while it is wanted."""

    def __init__(self, intake: Intake, connect: Callable[[Intake], Connection]) -> None:
        self.intake = intake
        self.name = intake.feed.name
        self.connection: Connection | None = None
        self.refusal: VenueRefused | None = None
        self._connect = connect
        self._running: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._began = 0.0
        self.speaks_since: float | None = None
        """Since when it has delivered ticks without a long silence."""

    @property
    def is_wanted(self) -> bool:
        return self._running is not None

    def start(self) -> None:
        if self._running is None and self.refusal is None:
            self._began = asyncio.get_running_loop().time()
            self.speaks_since = None
            self.intake.liveness.begin()
            self.connection = self._connect(self.intake)
            self._running = asyncio.create_task(self.connection.run())

    def stop(self) -> None:
        """Let the connection end in peace; `ended` waits for it."""
        if self._running is not None and self.connection is not None:
            self.connection.stop()
            self._ending.add(self._running)
            self._running.add_done_callback(self._ending.discard)
            self._running = self.connection = None

    async def ended(self) -> None:
        """Wait until the connections that were stopped have ended."""
        while self._ending:
            await asyncio.wait(self._ending)

    def cancel(self) -> None:
        for task in (self._running, *self._ending):
            if task is not None:
                task.cancel()

    def silent_seconds(self) -> float:
        """For how long it has said nothing, since it was started."""
        if self.connection is None or self.connection.is_held:
            return 0.0
        return asyncio.get_running_loop().time() - max(self._began, self.connection.heard)

    @property
    def is_up(self) -> bool:
        return self.connection is not None and self.connection.is_up

    def follow(self, added: Sequence[Instrument], left: Sequence[Instrument]) -> None:
        """Subscribe to what is new, and unsubscribe from what is not wanted any more."""
        feed, liveness = self.intake.feed, self.intake.liveness
        liveness.follow(added)
        liveness.leave(left)
        answers = [feed.subscribe(added)] if added else []
        answers += [feed.unsubscribe(left)] if left else []
        if self.connection is None:
            # The next one will have it.
            return
        if None in answers:
            self.connection.renew("other assets are wanted")
        for texts in answers:
            self.connection.send(texts or ())

    def ask_refused(self) -> None:
        """Ask once more for what the venue has refused."""
        texts = self.intake.feed.ask_refused()
        if self.connection is not None:
            self.connection.send(texts)

    def is_dead(self, now: float, elsewhere: Iterable[str] = ()) -> bool:
        """Whether it delivers no ticks, or too few."""
        return self.intake.liveness.is_dead(now, self.intake.feed.refused, elsewhere)

    def silent(self, now: float) -> dict[str, float]:
        """Symbols that it delivered and does not deliver any more, with the seconds since."""
        return self.intake.liveness.silent(now)

    def undelivered(self, now: float) -> dict[str, str]:
        """Why each symbol that it should deliver does not come; none while it is not listened to."""
        if not self.is_wanted:
            return {}
        liveness = self.intake.liveness
        reasons = {symbol: f"the venue says {reason}" for symbol, reason in self.intake.feed.refused.items()}
        for symbol, seconds in liveness.silent(now).items():
            reasons.setdefault(symbol, f"its last tick came {seconds:.0f} s ago")
        for symbol, seconds in liveness.unheard(now).items():
            reasons.setdefault(symbol, f"no tick has come for {seconds:.0f} s since it was subscribed to")
        return reasons

    def look(self, failover_seconds: float) -> bool:
        """Whether it can be relied on now. Raises what ended its connection, but for a refusal."""
        now = asyncio.get_running_loop().time()
        if self._running is not None and self._running.done():
            error = self._running.exception()
            self._running = self.connection = None
            if isinstance(error, VenueRefused):
                self.refusal = error
            elif error is not None:
                raise error
        liveness = self.intake.liveness
        if self.connection is not None and self.connection.is_held:
            liveness.hold()
        if self._running is None or self.silent_seconds() >= failover_seconds or self.is_dead(now):
            self.speaks_since = None
            return False
        if self.speaks_since is None and liveness.last > self._began:
            self.speaks_since = now
        return True


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
                source.intake.listen_anew()
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
