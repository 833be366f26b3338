"""Records at the edges of the contract, with the rule that each breaks: one list for all that read records.

The judge and the reader of silver, the oracle, and alerting must each say what stands here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from tests.ingestion.test_ticks import TICK as INGESTED
from tests.oracle import Record

TICK: Mapping[str, object] = {
    "timestamp": "2024-08-09T00:00:01.234567Z",
    "asset": "bitcoin",
    "price_usd": "61685.99000000",
    "quote": "USDT",
    "source": "binance",
    "symbol": "BTCUSDT",
    "event_time": "2024-08-09T00:00:02.234000Z",
    "quantity": "0.00017000",
    "trade_id": 1,
    "trade_epoch": 0,
    "producer": "p",
    "sequence": 1,
}
GAP: Mapping[str, object] = {
    "gap_id": "binance:BTCUSDT:0:7",
    "source": "binance",
    "symbol": "BTCUSDT",
    "trade_epoch": 0,
    "first_missing": 7,
    "last_missing": 9,
    "disconnected_at": "2024-08-09T00:00:00.000000Z",
    "detected_at": "2024-08-09T00:00:01.000001Z",
    "status": "open",
    "reason": None,
    "filled_at": None,
    "filled_by": None,
}
INGESTED_AT = datetime(2024, 8, 9, 0, 0, 3, tzinfo=UTC)
"""When bronze took the records of all cases."""


@dataclass(frozen=True)
class Case:
    """A record's value, and the rule that it breaks; None: it is a tick, or on topic gaps a report."""

    name: str
    value: bytes | None
    rule: str | None
    topic: str = "ticks"

    def record(self, offset: int = 0) -> Record:
        return Record(self.topic, 0, offset, None, self.value, ingested_at=INGESTED_AT)


def compact(message: Mapping[str, object]) -> bytes:
    """As ingestion writes it."""
    return json.dumps(message, separators=(",", ":")).encode()


def with_raw(name: str, raw: str, message: Mapping[str, object] = TICK) -> bytes:
    """The message with a field that holds this text of JSON, whatever it is."""
    marked = compact({**message, name: "MARK"})
    return marked.replace(b'"MARK"', raw.encode("utf-8", "surrogatepass"))


def without(*names: str, message: Mapping[str, object] = TICK) -> bytes:
    return compact({name: value for name, value in message.items() if name not in names})


