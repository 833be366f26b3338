"""Ticks in the form in which the suite's own ingester writes them, read by Arrow: nearly all of what Kafka has.

One pattern shows that a record is such a tick and valid but for what needs arithmetic; then its fields can be read as
they are. That takes 3 microseconds of a core a record from the first one on, where Spark's generated code is not at
full speed before a JVM has been busy for half a minute. What does not fit is `odd`, and is judged by lake.ticks, which
is also the only way that the proof knows: it shows that the two give the same ticks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from lake.parquet import arrow_type
from lake.tables import PRICE
from lake.ticks import FIELDS, INTEGERS, NAME

# The arithmetic of times is in the pattern: no 30th of February gets through. From 1900 on, since Parquet's readers
# do not agree about what lies before.
_LEAP = r"(?:(?:19|2[0-9])(?:0[48]|[2468][048]|[13579][26])|2[048]00)"
_DATE = (
    r"(?:(?:19|2[0-9])[0-9]{2}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    rf"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-7]):[0-5][0-9])"
_QUOTED_TIME = rf'"{_DATE}T{_TIME}"'
_QUOTED_NUMBER = r'"(?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,12})?"'
_TEXT = rf'"{NAME}"'
_INTEGER = r"(?:0|-?[1-9][0-9]{0,17})"
_FIELD = {
    **dict.fromkeys(FIELDS, _TEXT),
    "timestamp": _QUOTED_TIME,
    "price_usd": _QUOTED_NUMBER,
    "event_time": f"(?:{_QUOTED_TIME}|null)",
    "quantity": f"(?:{_QUOTED_NUMBER}|null)",
    "trade_id": f"(?:{_INTEGER}|null)",
    "trade_epoch": _INTEGER,
    "producer": f"(?:{_TEXT}|null)",
    "sequence": f"(?:{_INTEGER}|null)",
}
CANONICAL = r"\{" + ",".join(f'"{name}":{_FIELD[name]}' for name in FIELDS) + r"\}"
"""All fields, in this order, without spaces; for the whole of a value, in the syntax of RE2 and of Python."""

_PRICE = arrow_type(PRICE)
_TIME_TYPE = arrow_type("TIMESTAMP")
_MESSAGE = pa.schema(
    [
        (name, pa.int64() if name in INTEGERS else _PRICE if name in ("price_usd", "quantity") else pa.string())
        for name in FIELDS
    ]
)


class Parsed(NamedTuple):
    """ticks: silver.ticks without is_late, and notional DECIMAL256(51,18); odd: the other records, as they came."""

    ticks: pa.Table
    odd: pa.Table


def canonical(records: pa.Table, other_topics: Collection[str], future_tolerance_seconds: float) -> Parsed:
    """Read records (lake.ticks.RECORD) of which those of `other_topics` are no ticks."""
    value = records["value"].combine_chunks()
    fits = pc.match_substring_regex(value, rf"^(?:{CANONICAL})\z")
    ours = pc.and_(
        pc.fill_null(fits, False),
        pc.invert(pc.is_in(records["topic"].combine_chunks(), pa.array(list(other_topics), pa.string()))),
    )
    kept, odd = _parted(records, ours)
    if not kept.num_rows:
        return Parsed(_ticks(kept, _MESSAGE.empty_table(), future_tolerance_seconds), odd)
    ticks = _ticks(kept, _messages(kept["value"].combine_chunks()), future_tolerance_seconds)
    valid = pc.and_(
        pc.greater(ticks["price_usd"], pa.scalar(0, pa.decimal128(1, 0))),
        pc.fill_null(pc.less(ticks["notional"], pa.scalar(10**20, pa.decimal128(21, 0))), True),
    )
    if pc.all(valid).as_py():
        return Parsed(ticks, odd)
    _, invalid = _parted(kept, valid)
    return Parsed(ticks.filter(valid), pa.concat_tables([odd, invalid]))


def _parted(rows: pa.Table, chosen: pa.Array) -> tuple[pa.Table, pa.Table]:
    """(the chosen rows, the others)"""
    if pc.all(chosen).as_py():
        return rows, rows.slice(0, 0)
    return rows.filter(chosen), rows.filter(pc.invert(chosen))


def _messages(values: pa.Array) -> pa.Table:
    """The fields of values that fit the pattern: prices as DECIMAL(28,12), times as they are written."""
    lines = pc.binary_join_element_wise(values, pa.scalar(b"\n", pa.binary()), pa.scalar(b"", pa.binary()))
    # The bytes of all lines, one after the other.
    text = lines.buffers()[2]
    rows = pa.json.read_json(
        pa.BufferReader(text),
        # In one piece, and by the thread that asks: a core has a worker of its own.
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pa.json.ParseOptions(explicit_schema=_MESSAGE, unexpected_field_behavior="error"),
    )
    if rows.num_rows != len(values):
        raise AssertionError(f"{len(values)} records in the ingester's form are {rows.num_rows} objects of JSON")
    return rows


def _ticks(records: pa.Table, fields: pa.Table, future_tolerance_seconds: float) -> pa.Table:
    received_at = fields["timestamp"].cast(_TIME_TYPE)
    event_time = pc.coalesce(fields["event_time"].cast(_TIME_TYPE), received_at)
    ahead = pc.subtract(event_time.cast(pa.int64()), received_at.cast(pa.int64()))
    epoch, producer, sequence = fields["trade_epoch"], fields["producer"], fields["sequence"].cast(pa.string())
    event_id = pc.coalesce(
        _joined(fields["source"], fields["symbol"], epoch.cast(pa.string()), fields["trade_id"].cast(pa.string())),
        _joined(producer, sequence),
        _joined(*(records[name].cast(pa.string()) for name in ("topic", "partition", "offset"))),
    )
    return pa.table(
        {
            "event_id": event_id,
            "source": fields["source"],
            "symbol": fields["symbol"],
            "asset": fields["asset"],
            "quote": fields["quote"],
            "price_usd": fields["price_usd"],
            "quantity": fields["quantity"],
            "trade_id": fields["trade_id"],
            "trade_epoch": epoch,
            "event_time": event_time,
            "received_at": received_at,
            "producer": producer,
            "sequence": fields["sequence"],
            "kafka_partition": records["partition"],
            "kafka_offset": records["offset"],
            "is_future": pc.greater(ahead, round(future_tolerance_seconds * 1_000_000)),
            "event_date": event_time.cast(pa.date32()),
            "notional": notional(fields["price_usd"], fields["quantity"]),
        }
    )


def notional(price: pa.ChunkedArray, quantity: pa.ChunkedArray) -> pa.ChunkedArray:
    """price * quantity of positive DECIMAL(28,12), half up, as DECIMAL256(51,18)."""
    product = pc.multiply(*(part.cast(pa.decimal256(28, 12)) for part in (price, quantity)))
    return pc.round(product, 18, "half_towards_infinity").cast(pa.decimal256(51, 18))


def _joined(*parts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts with colons between them; null where one is."""
    return pc.binary_join_element_wise(*parts, ":", null_handling="emit_null")
