"""What the gap tracker knew when the ingester ended, however it ended."""

from __future__ import annotations

import json

from ingestion.fields import utc_ns
from ingestion.gaps import Gap, GapTracker
from ingestion.intake import Topics
from ingestion.spool import Spool
from ingestion.state import State
from ingestion.ticks import Reject, Tick

SECTION = "gaps"


def recover_tracker(state: State, spool: Spool, topics: Topics) -> GapTracker:
    """The tracker as it was saved, with what the spool has taken since. It does not know yet of a restart."""
    saved = state.sections.get(SECTION)
    tracker = GapTracker() if saved is None else GapTracker.from_json(saved)
    for record in spool.records(state.position):
        if record.topic == topics.ticks:
            tracker.observe_again(_tick(record.value))
        elif record.topic == topics.rejects:
            message = json.loads(record.value)
            tracker.observe_reject(
                Reject(_ns(message["received_at"]), message["source"], "", b"", message["symbol"], message["trade_id"])
            )
        elif record.topic == topics.gaps:
            tracker.observe_report(_gap(record.value))
    return tracker


def _gap(value: bytes) -> Gap:
    """The gap of a message that `Gap.to_json` made."""
    message = json.loads(value)
    for name in ("disconnected_at", "detected_at", "filled_at"):
        message[name] = None if message[name] is None else _ns(message[name])
    return Gap(**message)


def _tick(value: bytes) -> Tick:
    """The tick of a message that `Tick.to_json` made."""
    message = json.loads(value)
    return Tick(
        received_ns=_ns(message["timestamp"]),
        asset=message["asset"],
        price_usd=message["price_usd"],
        quote=message["quote"],
        source=message["source"],
        symbol=message["symbol"],
        event_ns=None if message["event_time"] is None else _ns(message["event_time"]),
        quantity=message["quantity"],
        trade_id=message["trade_id"],
        trade_epoch=message["trade_epoch"],
    )


def _ns(text: str) -> int:
    nanoseconds = utc_ns(text)
    if nanoseconds is None:
        raise ValueError(f"{text!r} is no time")
    return nanoseconds