_CHANGES: tuple[tuple[str, object, str | None], ...] = (
    # Prices: digits as the venue sent them.
    ("price_usd", 61685.99, None),
    ("price_usd", 5, None),
    ("price_usd", "1e3", None),
    ("price_usd", "1E+3", None),
    ("price_usd", "1e-3", None),
    ("price_usd", "+1.0", None),
    ("price_usd", ".5", None),
    ("price_usd", "5.", None),
    ("price_usd", "00016.50", None),
    ("price_usd", "0.1234567890120", None),
    ("price_usd", "1.5000000000000000", None),
    ("price_usd", "9999999999999999.999999999999", None),
    ("price_usd", "0.000000000001", None),
    ("price_usd", "0.1234567890123", "precision"),
    ("price_usd", "0.0000000000000000000000001", "precision"),
    ("price_usd", "1e-30", "precision"),
    ("price_usd", "1e-999", "precision"),
    ("price_usd", "12345678901234567.0000000000001", "precision"),
    ("price_usd", "12345678901234567", "range"),
    ("price_usd", "1e16", "range"),
    ("price_usd", "1e999", "range"),
    ("price_usd", 10**40, "range"),
    ("price_usd", "1e1000", "price"),
    ("price_usd", "0e5", "price"),
    ("price_usd", "0.000000000000", "price"),
    ("price_usd", 0, "price"),
    ("price_usd", "-1", "price"),
    ("price_usd", " 1", "price"),
    ("price_usd", "1\n", "price"),
    ("price_usd", "", "price"),
    ("price_usd", ".", "price"),
    ("price_usd", "e5", "price"),
    ("price_usd", "nan", "price"),
    ("price_usd", "Infinity", "price"),
    ("price_usd", "0x10", "price"),
    ("price_usd", "1_000", "price"),
    ("price_usd", "\u0661", "price"),
    ("price_usd", "\uff11", "price"),
    ("price_usd", "1" * 40_000 + "x", "price"),
    ("price_usd", "1." + "0" * 126, None),
    ("price_usd", "1." + "0" * 127, "price"),
    ("price_usd", True, "type"),
    ("price_usd", [], "type"),
    ("price_usd", {}, "type"),
    ("price_usd", None, "missing"),
    ("quantity", None, None),
    ("quantity", "0", None),
    ("quantity", "0e-30", None),
    ("quantity", "0.00000000000000", None),
    ("quantity", "-0", "quantity"),
    ("quantity", "-0.5", "quantity"),
    ("quantity", "", "quantity"),
    ("quantity", "many", "quantity"),
    ("quantity", "1" * 129, "quantity"),
    ("quantity", "0.0000000000001", "precision"),
    ("quantity", "9999999999999999.5", "range"),
    ("quantity", "1e17", "range"),
    ("quantity", 0.5, "type"),
    ("quantity", False, "type"),
    # Names.
    ("asset", "a" * 64, None),
    ("asset", "null", None),
    ("symbol", "BTC/USD", None),
    ("symbol", None, None),
    ("quote", None, None),
    ("source", None, None),
    ("producer", None, None),
    ("producer", "null", None),
    ("asset", "a" * 65, "name"),
    ("asset", "", "name"),
    ("asset", "a b", "name"),
    ("asset", "bitcoin\n", "name"),
    ("asset", "bitcoin\0", "name"),
    ("source", "", "name"),
    ("producer", "b\u00e9", "name"),
    ("symbol", "a:b", "name"),
    ("symbol", "\ud800", "name"),
    ("quote", 1, "type"),
    ("asset", 5, "type"),
    ("asset", None, "missing"),
    # Numbers of trades and ticks.
    ("trade_id", None, None),
    ("trade_id", 0, None),
    ("trade_id", 10**18 - 1, None),
    ("trade_id", 10**18, "range"),
    ("trade_id", 2**62, "range"),
    ("trade_id", 2**63, "range"),
    ("trade_id", 2**70, "range"),
    ("trade_id", -1, "range"),
    ("trade_id", "7", "type"),
    ("trade_id", 2.0, "type"),
    ("trade_id", True, "type"),
    ("trade_epoch", None, None),
    ("trade_epoch", 2, None),
    ("trade_epoch", 10**18, "range"),
    ("trade_epoch", -1, "range"),
    ("sequence", None, None),
    ("sequence", -(2**63), "range"),
    ("sequence", 1.0, "type"),
    # Times.
    ("event_time", None, None),
    ("event_time", "1970-01-01T00:00:00Z", None),
    ("event_time", "2999-12-31T23:59:59.999999Z", None),
    ("event_time", "1969-12-31T23:00:00-01:00", None),
    ("event_time", "3000-01-01T00:59:59+01:00", None),
    ("event_time", "2024-02-29T00:00:00Z", None),
    ("event_time", "2000-02-29T00:00:00Z", None),
    ("event_time", "2024-08-09T00:00:02+18:00", None),
    ("event_time", "2024-08-09T00:00:02-17:59", None),
    ("event_time", "2024-08-09T00:00:02-00:00", None),
    ("event_time", "1969-12-31T23:59:59.999999Z", "event_time"),
    ("event_time", "1970-01-01T00:59:59+01:00", "event_time"),
    ("event_time", "3000-01-01T00:00:00Z", "event_time"),
    ("event_time", "2999-12-31T23:00:00-01:00", "event_time"),
    ("event_time", "0001-01-01T00:00:00Z", "event_time"),
    ("event_time", "0001-01-01T00:00:00+01:00", "event_time"),
    ("event_time", "9999-12-31T23:59:59-01:00", "event_time"),
    ("event_time", "0000-01-01T00:00:00Z", "event_time"),
    ("event_time", "1899-12-31T23:59:59.999999Z", "event_time"),
    ("event_time", "2024-02-30T00:00:00Z", "event_time"),
    ("event_time", "2023-02-29T00:00:00Z", "event_time"),
    ("event_time", "2100-02-29T00:00:00Z", "event_time"),
    ("event_time", "2024-04-31T00:00:00Z", "event_time"),
    ("event_time", "2024-00-10T00:00:00Z", "event_time"),
    ("event_time", "2024-13-01T00:00:00Z", "event_time"),
    ("event_time", "2024-08-09T24:00:00Z", "event_time"),
    ("event_time", "2024-08-09T23:60:00Z", "event_time"),
    ("event_time", "2024-08-09T23:59:60Z", "event_time"),
    ("event_time", "2024-08-09T00:00:02", "event_time"),
    ("event_time", "2024-08-09T00:00:02.1234567Z", "event_time"),
    ("event_time", "2024-08-09T00:00:02.Z", "event_time"),
    ("event_time", "2024-08-09 00:00:02+05:30", "event_time"),
    ("event_time", "2024-08-09T00:00:02+18:01", "event_time"),
    ("event_time", "2024-08-09T00:00:02+05:60", "event_time"),
    ("event_time", "2024-08-09T00:00:02+0530", "event_time"),
    ("event_time", "2024-08-09T00:00:02Z\n", "event_time"),
    ("event_time", "202\u0664-08-09T00:00:02Z", "event_time"),
    ("event_time", "later", "event_time"),
    ("event_time", 7, "type"),
    ("timestamp", "2024-08-09T00:00:01.2Z", None),
    ("timestamp", "1970-01-01T00:00:00Z", None),
    ("timestamp", "2024-08-10T00:00:03Z", None),
    ("timestamp", "2024-08-10T00:00:03.000001Z", "timestamp"),
    ("timestamp", "2999-12-31T23:59:59Z", "timestamp"),
    ("timestamp", "1969-12-31T23:59:59.999999Z", "timestamp"),
    ("timestamp", "2024-13-09T00:00:00Z", "timestamp"),
    ("timestamp", "2024-08-09T00:00:00", "timestamp"),
    ("timestamp", 1723161601, "type"),
    ("timestamp", None, "missing"),
    # What the contract does not know is passed over.
    ("mood", {"price_usd": 5, "more": [[]]}, None),
)
_LARGEST = "9999999999999999.999999999999"


