"""Sets of trade ids as sorted, disjoint intervals, both ends included."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

Instrument = tuple[str, str, int]
"""source, symbol, trade_epoch"""
Interval = tuple[int, int]


def add_interval(intervals: Sequence[Interval], added: Interval) -> tuple[Interval, ...]:
    """The sorted, disjoint, non-adjacent intervals of integers that cover `intervals` and `added`."""
    first, last = added
    low = bisect_left(intervals, first - 1, key=lambda interval: interval[1])
    high = low
    while high < len(intervals) and intervals[high][0] <= last + 1:
        first, last = min(first, intervals[high][0]), max(last, intervals[high][1])
        high += 1
    return (*intervals[:low], (first, last), *intervals[high:])


def overlaps(intervals: Sequence[Interval], other: Interval) -> bool:
    """Whether one of the intervals has a number of the other."""
    at = bisect_left(intervals, other[0], key=lambda interval: interval[1])
    return at < len(intervals) and intervals[at][0] <= other[1]


def minus(intervals: Iterable[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """The numbers of the sorted, disjoint intervals that no interval of `taken`, likewise, has."""
    left: list[Interval] = []
    for first, last in intervals:
        for low, high in taken:
            if high < first or low > last:
                continue
            if low > first:
                left.append((first, low - 1))
            first = high + 1
        if first <= last:
            left.append((first, last))
    return left


def common(intervals: Iterable[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The numbers that both have."""
    return [
        (max(first, low), min(last, high))
        for first, last in intervals
        for low, high in others
        if max(first, low) <= min(last, high)
    ]


def holes(seen: Sequence[Interval], known: Sequence[Interval]) -> list[Interval]:
    """The missing numbers: those between the intervals of `seen`, without those of `known`."""
    between = [(left[1] + 1, right[0] - 1) for left, right in pairwise(seen)]
    return minus(between, known)
