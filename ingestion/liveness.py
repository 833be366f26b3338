"""Whether a feed delivers ticks, and of which instruments. A heartbeat or an accepted subscription is no tick.

An instrument that has delivered ticks is silent when no new tick has come for the longest of three times:
stale_seconds, twenty times its usual interval, and five times its longest recent interval. So an instrument that trades
once in ten minutes is not silent after one, nor is one that rests after a burst. A feed is dead when no tick comes for
stale_seconds, when the venue refuses all of its instruments, or when a tenth of those that used to deliver is silent.
The status names an instrument that has delivered nothing yet, but the feed stays healthy while others deliver: nobody
knows how often that one trades. Times are the event loop's, in seconds.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ingestion.instruments import Instrument
from ingestion.ticks import Tick

STALE_SECONDS = 30.0
# So many of its usual intervals, and of its longest one, without a tick are no chance.
INTERVALS, LONGEST = 20, 5
# The usual interval is a moving average over about so many ticks. The longest one shrinks by so much with each.
AVERAGED, FORGOTTEN = 64, 0.01
# Ticks that share a moment are fills of one order.
MOMENT_SECONDS = 0.2
# An instrument with fewer ticks has no usual interval yet.
LEAST_TICKS = 10
# A feed is in trouble when so large a part of the instruments that used to deliver is silent.
SHARE = 0.1


@dataclass(slots=True)
class _Pulse:
    """The ticks of one instrument."""

    asset: str
    since: float
    """When it was subscribed to, or when reading went on after a pause."""
    last: float = -math.inf
    count: int = 0
    interval: float = 0.0
    longest: float = 0.0
    newest: tuple[int, int] = (-1, -1)
    """Epoch and id of the newest trade: a venue that repeats its latest trade after a reconnect delivers nothing."""

    def beat(self, now: float) -> None:
        passed = now - max(self.last, self.since)
        self.last = now
        if passed < MOMENT_SECONDS and self.count:
            return
        self.count += 1
        self.interval += (passed - self.interval) / min(self.count, AVERAGED)
        self.longest = max(self.longest * (1 - FORGOTTEN), passed)

    def quiet(self, now: float) -> float:
        return now - max(self.last, self.since)


class Liveness:
    """The ticks of one feed. `status` may be asked from another thread."""

    def __init__(self, stale_seconds: float = STALE_SECONDS, now: Callable[[], float] | None = None) -> None:
        """`now` is the event loop's time unless a test has its own."""
        self.stale_seconds = stale_seconds
        self._now = now or (lambda: asyncio.get_running_loop().time())
        self._pulses: dict[str, _Pulse] = {}
        self._since = -math.inf
        self.last = -math.inf
        """When the last tick came."""

    def begin(self) -> None:
        """The feed is listened to from now on, or again: what was not heard before is no silence."""
        self._since = self._now()
        self.last = -math.inf
        for pulse in self._pulses.values():
            pulse.since, pulse.last = self._since, -math.inf

    def hold(self) -> None:
        """Nothing is read now: the silence is ours."""
        self._since = self._now()
        for pulse in self._pulses.values():
            pulse.since = self._since

    def follow(self, instruments: Iterable[Instrument]) -> None:
        """These are to deliver."""
        now = self._now()
        for instrument in instruments:
            self._pulses.setdefault(instrument.symbol, _Pulse(instrument.asset, now))

    def leave(self, instruments: Iterable[Instrument]) -> None:
        for instrument in instruments:
            self._pulses.pop(instrument.symbol, None)

    def tick(self, tick: Tick) -> None:
        """Take note of a tick of the feed, with its epoch."""
        pulse = self._pulses.get(tick.symbol)
        if pulse is not None and tick.trade_id is not None:
            number = tick.trade_epoch, tick.trade_id
            if number <= pulse.newest:
                return
            pulse.newest = number
        self.last = now = self._now()
        if pulse is not None:
            pulse.beat(now)

    def quiet_seconds(self, now: float) -> float:
        """For how long no tick has come."""
        return now - max(self.last, self._since)

    def fresh_assets(self, now: float) -> set[str]:
        """Those that deliver at their pace."""
        pulses = tuple(self._pulses.values())
        return {pulse.asset for pulse in pulses if pulse.count and not self._is_silent(pulse, now)}

    def silent(self, now: float) -> dict[str, float]:
        """Symbols that used to deliver and do not, with the seconds since their last tick."""
        pulses = tuple(self._pulses.items())
        return {symbol: pulse.quiet(now) for symbol, pulse in pulses if self._is_silent(pulse, now)}

    def unheard(self, now: float) -> dict[str, float]:
        """Symbols of which no tick has come for stale_seconds since they were subscribed to, with the seconds."""
        pulses = tuple(self._pulses.items())
        return {
            symbol: pulse.quiet(now)
            for symbol, pulse in pulses
            if not pulse.count and pulse.quiet(now) >= self.stale_seconds
        }

    def assets(self, symbols: Iterable[str]) -> set[str]:
        """What these symbols are."""
        return {pulse.asset for symbol in symbols if (pulse := self._pulses.get(symbol)) is not None}

    def is_dead(self, now: float, refused: Iterable[str] = (), elsewhere: Iterable[str] = ()) -> bool:
        """Whether the feed does not deliver: no tick, all that it follows `refused`, or too much of it silent.

        Assets that are fresh `elsewhere` are missed by nobody.
        """
        refused, elsewhere = set(refused), set(elsewhere)
        if self._pulses and elsewhere.issuperset(self.assets(tuple(self._pulses))):
            return False
        if self._pulses and refused.issuperset(tuple(self._pulses)):
            return True
        if self.quiet_seconds(now) >= self.stale_seconds:
            return True
        silent = self.assets(set(self.silent(now)) - refused).difference(elsewhere)
        lively = sum(pulse.count >= LEAST_TICKS for pulse in tuple(self._pulses.values()))
        return len(silent) > 0 and len(silent) >= SHARE * lively

    def _is_silent(self, pulse: _Pulse, now: float) -> bool:
        usual = max(INTERVALS * pulse.interval, LONGEST * pulse.longest)
        return pulse.count >= LEAST_TICKS and pulse.quiet(now) >= max(self.stale_seconds, usual)
