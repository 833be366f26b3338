"""Read a record of topic `alerts`: a row of gold.alerts as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from conf.text import shown

# An alert as alerting writes it has less than 2 KB, and its longest text, the id, less than 400 characters.
MOST_BYTES = 16 << 10
MOST_CHARACTERS = 512


class NotAnAlert(ValueError):
    """The record is not a valid alert; the message says why."""


@dataclass(frozen=True)
class Alert:
    """The fields that a notification needs, and the JSON: the original, unless a text in it must be escaped."""

    alert_id: str
    source: str
    asset: str
    direction: str
    opened_at: datetime
    reference_price: str
    trigger_price: str
    change_pct: float
    json: bytes

    @classmethod
    def read(cls, value: bytes | None) -> Alert:
        """Raises NotAnAlert."""
        if len(value or b"") > MOST_BYTES:
            raise NotAnAlert(f"it has more than {MOST_BYTES} bytes")
        try:
            row = json.loads((value or b"").decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
            clean = _clean(row)
        except (ValueError, RecursionError):
            raise NotAnAlert("it is not JSON") from None
        if not isinstance(row, dict):
            raise NotAnAlert("it is not a JSON object")
        return cls(
            alert_id=_text(row, "alert_id"),
            source=_text(row, "source"),
            asset=_text(row, "asset"),
            direction=_text(row, "direction"),
            opened_at=_time(row, "opened_at"),
            reference_price=_text(row, "reference_price"),
            trigger_price=_text(row, "trigger_price"),
            change_pct=_percentage(row, "peak_change_pct"),
            json=(value or b"") if clean == row else json.dumps(clean).encode(),
        )


def _text(row: dict[str, object], name: str) -> str:
    text = row.get(name)
    # A line break in a mail's subject would begin another header.
    if not isinstance(text, str) or not 0 < len(text) <= MOST_CHARACTERS or not text.isprintable():
        raise NotAnAlert(f"{name} is not one line of text of at most {MOST_CHARACTERS} characters")
    return text


def _percentage(row: dict[str, object], name: str) -> float:
    number = row.get(name)
    # A price of 28 digits changes by less than 10^31 percent. An integer may have thousands of digits.
    if isinstance(number, bool) or not isinstance(number, int | float) or abs(number) >= 10**31:
        raise NotAnAlert(f"{name} is not a number of percent")
    return float(number)


def _time(row: dict[str, object], name: str) -> datetime:
    try:
        time = datetime.fromisoformat(_text(row, name))
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise NotAnAlert(f"{name} is not a time with its offset from UTC")


def _clean(value: Any) -> Any:
    """A JSON value whose texts are fit to be shown, the fields that we do not know included."""
    if isinstance(value, dict):
        return {shown(name, MOST_CHARACTERS): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return shown(value, MOST_CHARACTERS) if isinstance(value, str) else value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number of 64 bits")
    return number
