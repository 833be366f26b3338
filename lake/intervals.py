"""Sets of trade ids as sorted, disjoint, non-adjacent intervals, both ends included."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

Instrument = tuple[str, str, int]
"""source, symbol, trade_epoch"""
Interval = tuple[int, int]


def add_interval(intervals: Sequence[Interval], added: Interval) -> tuple[Interval, ...]:
    """The union of `intervals` and `added`."""
    return add_intervals(intervals, (added,))


def add_intervals(intervals: Sequence[Interval], added: Iterable[Interval]) -> tuple[Interval, ...]:
    """The union of `intervals` and all of `added`, which may overlap and come in any order.

    Only intervals between the lowest and the highest added id are merged; the rest is copied.
    """
    added = list(added)
    if not added:
        return tuple(intervals)
    lowest, highest = min(first for first, _ in added), max(last for _, last in added)
    start = bisect_left(intervals, lowest - 1, key=_last)
    stop = bisect_right(intervals, highest + 1, key=_first)
    merged: list[Interval] = []
    for first, last in sorted((*intervals[start:stop], *added)):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return (*intervals[:start], *merged, *intervals[stop:])


def overlapping(intervals: Sequence[Interval], window: Interval) -> Sequence[Interval]:
    """The intervals that share an id with the window, uncut."""
    start = bisect_left(intervals, window[0], key=_last)
    return intervals[start : bisect_right(intervals, window[1], start, key=_first)]


def overlaps(intervals: Sequence[Interval], window: Interval) -> bool:
    """Whether one of the intervals shares an id with the window."""
    at = bisect_left(intervals, window[0], key=_last)
    return at < len(intervals) and intervals[at][0] <= window[1]


def minus(intervals: Iterable[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The ids of `intervals` that `others` lacks. Both are sorted and disjoint, and may be adjacent."""
    left: list[Interval] = []
    at = 0
    for first, last in intervals:
        while at < len(others) and others[at][1] < first:
            at += 1
        while at < len(others) and others[at][0] <= last:
            low, high = others[at]
            if low > first:
                left.append((first, low - 1))
            first = high + 1
            if high > last:
                # It may reach into the next interval too.
                break
            at += 1
        if first <= last:
            left.append((first, last))
    return left


def common(intervals: Iterable[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The ids that both have, split at the ends of either's intervals. Both are as in `minus`."""
    both: list[Interval] = []
    at = 0
    for first, last in intervals:
        while at < len(others) and others[at][1] < first:
            at += 1
        while at < len(others) and others[at][0] <= last:
            low, high = others[at]
            both.append((max(first, low), min(last, high)))
            if high > last:
                # It may reach into the next interval too.
                break
            at += 1
    return both


def holes(seen: Sequence[Interval], known: Sequence[Interval]) -> list[Interval]:
    """The missing ids: those between the intervals of `seen` that `known` lacks."""
    return minus(((left[1] + 1, right[0] - 1) for left, right in pairwise(seen)), known)


def holes_within(seen: Sequence[Interval], known: Sequence[Interval], window: Interval) -> list[Interval]:
    """The missing ids of `holes(seen, known)` within the window.

    It reads only intervals near the window, found by bisection.
    """
    first, last = window
    missing: list[Interval] = []
    # Skip holes before the window. There is no hole before the first interval.
    for right in range(max(1, bisect_left(seen, first, key=_last)), len(seen)):
        hole = (max(first, seen[right - 1][1] + 1), min(last, seen[right][0] - 1))
        if hole[0] > last:
            break
        if hole[0] <= hole[1]:
            missing += minus([hole], overlapping(known, hole))
    return missing


def _first(interval: Interval) -> int:
    return interval[0]


def _last(interval: Interval) -> int:
    return interval[1]
