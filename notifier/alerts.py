"""Read a record of topic `alerts`: a row of gold.alerts as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime


class NotAnAlert(ValueError):
    """The record is not a valid alert; the message says why."""


@dataclass(frozen=True)
class Alert:
    """The fields that a notification needs, and the original JSON."""

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
        try:
            row = json.loads((value or b"").decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise NotAnAlert("it is not JSON") from None
        if not isinstance(row, dict):
            raise NotAnAlert("it is not a JSON object")
        change = row.get("peak_change_pct")
        if isinstance(change, bool) or not isinstance(change, int | float) or not math.isfinite(change):
            raise NotAnAlert("peak_change_pct is not a number")
        return cls(
            alert_id=_text(row, "alert_id"),
            source=_text(row, "source"),
            asset=_text(row, "asset"),
            direction=_text(row, "direction"),
            opened_at=_time(row, "opened_at"),
            reference_price=_text(row, "reference_price"),
            trigger_price=_text(row, "trigger_price"),
            change_pct=float(change),
            json=value or b"",
        )


def _text(row: dict[str, object], name: str) -> str:
    text = row.get(name)
    # A line break in a mail's subject would begin another header.
    if not isinstance(text, str) or not text or not text.isprintable():
        raise NotAnAlert(f"{name} is not one line of text")
    return text


def _time(row: dict[str, object], name: str) -> datetime:
    try:
        time = datetime.fromisoformat(_text(row, name))
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise NotAnAlert(f"{name} is not a time with its offset from UTC")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