def _changed() -> Iterable[Case]:
    for number, (name, value, rule) in enumerate(_CHANGES):
        label = f"{number} {name} {str(value)[:40]!a}"
        yield Case(label, compact({**TICK, name: value}), rule)
        yield Case(f"{label}, spaced", json.dumps({**TICK, name: value}).encode(), rule)


def _together() -> Iterable[Case]:
    pairs = (
        (_LARGEST, "0.00017", None),
        (_LARGEST, "10000", None),
        (_LARGEST, "10001", "range"),
        ("1" + 15 * "0", "100000", "range"),
        ("10000000000", "9999999999.999999999999", None),
        ("10000000000", "10000000000", "range"),
        # 10^20 - 10^-24, which is 10^20 when rounded to 18 decimals.
        ("9999999999.999999999999", "10000000000.000000000001", "range"),
        ("0.000000000001", "0.000000000001", None),
        ("x", "y", "price"),
        ("1", "y", "quantity"),
        ("1e-13", "y", "quantity"),
        ("1e20", "1e-13", "precision"),
    )
    for price, quantity, rule in pairs:
        yield Case(f"{price} times {quantity}", compact({**TICK, "price_usd": price, "quantity": quantity}), rule)
    # The first rule wins.
    orders: tuple[tuple[dict[str, object], str], ...] = (
        ({"price_usd": None, "trade_id": "7"}, "type"),
        ({"price_usd": None, "asset": ""}, "missing"),
        ({"asset": "", "timestamp": ""}, "name"),
        ({"timestamp": "", "event_time": ""}, "timestamp"),
        ({"event_time": "", "price_usd": ""}, "event_time"),
        ({"price_usd": "1e-13", "trade_id": -1}, "precision"),
        ({"quantity": "", "trade_id": -1}, "quantity"),
    )
    for changes, rule in orders:
        yield Case(f"{rule} before {sorted(changes)}", compact({**TICK, **changes}), rule)


def _deep(levels: int) -> str:
    """Nested so deep that with the message around it there are so many levels."""
    return "[" * (levels - 1) + "]" * (levels - 1)


