"""Promise 5: whatever a record holds, it is a tick, a report or in quarantine, and stops nothing.

`--fuzz 1000000` judges so many records, and sends a tenth of them through the whole stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lake.contract import TickRules
from lake.silver.gaps import Gap
from lake.silver.judge import Rejection, Tick, judge
from lake.silver.read import read
from lake.tables import BRONZE_TICKS, SILVER_QUARANTINE, SILVER_TICKS
from tests.fuzz.mutations import mutated
from tests.lakes import rows_of
from tests.micro_batches import lake_in, write
from tests.oracle import Record
from tests.ticks import CASES, GAP, TICK, arrow_records, compact

RULES = TickRules("rejects", "gaps", 5.0)
NOW = datetime(2026, 11, 25, tzinfo=UTC)
GOOD = [
    *(
        compact({**TICK, "trade_id": n, "sequence": n, "symbol": f"S{n % 9}", "price_usd": f"{n}.5"})
        for n in range(1, 999)
    ),
    *(compact(TICK), compact({**TICK, "trade_id": None}), compact({**TICK, "price_usd": 61685.99, "event_time": None})),
    *(compact(GAP), b'{"source":"binance","reason":"no price","symbol":"BTCUSDT","trade_id":7,"raw":"{"}'),
    *(case.value for case in CASES if case.value and len(case.value) < 1_000),
]
TOPICS = ("ticks", "ticks", "ticks", "gaps", "rejects")
TOGETHER = 5_000


def records(chance: random.Random, first: int, count: int) -> list[Record]:
    return [
        Record(chance.choice(TOPICS), 0, offset, b"key", mutated(GOOD, chance), ingested_at=NOW)
        for offset in range(first, first + count)
    ]


def test_any_record_is_judged_and_read_alike(fuzz: int) -> None:
    chance = random.Random(fuzz)
    ticks = rejections = 0
    for first in range(0, fuzz, TOGETHER):
        some = records(chance, first, min(TOGETHER, fuzz - first))
        verdicts = [judge(r.value, r.topic, r.partition, r.offset, r.ingested_at, RULES) for r in some]
        contents = read(arrow_records(some), RULES)
        by_offset = {r.offset: verdict for r, verdict in zip(some, verdicts, strict=True)}
        read_ticks = {row["kafka_offset"]: row for row in contents.ticks.select(COMPARED).to_pylist()}
        assert read_ticks == {
            offset: {name: getattr(v, name) for name in COMPARED}
            for offset, v in by_offset.items()
            if isinstance(v, Tick)
        }
        quarantined = {row["offset"]: (row["rule"], row["reason"]) for row in contents.quarantined.to_pylist()}
        assert quarantined == {o: (v.rule, v.reason) for o, v in by_offset.items() if isinstance(v, Rejection)}
        assert len(contents.reports) == sum(isinstance(verdict, Gap) for verdict in verdicts)
        ticks, rejections = ticks + len(read_ticks), rejections + len(quarantined)
    assert min(ticks, rejections) > fuzz // 20, "the mutations are neither too mild nor too wild"


COMPARED = [
    *("event_id", "source", "symbol", "asset", "quote", "price_usd", "quantity", "trade_id", "trade_epoch"),
    *("producer", "sequence", "kafka_offset", "is_future"),
]


def test_any_record_goes_through_the_whole_stream(fuzz: int, tmp_path: Path) -> None:
    chance = random.Random(fuzz + 1)
    count = max(500, fuzz // 10)
    parts = [records(chance, first, min(TOGETHER, count - first)) for first in range(0, count, TOGETHER)]
    settings = lake_in(tmp_path)
    write(None, settings, parts, tasks=2)
    everything = [record for part in parts for record in part]
    places = {record.place for record in everything}
    # Bronze took them now, and not when the records say.
    rows: Iterable[Any] = rows_of(settings.lake_root, BRONZE_TICKS).values()
    at = max(row["ingested_at"] for row in rows)
    assert rows_of(settings.lake_root, BRONZE_TICKS).keys() == places
    verdicts = {r.place: judge(r.value, r.topic, r.partition, r.offset, at, RULES) for r in everything}
    quarantine = rows_of(settings.lake_root, SILVER_QUARANTINE)
    assert quarantine.keys() == {place for place, verdict in verdicts.items() if isinstance(verdict, Rejection)}
    assert "unreadable" not in {row["rule"] for row in quarantine.values()}
    event_ids = {verdict.event_id for verdict in verdicts.values() if isinstance(verdict, Tick)}
    assert rows_of(settings.lake_root, SILVER_TICKS).keys() == event_ids
