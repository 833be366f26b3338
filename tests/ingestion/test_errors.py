"""Which failures are worth another attempt, and how long to wait for it."""

import random
import ssl
from itertools import islice

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import (
    ConnectionClosedError,
    InvalidHandshake,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)
from websockets.frames import Close
from websockets.http11 import Response

from ingestion.errors import FORBIDDEN_TRIES, LONGEST_DELAY, LONGEST_RETRY_AFTER, delays, next_step


def answered(status: int, **headers: str) -> InvalidStatus:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return InvalidStatus(Response(status, "Reason", Headers(names), b""))


@pytest.mark.parametrize(
    ("error", "fatal", "wait"),
    [
        (ssl.SSLCertVerificationError("expired"), True, 0),
        (answered(401), True, 0),
        (answered(403), False, 0),
        (answered(403, Retry_After="30"), False, 30),
        (InvalidURI("nonsense", "no scheme"), True, 0),
        (answered(429, Retry_After="7"), False, 7),
        (answered(418, Retry_After="120"), False, 120),
        (answered(418, Retry_After="259200"), False, 259_200),
        (answered(429, Retry_After="99999999999"), False, LONGEST_RETRY_AFTER),
        (answered(429, Retry_After="9" * 5000), False, 60),
        (answered(429, Retry_After="0.5"), False, 0.5),
        (
            answered(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT", Date="Wed, 21 Oct 2026 07:18:00 GMT"),
            False,
            600,
        ),
        (answered(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT", Date="nonsense"), False, 60),
        (answered(429, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT"), False, LONGEST_RETRY_AFTER),
        (answered(429, Retry_After="soon"), False, 60),
        (answered(429), False, 60),
        (answered(503, Retry_After="7"), False, 7),
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


def test_a_403_is_final_only_after_several_in_a_row() -> None:
    """A firewall in front of a venue passes."""
    assert next_step(answered(403)).most_tries == FORBIDDEN_TRIES > 3
    assert next_step(answered(503)).most_tries == 0


@pytest.mark.parametrize(
    "error",
    [
        InvalidStatus(Response(503, "no\r\n2026-01-01 ERROR forged \x1b[2J" + "x" * 9_999, Headers(), b"")),
        ConnectionClosedError(Close(1011, "no\r\n2026-01-01 ERROR forged \x1b[2J\u202e\u2028"), None),
        InvalidHandshake("no\n2026-01-01 ERROR forged \x1b[2J" + "x" * 9_999),
        OSError("no\n2026-01-01 ERROR forged \x1b[2J"),
        ssl.SSLCertVerificationError("no\n2026-01-01 ERROR forged \x1b[2J"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_venues_words_forge_no_log_line(error: Exception) -> None:
    reason = next_step(error).reason
    assert reason.isprintable()
    assert len(reason) < 400
    assert "forged" in reason


def test_a_proxys_password_is_in_no_reason() -> None:
    for error in (InvalidProxy("http://user:canary@proxy:1", "bad port"), ProxyError("http://user:canary@proxy:1")):
        assert "canary" not in next_step(error).reason