_WRITTEN = (
    Case("as it is", compact(TICK), None),
    Case("as ingestion writes it", INGESTED.to_json("producer", 12), None),
    Case("spaced", json.dumps(TICK).encode(), None),
    Case("space around it", b" \t\r\n" + compact(TICK) + b"\n", None),
    Case("only what is required", without(*(TICK.keys() - {"timestamp", "asset", "price_usd"})), None),
    Case("no id at all", without("trade_id", "producer"), None),
    Case("another order of fields", compact(dict(reversed([*TICK.items()]))), None),
    Case("escaped letters", with_raw("asset", '"\\u0062itcoin"'), None),
    Case("no value", None, "json"),
    Case("nothing", b"", "json"),
    Case("an array", b"[]", "json"),
    Case("a number", b"7", "json"),
    Case("a text", b'"x"', "json"),
    Case("null", b"null", "json"),
    Case("a beginning", b"{", "json"),
    Case("an empty object", b"{}", "missing"),
    Case("a letter after it", compact(TICK) + b"x", "json"),
    Case("two of them", compact(TICK) + b"," + compact(TICK), "json"),
    Case("two lines", compact(TICK) + b"\n" + compact(TICK), "json"),
    Case("in an array", b"[" + compact(TICK) + b"]", "json"),
    Case("invalid UTF-8", b'{"asset":"\xff"}', "json"),
    Case("invalid UTF-8 in a tick", with_raw("mood", "MOOD").replace(b"MOOD", b'"\xff"'), "json"),
    Case("a surrogate in UTF-8", with_raw("mood", '"\ud800"'), "json"),
    Case("a surrogate in an escape", with_raw("mood", '"\\ud800"'), None),
    Case("a byte-order mark", b"\xef\xbb\xbf" + compact(TICK), "json"),
    Case("UTF-16", compact(TICK).decode().encode("utf-16"), "json"),
    Case("a line break in a text", with_raw("mood", '"\n"'), "json"),
    Case("a zero byte", compact(TICK) + b"\0", "json"),
    Case("a repeated key", compact(TICK)[:-1] + b',"asset":"bitcoin"}', "json"),
    Case("a repeated key that is unknown", compact(TICK)[:-1] + b',"a":1,"a":1}', "json"),
    Case("a repeated key inside", with_raw("mood", '{"a":1,"a":1}'), "json"),
    Case("a repeated key in escapes", compact(TICK)[:-1] + b',"\\u0061sset":"bitcoin"}', "json"),
    Case("NaN", with_raw("price_usd", "NaN"), "json"),
    Case("NaN elsewhere", with_raw("mood", "[NaN]"), "json"),
    Case("Infinity", with_raw("price_usd", "Infinity"), "json"),
    Case("-Infinity", with_raw("mood", "-Infinity"), "json"),
    Case("a single quote", compact(TICK).replace(b'"', b"'"), "json"),
    Case("a comma too many", compact(TICK)[:-1] + b",}", "json"),
    Case("a leading zero", with_raw("trade_id", "01"), "json"),
    Case("an integer that is -0", with_raw("trade_id", "-0"), None),
    Case("an integer with an exponent", with_raw("trade_id", "1e3"), "type"),
    Case("an integer of 5,000 digits", with_raw("trade_id", "1" * 5_000), "range"),
    Case("a price of 5,000 digits", with_raw("price_usd", "1" * 5_000), "price"),
    Case("a number of 5,000 digits that nobody asked for", with_raw("mood", "1" * 5_000), None),
    Case("a price with all its digits", with_raw("price_usd", "61685.990000000001"), None),
    Case("a price of -0.0", with_raw("price_usd", "-0.0"), "price"),
    Case("a price of 1e400", with_raw("price_usd", "1e400"), "range"),
    Case("64 levels", with_raw("mood", _deep(64)), None),
    Case("65 levels", with_raw("mood", _deep(65)), "json"),
    Case("100,000 levels", with_raw("mood", _deep(100_000)), "json"),
    Case("65 brackets side by side", with_raw("mood", f"[{','.join(['[]'] * 65)}]"), None),
    Case("brackets in a text", with_raw("mood", json.dumps('["' * 100)), None),
    Case("a text without an end", b'{"a":"' + b'[\\"' * 1_000, "json"),
    Case("1 MiB", compact(TICK).ljust(2**20), None),
    Case("more than 1 MiB", compact(TICK).ljust(2**20 + 1), "json"),
)

