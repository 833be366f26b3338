"""Which failures are worth another attempt, and how long to wait for it."""

import random
import ssl
from itertools import islice

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.frames import Close
from websockets.http11 import Response

from ingestion.errors import LONGEST_DELAY, delays, next_step


def answered(status: int, **headers: str) -> InvalidStatus:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return InvalidStatus(Response(status, "Reason", Headers(names), b""))


@pytest.mark.parametrize(
    ("error", "fatal", "wait"),
    [
        (ssl.SSLCertVerificationError("expired"), True, 0),
        (answered(401), True, 0),
        (answered(403), True, 0),
        (InvalidURI("nonsense", "no scheme"), True, 0),
        (answered(429, Retry_After="7"), False, 7),
        (answered(418, Retry_After="120"), False, 120),
        (answered(429, Retry_After="86400"), False, 600),
        (answered(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), False, 60),
        (answered(429), False, 60),
        (answered(404), False, 0),
        (answered(451), True, 0),
        (answered(503), False, 0),
        (ssl.SSLError("wrong version"), False, 0),
        (ConnectionRefusedError(111, "refused"), False, 0),
        (TimeoutError(), False, 0),
        (InvalidHandshake("odd"), False, 0),
        (ConnectionClosedError(Close(1009, "too big"), None), False, 0),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_only_what_cannot_change_by_asking_again_is_fatal(error: Exception, fatal: bool, wait: float) -> None:
    step = next_step(error)
    assert (step.fatal, step.wait) == (fatal, wait)
    assert step.reason
    assert "\n" not in step.reason


def test_delays_double_with_jitter_from_a_second_to_a_bound() -> None:
    waits = list(islice(delays(random.Random(7)), 12))
    for number, wait in enumerate(waits):
        least = min(2.0**number, LONGEST_DELAY)
        assert least <= wait <= 1.5 * least
    assert len(set(waits)) == len(waits)
