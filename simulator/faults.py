"""What can go wrong at a venue: each fault is a function from a source of frames to a source of frames."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from simulator.frames import Frame
from simulator.market import Trade

OVERSIZED = 2 << 20
_BROKEN = (
    '{"stream":',
    "not JSON",
    '{"stream":"x@y","data":{}}',
    "[]",
    '{"stream":"btcusdt@trade","data":{"e":"trade"}}',
)


def malformed(source: Iterator[Frame]) -> Iterator[Frame]:
    """One frame in a hundred is followed by one that is no tick."""
    for number, frame in enumerate(source):
        yield frame
        if number % 100 == 50:
            yield replace(frame, text=_BROKEN[number // 100 % len(_BROKEN)], executions=())


def duplicates(source: Iterator[Frame]) -> Iterator[Frame]:
    """Three frames in ten come again, at once or up to ten frames later."""
    chance = random.Random(1)
    waiting: list[tuple[int, Frame]] = []
    for number, frame in enumerate(source):
        yield frame
        if chance.random() < 0.3:
            waiting.append((number + chance.randrange(10), replace(frame, executions=())))
        due = [again for at, again in waiting if at <= number]
        waiting = [(at, again) for at, again in waiting if at > number]
        for again in due:
            yield replace(again, at_ns=frame.at_ns)
    for _, again in waiting:
        yield again


def oversized(source: Iterator[Frame]) -> Iterator[Frame]:
    """The 1,000th frame is followed by one of 2 MiB."""
    for number, frame in enumerate(source, 1):
        yield frame
        if number == 1_000:
            yield replace(frame, text="x" * OVERSIZED, executions=())


FRAME_FAULTS: dict[str, Callable[[Iterator[Frame]], Iterator[Frame]]] = {
    "malformed": malformed,
    "duplicates": duplicates,
    "oversized": oversized,
}

# Faults of a connection, which the venue's server commits: every frame comes in fragments; the first client hears
# nothing more after some frames, nor a goodbye; the first client gets no more trades after some frames, but its
# heartbeats; every client is cut off without a word after some frames.
FRAGMENTS, SILENCE, DEAD_SUBSCRIPTION, CUTS = "fragments", "silence", "dead-subscription", "cuts"
FRAMES_BEFORE = 3_000

# A fault of the market.
RESTARTED_IDS = "restarted-ids"
TRADES_BEFORE = 2_000

FAULTS = (*FRAME_FAULTS, FRAGMENTS, SILENCE, DEAD_SUBSCRIPTION, CUTS, RESTARTED_IDS)


def restarted_ids(trades: Iterator[Trade]) -> Iterator[Trade]:
    """After 2,000 trades, each symbol's numbers begin again at 1."""
    first: dict[str, int] = {}
    for number, trade in enumerate(trades):
        if number >= TRADES_BEFORE:
            before = first.setdefault(trade.asset, trade.trade_id)
            trade = replace(trade, trade_id=trade.trade_id - before + 1)
        yield trade


def fragments(text: str) -> list[str]:
    """A frame in four parts."""
    quarter = len(text) // 4
    return [text[:quarter], text[quarter : 2 * quarter], text[2 * quarter : 3 * quarter], text[3 * quarter :]]