_REPORTS = (
    Case("a report", compact(GAP), None, "gaps"),
    Case("a report, spaced", json.dumps(GAP).encode(), None, "gaps"),
    Case("only what is required of a report", without(
        *("first_missing", "last_missing", "disconnected_at", "reason", "filled_at", "filled_by"), message=GAP
    ), None, "gaps"),
    Case("a tick on topic gaps", compact(TICK), "gap", "gaps"),
    Case("a report on topic ticks", compact(GAP), "missing"),
    Case("no report", None, "gap", "gaps"),
    Case("half a report", b"{", "gap", "gaps"),
    Case("a report with a key twice", compact(GAP)[:-1] + b',"reason":null}', "gap", "gaps"),
)  # fmt: skip
_IN_REPORTS: tuple[tuple[str, object, str | None], ...] = (
    *((name, None, "gap") for name in ("gap_id", "source", "symbol", "trade_epoch", "detected_at", "status")),
    ("gap_id", "binance:BTCUSDT:2024-08-09T00:00:01.000001Z", None),
    ("gap_id", "", "gap"),
    ("gap_id", "a" * 257, "gap"),
    ("gap_id", 7, "gap"),
    ("source", "a b", "gap"),
    ("symbol", "", "gap"),
    ("symbol", [], "gap"),
    ("status", "filled", None),
    ("status", "unfillable", None),
    ("status", "lost", "gap"),
    ("status", [], "gap"),
    ("trade_epoch", 10**18 - 1, None),
    ("trade_epoch", -1, "gap"),
    ("trade_epoch", "0", "gap"),
    ("first_missing", 9, None),
    ("first_missing", 10, "gap"),
    ("first_missing", 7.0, "gap"),
    ("first_missing", True, "gap"),
    ("first_missing", None, "gap"),
    ("last_missing", None, "gap"),
    ("last_missing", 2**63, "gap"),
    ("last_missing", 10**18, "gap"),
    ("disconnected_at", None, None),
    ("disconnected_at", "", "gap"),
    ("detected_at", "2024-08-09T02:00:00+02:00", None),
    ("detected_at", "0001-01-01T00:00:00Z", "gap"),
    ("detected_at", "3000-01-01T00:00:00Z", "gap"),
    ("detected_at", "2024-02-30T00:00:00Z", "gap"),
    ("detected_at", 1723161601, "gap"),
    ("filled_at", "2024-08-09T00:00:09Z", None),
    ("filled_at", {}, "gap"),
    ("reason", "the venue forgets", None),
    ("reason", "\ud800", None),
    ("reason", "x" * 5_000, None),
    ("reason", 7, "gap"),
    ("filled_by", "backfill", None),
    ("filled_by", False, "gap"),
    ("mood", [1], None),
)
_REJECTS = tuple(
    Case(f"a reject: {value!r}"[:60], value, "reject", "rejects")
    for value in (
        *(None, b"", b"\xff", b"[", compact(TICK), compact(GAP), b'{"reason": "no price"}', b'{"reason": 7}'),
        *(b'{"reason": "\\ud800"}', compact({"reason": "x" * 100_000}), b"{" + b" " * 2**20 + b"}"),
    )
)

CASES: Sequence[Case] = (
    *_WRITTEN,
    *_changed(),
    *_together(),
    *_REPORTS,
    *(
        Case(f"a report with {name} {str(value)[:40]!a}", compact({**GAP, name: value}), rule, "gaps")
        for name, value, rule in _IN_REPORTS
    ),
    *_REJECTS,
)


def arrow_records(records: Sequence[Record]) -> pa.Table:
    """Records as lake.silver.read wants them."""
    times = pa.timestamp("us", "UTC")
    columns: dict[str, pa.Array] = {
        "key": pa.array([record.key for record in records], pa.binary()),
        "value": pa.array([record.value for record in records], pa.binary()),
        "topic": pa.array([record.topic for record in records], pa.string()),
        "partition": pa.array([record.partition for record in records], pa.int32()),
        "offset": pa.array([record.offset for record in records], pa.int64()),
        "kafka_timestamp": pa.array([record.kafka_timestamp for record in records], times),
        "ingested_at": pa.array([record.ingested_at for record in records], times),
    }
    return pa.table(columns)
