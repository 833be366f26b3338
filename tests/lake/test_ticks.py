"""Parsing: promise 5, a record that is not a tick is known, with its rule, and nothing else is taken for one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from lake.canonical import CANONICAL, canonical
from lake.ticks import judged, quarantined, valid_ticks
from tests.ingestion.test_ticks import TICK as INGESTED
from tests.oracle import NotATick, Record, Tick, tick_of

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
CHANGES: tuple[tuple[str, object], ...] = (
    ("price_usd", 61685.99),
    ("price_usd", "1e3"),
    ("price_usd", "+1.0"),
    ("price_usd", " 1"),
    ("price_usd", "0.1234567890120"),
    ("price_usd", "0.1234567890123"),
    ("price_usd", "0.0000000000000000000000001"),
    ("price_usd", "0.000000000000"),
    ("price_usd", "12345678901234567"),
    ("price_usd", "0x10"),
    ("price_usd", "1_000"),
    ("price_usd", []),
    ("quantity", "0.00000000000000"),
    ("quantity", "9999999999999999.5"),
    ("quantity", "-0.5"),
    ("quantity", ""),
    ("quantity", False),
    ("asset", "a" * 64),
    ("asset", "a" * 65),
    ("asset", "null"),
    ("asset", "bitcoin\n"),
    ("symbol", "BTC/USD"),
    ("quote", None),
    ("source", None),
    ("trade_id", None),
    ("trade_id", 2**62),
    ("trade_id", 2**63),
    ("trade_id", -1),
    ("trade_epoch", None),
    ("sequence", None),
    ("sequence", 1.0),
    ("producer", None),
    ("producer", "null"),
    ("event_time", None),
    ("event_time", "1899-12-31T23:59:59.999999Z"),
    ("event_time", "2024-02-30T00:00:00Z"),
    ("event_time", "2024-08-09 00:00:02+05:30"),
    ("timestamp", "2024-08-09T00:00:01.2Z"),
    ("timestamp", 1723161601),
    ("mood", {"price_usd": 5}),
)


def records(spark: SparkSession, values: list[bytes | None]) -> DataFrame:
    rows = [(None, None if value is None else bytearray(value), "ticks", 0, n, None) for n, value in enumerate(values)]
    return spark.createDataFrame(
        rows, "key BINARY, value BINARY, topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP"
    )


def verdict(offset: int, value: bytes | None) -> tuple[str, Tick | None]:
    """The oracle's: the rule that is broken, or the tick."""
    try:
        return "", tick_of(Record("ticks", 0, offset, None, value), timedelta(seconds=5))
    except NotATick as error:
        return str(error), None


def test_a_record_is_judged_as_the_oracle_does_in_either_form_of_json(spark: SparkSession) -> None:
    """Compact, as ingestion writes it, and spaced, as others may; by the general way and by the short one."""
    messages = [dict(TICK), *({**TICK, name: value} for name, value in CHANGES)]
    compact = [json.dumps(message, separators=(",", ":")).encode() for message in messages]
    values: list[bytes | None] = [*compact, *(json.dumps(message).encode() for message in messages)]
    values += [None, b"", b"[]", b"7", b"{", compact[0] + b"x", compact[0] + b"," + compact[0]]
    checked = judged(records(spark, values), "rejects", "gaps").persist()
    ticks = {row["kafka_offset"]: row for row in valid_ticks(checked, "gaps", 5.0).collect()}
    bad = {row["offset"]: row for row in quarantined(checked, datetime(2024, 1, 1, tzinfo=UTC)).collect()}
    assert len(ticks) + len(bad) == len(values)
    for offset, value in enumerate(values):
        rule, expected = verdict(offset, value)
        if expected is None:
            assert bad[offset]["rule"] == rule, value
            assert bad[offset]["reason"]
            assert bad[offset]["value"] == value
            continue
        found = ticks[offset].asDict()
        for name in ("event_id", "asset", "source", "symbol", "quote", "price_usd", "quantity", "is_future"):
            assert found[name] == getattr(expected, name), (value, name)
        assert found["event_time"] == expected.event_time.replace(tzinfo=None)
    assert 10 < len(ticks) < len(values) - 10

    short = canonical(arrow(values), ("rejects", "gaps"), 5.0)
    taken = {row["kafka_offset"]: row for row in short.ticks.drop_columns(["notional"]).to_pylist()}
    for offset, row in taken.items():
        naive = {name: row[name].replace(tzinfo=None) for name in ("event_time", "received_at")}
        assert {**row, **naive} == ticks[offset].asDict(), values[offset]
    fitting = {at for at, value in enumerate(values) if value and re.fullmatch(CANONICAL, value.decode())}
    assert taken.keys() == fitting & ticks.keys()
    assert len(taken) > 5
    assert fitting - ticks.keys(), "not all that fits the pattern is a tick"
    assert sorted(short.odd["offset"].to_pylist()) == sorted(set(range(len(values))) - taken.keys())


def arrow(values: Sequence[bytes | None], topic: str = "ticks") -> pa.Table:
    """Records of partition 0, as an executor has them."""
    count = len(values)
    return pa.table(
        {
            "key": pa.nulls(count, pa.binary()),
            "value": pa.array(values, pa.binary()),
            "topic": pa.repeat(topic, count),
            "partition": pa.repeat(pa.scalar(0, pa.int32()), count),
            "offset": pa.array(range(count), pa.int64()),
            "kafka_timestamp": pa.nulls(count, pa.timestamp("us", "UTC")),
        }
    )


def test_records_of_other_topics_and_impossible_days_do_not_go_the_short_way() -> None:
    def parsed(time: str, topic: str = "ticks") -> int:
        value = json.dumps({**TICK, "event_time": time}, separators=(",", ":")).encode()
        return len(canonical(arrow([value], topic), ("rejects", "gaps"), 5.0).ticks)

    day = datetime(1999, 12, 30, tzinfo=UTC)
    while (day := day + timedelta(days=1)).year < 2002:
        assert parsed(day.isoformat()) == 1
    for date in ("2023-02-29", "2100-02-29", "1900-02-29", "2024-04-31", "2024-02-30", "2024-00-10", "2024-13-01"):
        assert parsed(f"{date}T00:00:00Z") == 0, date
    for date in ("2024-02-29", "2000-02-29", "2400-02-29", "2028-02-29", "1900-01-01", "2999-12-31"):
        assert parsed(f"{date}T23:59:59.999999+17:59") == 1, date
    for clock in ("24:00:00Z", "23:60:00Z", "23:59:60Z", "00:00:00", "00:00:00.1234567Z", "00:00:00+18:00"):
        assert parsed(f"2024-01-01T{clock}") == 0, clock
    for topic in ("rejects", "gaps"):
        assert parsed("2024-01-01T00:00:00Z", topic) == 0
    assert canonical(arrow([]), (), 5.0).ticks.num_rows == 0


def test_what_ingestion_writes_takes_the_short_way() -> None:
    """The pattern that saves a second look at the types must fit the ingester's own form, or it saves nothing."""
    message = INGESTED.to_json("producer", 12).decode()
    assert re.fullmatch(CANONICAL, message)
    for wrong in ('"trade_id":"1"', '"trade_id":1.5', '"trade_id":01', '"trade_id":true'):
        text = re.sub(r'"trade_id":\d+', wrong, message)
        assert not re.fullmatch(CANONICAL, text)
