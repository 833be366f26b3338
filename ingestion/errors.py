"""What ends an ingester, and which failures of a connection do.

IngestionError
  VenueRefused     no further attempt to connect can succeed
  DeliveryFailed   Kafka will not take a message
  SpoolInUse       another process writes the spool
  SpoolFailed      the disk does not take what was received
  SpoolDamaged     the disk does not give back what it took
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI

FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
LONGEST_RETRY_AFTER = 600.0


class IngestionError(Exception):
    """The ingester cannot go on. The message says what, where, and what to do."""


class VenueRefused(IngestionError):
    """The venue's answer will not change by asking again."""


class DeliveryFailed(IngestionError):
    """Kafka refused a message for good."""


class SpoolInUse(IngestionError):
    """Another process writes the spool."""


class SpoolFailed(IngestionError):
    """What was received could not be made durable, for another reason than a full disk."""


class SpoolDamaged(IngestionError):
    """Records that were durable cannot be read."""


@dataclass(frozen=True, slots=True)
class NextStep:
    """What to do after a connection failed: stop, or connect again after `wait` seconds at least."""

    fatal: bool
    reason: str
    wait: float = 0.0


def next_step(error: Exception) -> NextStep:
    """Whether a failed connection is worth another attempt."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return NextStep(True, f"its certificate is not valid: {error}")
    if isinstance(error, InvalidURI):
        # Its own message holds the address, and so maybe a key.
        return NextStep(True, "its address is not one of a WebSocket")
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        reason = f"it answered HTTP {status} {error.response.reason_phrase}"
        # 451: for legal reasons this venue is closed to us; the next source may not be.
        if status in (401, 403, 451):
            return NextStep(True, reason)
        if status in (418, 429):
            return NextStep(False, reason, _seconds(error.response.headers.get("Retry-After")))
        return NextStep(False, reason)
    if isinstance(error, ConnectionClosed):
        return NextStep(False, f"connection closed: {error}")
    if isinstance(error, TimeoutError):
        return NextStep(False, "no answer in time")
    return NextStep(False, f"{type(error).__name__}: {error}")


def _seconds(retry_after: str | None) -> float:
    """Binance sends whole seconds. A date, or nothing, is taken for a minute."""
    return min(float(retry_after), LONGEST_RETRY_AFTER) if retry_after and retry_after.isdecimal() else 60.0


def delays(chance: random.Random) -> Iterator[float]:
    """Seconds from the start of one attempt to the next: doubling, up to half as long again by chance.

    The first is a second already, so a venue that accepts and closes at once is not asked more often than that.
    """
    delay = FIRST_DELAY
    while True:
        yield delay * chance.uniform(1.0, 1.5)
        delay = min(delay * 2, LONGEST_DELAY)
