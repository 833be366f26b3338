"""What ends an ingester, and which failures of a connection do.

IngestionError
  VenueRefused     no further attempt to connect can succeed
  DeliveryFailed   Kafka will not take a message
    MessageTooLarge  because of its size, or that of its batch
  SpoolInUse       another process writes the spool
  SpoolFailed      the disk does not take what was received
  SpoolDamaged     the disk does not give back what it took
"""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from websockets.exceptions import (
    ConnectionClosed,
    InvalidProxy,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)

from conf.text import shown

FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
# A venue that asks to wait is left alone for as long as it says: bans last up to three days at Binance ("IP bans ...
# scale in duration for repeat offenders, from 2 minutes to 3 days",
# https://developers.binance.com/docs/binance-spot-api-docs/rest-api/limits). A longer time is not believed.
LONGEST_RETRY_AFTER = 7 * 86_400.0
# A venue that asks to wait and does not say how long.
USUAL_RETRY_AFTER = 60.0
# A firewall in front of a venue answers HTTP 403 for minutes and then no more; so many in a row are a refusal.
FORBIDDEN_TRIES = 8


class IngestionError(Exception):
    """The ingester cannot go on. The message says what, where, and what to do."""


class VenueRefused(IngestionError):
    """The venue's answer will not change by asking again."""


class DeliveryFailed(IngestionError):
    """Kafka refused a message for good."""


class MessageTooLarge(DeliveryFailed):
    """Kafka takes no message, or no batch of messages, of this size."""


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
    most_tries: int = 0
    """The same answer so many times in a row is final; 0: it never is."""


def next_step(error: Exception) -> NextStep:
    """Whether a failed connection is worth another attempt."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return NextStep(True, f"its certificate is not valid: {shown(error)}")
    if isinstance(error, InvalidURI):
        # Its own message holds the address, and so maybe a key.
        return NextStep(True, "its address is not one of a WebSocket")
    if isinstance(error, InvalidProxy):
        # Its own message holds the address, and so maybe a password.
        return NextStep(True, "the setting venue_proxy is not the address of an HTTP proxy")
    if isinstance(error, InvalidProxyStatus):
        return NextStep(False, f"the proxy answered HTTP {error.response.status_code}")
    if isinstance(error, ProxyError):
        return NextStep(False, f"the proxy cannot be used ({type(error).__name__})")
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        reason = f"it answered HTTP {status} {shown(error.response.reason_phrase)}"
        # 451: for legal reasons this venue is closed to us; the next source may not be.
        if status in (401, 451):
            return NextStep(True, reason)
        wait = retry_after(status, error.response.headers)
        if wait:
            reason += f"; asking again in {wait:.0f} s"
        return NextStep(False, reason, wait, FORBIDDEN_TRIES if status == 403 else 0)
    if isinstance(error, ConnectionClosed):
        return NextStep(False, f"connection closed: {shown(error)}")
    if isinstance(error, TimeoutError):
        return NextStep(False, "no answer in time")
    return NextStep(False, f"{type(error).__name__}: {shown(error)}")


def retry_after(status: int, headers: Mapping[str, str]) -> float:
    """For how many seconds an HTTP answer asks to be left alone; 0 where it does not.

    A header Retry-After has seconds or a date. A 418 or 429 without one asks all the same.
    """
    text = headers.get("Retry-After")
    if text is None:
        return USUAL_RETRY_AFTER if status in (418, 429) else 0.0
    seconds = float(text) if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", text.strip()) else _until(text, headers)
    return min(seconds, LONGEST_RETRY_AFTER)


def _until(date: str, headers: Mapping[str, str]) -> float:
    """Seconds until a date, by the clock of the venue where it tells its time."""
    try:
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        seconds = (parsedate_to_datetime(date) - now).total_seconds()
    except (ValueError, TypeError):
        return USUAL_RETRY_AFTER
    return max(seconds, FIRST_DELAY)


def delays(chance: random.Random) -> Iterator[float]:
    """Seconds from the start of one attempt to the next: doubling, up to half as long again by chance.

    The first is a second already, so a venue that accepts and closes at once is not asked more often than that.
    """
    delay = FIRST_DELAY
    while True:
        yield delay * chance.uniform(1.0, 1.5)
        delay = min(delay * 2, LONGEST_DELAY)
