"""A venue, and its connections while they are wanted.

A venue takes a limited number of instruments on one connection, so the instruments are divided into shares. Each share
may have several connections that bring the same ticks, so that a cut of one of them loses nothing. The first copy of a
trade counts, by its id.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ingestion.connection import Connection
from ingestion.errors import VenueRefused
from ingestion.instruments import Instrument
from ingestion.intake import Intake

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Share:
    """Some of a venue's instruments, and an intake for each connection that brings them."""

    instruments: dict[str, Instrument]
    intakes: list[Intake]
    connections: list[Connection] = field(default_factory=list)
    """One for each intake, while they are wanted."""

    @property
    def is_up(self) -> bool:
        return any(connection.is_up for connection in tuple(self.connections))


class Source:
    """A venue. Its first intake stands for it where one is enough, as for backfilled trades."""

    def __init__(
        self,
        intake: Intake,
        connect: Callable[[Intake], Connection],
        *,
        instruments: Sequence[Instrument] = (),
        divide: Callable[[Sequence[Instrument]], Intake] | None = None,
        sockets: int = 1,
        most_instruments: int = 0,
    ) -> None:
        """`divide` makes the intake of some of the instruments, as `intake` is that of the first `most_instruments`.

        Without `divide` there is one connection. `most_instruments` 0: a connection takes any number. `sockets`
        connections bring the same instruments, where the venue gives ids by which repeats are known.
        """
        self.intake = intake
        self.name = intake.feed.name
        self.liveness = intake.liveness
        self.refusal: VenueRefused | None = None
        self.is_wanted = False
        self._connect = connect
        self._divide = divide
        self._sockets = sockets if divide is not None and intake.feed.has_trade_ids else 1
        self._most = most_instruments if divide is not None else 0
        first = instruments[: self._most or None]
        self._shares = [self._share(first, intake)]
        self._add_shares(instruments[len(first) :])
        self._running: dict[asyncio.Task[None], Connection] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._began = 0.0
        self.speaks_since: float | None = None
        """Since when it has delivered ticks without a long silence."""

    def _share(self, instruments: Sequence[Instrument], intake: Intake) -> _Share:
        """These instruments, with an intake for each of their connections."""
        intakes = [intake]
        if self._divide is not None:
            intakes += [self._divide(instruments) for _ in range(1, self._sockets)]
        share = _Share({instrument.symbol: instrument for instrument in instruments}, intakes)
        for number, each in enumerate(intakes):
            each.number, each.takes_each_once = number, self._sockets > 1
            if self._divide is not None:
                # A cut ends what this share brings, and only while no other connection brings the same.
                each.symbols = share.instruments.keys() if self._most else None
                each.is_covered = lambda: share.is_up
        return share

    def _add_shares(self, instruments: Sequence[Instrument]) -> list[_Share]:
        """New shares for these; without `divide` the one share has them all."""
        if self._divide is None:
            return []
        size = self._most or max(1, len(instruments))
        parts = [instruments[at : at + size] for at in range(0, len(instruments), size)]
        added = [self._share(part, self._divide(part)) for part in parts]
        self._shares += added
        return added

    # What it is like

    @property
    def intakes(self) -> list[Intake]:
        return [intake for share in tuple(self._shares) for intake in share.intakes]

    @property
    def connections(self) -> list[Connection]:
        """Those that are wanted, up or not."""
        return [connection for share in tuple(self._shares) for connection in tuple(share.connections)]

    @property
    def is_up(self) -> bool:
        """Whether every share has a connection."""
        return all(share.is_up for share in tuple(self._shares))

    @property
    def refused(self) -> dict[str, str]:
        """The venue's reason for each symbol that it refuses."""
        return {symbol: reason for intake in self.intakes for symbol, reason in intake.feed.refused.items()}

    def count(self, name: str) -> int:
        """One of the counts, of all connections together."""
        return sum(getattr(intake.counts, name) for intake in self.intakes)

    @property
    def heard(self) -> float:
        """When the last frame came, by the event loop's clock."""
        return max(intake.counts.heard for intake in self.intakes)

    def silent_seconds(self) -> float:
        """For how long it has said nothing, since it was started."""
        if not self.is_wanted or self._is_held():
            return 0.0
        heard = max(connection.heard for connection in self.connections)
        return asyncio.get_running_loop().time() - max(self._began, heard)

    def _is_held(self) -> bool:
        return any(connection.is_held for connection in self.connections)

    def is_dead(self, now: float, elsewhere: Iterable[str] = ()) -> bool:
        """Whether it delivers no ticks, or too few."""
        return self.liveness.is_dead(now, self.refused, elsewhere)

    def undelivered(self, now: float) -> dict[str, str]:
        """Why each symbol that it should deliver does not come; none while it is not listened to."""
        if not self.is_wanted:
            return {}
        reasons = {symbol: f"the venue says {reason}" for symbol, reason in self.refused.items()}
        for symbol, seconds in self.liveness.silent(now).items():
            reasons.setdefault(symbol, f"its last tick came {seconds:.0f} s ago")
        for symbol, seconds in self.liveness.unheard(now).items():
            reasons.setdefault(symbol, f"no tick has come for {seconds:.0f} s since it was subscribed to")
        return reasons

    def look(self, failover_seconds: float) -> bool:
        """Whether it can be relied on now. Raises what ended one of its connections, but for a refusal."""
        for task in [task for task in self._running if task.done()]:
            del self._running[task]
            error = task.exception()
            if isinstance(error, VenueRefused):
                self.refusal = error
                self.stop()
            elif error is not None:
                raise error
        if self._is_held():
            self.liveness.hold()
        now = asyncio.get_running_loop().time()
        if not self.is_wanted or self.silent_seconds() >= failover_seconds or self.is_dead(now):
            self.speaks_since = None
            return False
        if self.speaks_since is None and self.liveness.last > self._began:
            self.speaks_since = now
        return True

    # What it does

    def start(self) -> None:
        if self.is_wanted or self.refusal is not None:
            return
        self.is_wanted = True
        self._began = asyncio.get_running_loop().time()
        self.speaks_since = None
        self.liveness.begin()
        for share in self._shares:
            self._start(share)

    def _start(self, share: _Share) -> None:
        share.connections = [self._connect(intake) for intake in share.intakes]
        for connection in share.connections:
            self._running[asyncio.create_task(connection.run())] = connection

    def stop(self) -> None:
        """Let the connections end in peace; `ended` waits for it."""
        self.is_wanted = False
        for task, connection in self._running.items():
            connection.stop()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        self._running.clear()
        for share in self._shares:
            share.connections = []

    async def ended(self) -> None:
        """Wait until the connections that were stopped have ended."""
        while self._ending:
            await asyncio.wait(self._ending)

    def cancel(self) -> None:
        for task in (*self._running, *self._ending):
            task.cancel()

    def listen_anew(self) -> None:
        """After a time in which nobody listened to this venue: what it said meanwhile is not missing."""
        self.intake.tracker.follow_only(self.name, ())

    def follow(self, added: Sequence[Instrument], left: Sequence[Instrument]) -> None:
        """Subscribe to what is new, and unsubscribe from what is not wanted any more."""
        self.liveness.follow(added)
        self.liveness.leave(left)
        waiting = list(added)
        for share in self._shares:
            room = self._most - len(share.instruments) if self._most else len(waiting)
            mine, waiting = waiting[: max(0, room)], waiting[max(0, room) :]
            gone = [one for one in left if self._divide is None or one.symbol in share.instruments]
            for instrument in gone:
                share.instruments.pop(instrument.symbol, None)
            share.instruments.update({instrument.symbol: instrument for instrument in mine})
            self._subscribe(share, mine, gone)
        for share in self._add_shares(waiting):
            log.info("%s: one connection more, for %d symbols", self.name, len(share.instruments))
            if self.is_wanted:
                self._start(share)

    @staticmethod
    def _subscribe(share: _Share, added: Sequence[Instrument], left: Sequence[Instrument]) -> None:
        for intake, connection in itertools.zip_longest(share.intakes, share.connections):
            answers = [intake.feed.subscribe(added)] if added else []
            answers += [intake.feed.unsubscribe(left)] if left else []
            if connection is None:
                # The next one will have it.
                continue
            if None in answers:
                connection.renew("other assets are wanted")
            for texts in answers:
                connection.send(texts or ())

    def ask_refused(self) -> None:
        """Ask once more for what the venue has refused."""
        for share in self._shares:
            for intake, connection in itertools.zip_longest(share.intakes, share.connections):
                texts = intake.feed.ask_refused()
                if connection is not None:
                    connection.send(texts)
