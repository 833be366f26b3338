"""The lake's time units: microseconds since 1970 in UTC, and buckets of five seconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
BUCKET_SECONDS = 5
BUCKET = BUCKET_SECONDS * SECOND
"""Gold's smallest window; all others are merged from it."""

Range = tuple[int, int]
"""(begin, end): times from begin to before end, in microseconds since 1970."""


def to_time(micros: int) -> datetime:
    """Microseconds since 1970 as a time in UTC."""
    return EPOCH + timedelta(microseconds=micros)


def to_micros(time: datetime) -> int:
    """A time with a zone in microseconds since 1970."""
    return (time - EPOCH) // timedelta(microseconds=1)


def bucket_of(micros: int) -> int:
    """The number of the bucket that contains a time."""
    return micros // BUCKET


def bucket_start(bucket: int) -> int:
    """When a bucket begins, in microseconds since 1970."""
    return bucket * BUCKET
