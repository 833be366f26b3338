"""Promises 2 and 3: gold is what all distinct ticks together give, however late, repeated, and cut."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from conf.settings import Settings
from lake.contract import feeds
from lake.delta.files import files_of
from lake.gold.sinks import Console, PlainParquet, is_of_the_contract
from lake.gold.update import feeding
from lake.intervals import Interval
from lake.reader import query, read
from lake.rules import deciding, gold_rules
from lake.rules import differences as setting_differences
from lake.silver.gaps import Gap
from lake.tables import GOLD, GOLD_CURRENT_PRICE, SILVER_GAPS
from tests.lakes import rows_of, wrong_gaps, wrong_rows
from tests.micro_batches import START, in_kafka, lake_in, market, opened, pieces, write, write_one
from tests.oracle import Lake, Record, Row, differences, lake_of
from tests.ticks import GAP, compact


def tick(number: int, at: datetime, price: str, asset: str = "x", source: str = "a", **fields: object) -> bytes:
    """In the ingester's own layout."""
    time = at.isoformat(timespec="microseconds")
    message: dict[str, object] = {
        "timestamp": time,
        "asset": asset,
        "price_usd": price,
        "quote": "USD",
        "source": source,
        "symbol": asset.upper(),
        "event_time": time,
        "quantity": "0.5",
        "trade_id": number,
        "trade_epoch": 0,
        "producer": "p",
        "sequence": number,
    }
    return compact({**message, **fields})


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def other_layout(value: bytes, chance: random.Random) -> bytes:
    """The same tick as another producer would write it: with spaces, in another order, without what is null."""
    fields = [(name, content) for name, content in json.loads(value).items() if content is not None]
    chance.shuffle(fields)
    return json.dumps(dict(fields)).encode()


def delivered(chance: random.Random) -> list[bytes | None]:
    """A market's ticks: some late, some repeated, some in another layout; and records that are no ticks."""
    values = [other_layout(value, chance) if chance.random() < 0.1 else value for value in market(chance)]
    # Those told apart by their sequence keep their order: Kafka does.
    late = {value for value in values if "trade_id" in json.loads(value) and chance.random() < 0.1}
    late = {value for value in late if json.loads(value)["trade_id"] is not None}
    in_time = [value for value in values if value not in late]
    for value in sorted(late):
        in_time.insert(chance.choice([len(in_time), chance.randrange(len(in_time))]), value)
    repeated = set(chance.sample(range(len(in_time)), 40))
    everything: list[bytes | None] = [
        value for n, value in enumerate(in_time) for _ in range(2 if n in repeated else 1)
    ]
    for odd in (b"{", b"", None, b"null", tick(7, START, "-1"), compact({"price_usd": 1})):
        everything.insert(chance.randrange(len(everything)), odd)
    return everything


def drawn_settings(chance: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that decide what gold holds, and what the oracle calls them."""
    ours: dict[str, Any] = {}
    oracle: dict[str, Any] = {}
    if chance.random() < 0.5:
        ours["gold_symbols"] = oracle["gold_symbols"] = {"a:x": chance.choice(["X", "OTHER"])}
    seconds = chance.choice([5, 60, 300])
    ours["volatility_seconds"], oracle["volatility"] = seconds, timedelta(seconds=seconds)
    # A small threshold makes long stretches, in which an episode may be open all the time.
    percent = chance.choice(["0.05", "0.4", "1", "2"])
    ours["alert_threshold_pct"], oracle["alert_threshold_pct"] = Decimal(percent), float(percent)
    for name, choices in (("alert_window", [1, 10, 30, 120]), ("alert_cooldown", [0, 5, 60, 600])):
        seconds = chance.choice(choices)
        ours[f"{name}_seconds"], oracle[name] = seconds, timedelta(seconds=seconds)
    return ours, oracle


def assert_right(settings: Settings, expected: Lake) -> None:
    assert wrong_rows(settings.lake_root, expected) == {}
    assert wrong_gaps(settings.lake_root, expected) == []


@pytest.mark.parametrize("seed", range(12))
def test_gold_is_that_of_all_ticks_together(tmp_path: Path, seed: int) -> None:
    """Whatever the settings, in one to three tasks a micro-batch, with a restart."""
    chance = random.Random(seed)
    ours, oracle = drawn_settings(chance)
    records = in_kafka(delivered(chance))
    settings = lake_in(tmp_path, **ours)
    parts = pieces(records, chance, 7)
    first = chance.randrange(1, 7)
    write(None, settings, parts[:first], tasks=chance.choice([1, 2, 3]))
    write(None, settings, parts[first:], first=first, tasks=chance.choice([1, 2, 3]))
    assert_right(settings, lake_of(records, **oracle))


def test_movers_and_plain_files_are_those_of_gold(tmp_path: Path) -> None:
    """The view, and the copy for those without Delta, which hold the same rows."""
    records = in_kafka(delivered(random.Random(1)))
    settings = lake_in(tmp_path)
    parts = pieces(records, random.Random(1), 5)
    plain = PlainParquet(files_of(settings.lake_root, ""), f"file:{tmp_path / 'plain'}")
    write(None, settings, parts[:3], sink=plain)
    write(None, settings, parts[3:], first=3, sink=plain)
    expected = lake_of(records)
    assert len(expected.alerts) > 5, "there is something to find"
    assert_right(settings, expected)
    root = settings.lake_root.replace("file:", "")
    movers = query(root, "SELECT * FROM gold.top_movers").to_pylist()
    found: dict[Hashable, dict[str, object]] = {(row["window_start"], row["rank"]): row for row in movers}
    wanted: dict[Hashable, Row] = {(row.window_start, row.rank): row for row in expected.top_movers.values()}
    assert differences(wanted, found) == []
    for table in GOLD:
        there = pq.read_table(tmp_path / "plain" / table.name)
        assert there.column_names == [column.name for column in table.columns if is_of_the_contract(column)]
        assert sorted(map(str, there.select(list(table.key)).to_pylist())) == sorted(
            str({name: row[name] for name in table.key}) for row in read(root, table).to_pylist()
        )
    minutes: dict[Hashable, dict[str, object]] = {
        (row["source"], row["asset"], row["window_start"]): row
        for row in pq.read_table(tmp_path / "plain" / "price_1m").to_pylist()
    }
    assert differences(expected.price_1m, minutes) == []


# Many instruments


def instruments(count: int, seconds: Iterable[float], chance: random.Random) -> list[bytes]:
    """A tick of each instrument at each of these times, roughly; now and then one jumps."""
    ticks = []
    for number, second in enumerate(seconds, 1):
        for n in range(count):
            jump = 1.05 if chance.random() < 0.01 else 1.0
            at = after(second + n % 50 / 10)
            ticks.append(tick(number, at, f"{(n + 1) * jump * chance.uniform(0.999, 1.001):.6f}", f"c{n}"))
    return ticks


def test_five_hundred_instruments_for_three_minutes_and_a_late_tick_of_each(tmp_path: Path) -> None:
    """Where midnight lies between; and a restart before the late ticks, and in the middle of them."""
    chance = random.Random(1)
    settings = lake_in(tmp_path)
    ticks = instruments(500, range(520, 700, 20), chance)
    late = [tick(1_000, after(chance.uniform(520, 690)), f"{1.02 * (n + 1):.4f}", f"c{n}") for n in range(500)]
    records = in_kafka([*ticks, *late])
    parts = [records[n : n + 1_500] for n in range(0, len(ticks), 1_500)]
    write(None, settings, parts, tasks=2)
    late_records = records[len(ticks) :]
    write(None, settings, [late_records[:250]], first=len(parts), tasks=2)
    write(None, settings, [late_records[250:]], first=len(parts) + 1)
    expected = lake_of(records)
    assert len(expected.alerts) > 50
    # The late ticks' ids leave a hole after those before, which silver.gaps names.
    assert_right(settings, expected)


# Gaps


def test_of_thousands_of_open_gaps_a_micro_batch_looks_at_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A venue that loses a trade now and then leaves rows that are open for ever; one is filled after a restart."""
    settings = lake_in(tmp_path)
    ids = [n for n in range(12_001) if n % 3 != 1]
    records = in_kafka(tick(n, after(n / 100), "100") for n in ids)
    lakehouse = write(None, settings, [records])
    assert len(rows_of(settings.lake_root, SILVER_GAPS)) == 4_000
    looked_at: list[Interval] = []
    real = Gap.of

    def of(gap: Gap, interval: Interval) -> Gap:
        looked_at.append(interval)
        return real(gap, interval)

    monkeypatch.setattr(Gap, "of", of)
    report = compact({**GAP, "source": "a", "symbol": "X", "first_missing": 7_000, "last_missing": 7_005})
    late = [
        in_kafka([tick(6_001, after(60.01), "101"), tick(12_001, after(120.01), "100")], first=len(records)),
        in_kafka([report], "gaps"),
        in_kafka([tick(7_000, after(70), "99")], first=len(records) + 2),
    ]
    lakehouse = opened(settings)
    for batch, part in enumerate(late, 1):
        write_one(lakehouse, part, batch)
    lakehouse.finish()
    assert 0 < len(looked_at) < 30
    expected = lake_of([*records, *late[0], *late[2]])
    assert wrong_gaps(settings.lake_root, expected) == []
    rows = {row["first_missing"]: row for row in rows_of(settings.lake_root, SILVER_GAPS).values()}
    assert [rows[n]["status"] for n in (6_001, 7_000, 7_003, 7_006)] == ["filled", "filled", "open", "open"]
    assert rows[7_003]["detected_at"] == datetime.fromisoformat(str(GAP["detected_at"]))


# Repeats


@pytest.mark.parametrize("seed", range(4))
def test_repeats_across_tasks_partitions_and_micro_batches_with_odd_records(tmp_path: Path, seed: int) -> None:
    """All in one micro-batch, before and after a restart: each tick is the one that came first."""
    chance = random.Random(seed)
    values = [value for value in market(chance) if json.loads(value)["trade_id"] is not None]
    settings = lake_in(tmp_path)
    half = len(values) // 2
    micro_batches: list[list[Record]] = []
    offsets = [0, 0, 0]
    for some in (values[:half], values[half:]):
        part: list[Record] = []
        for partition in range(3):
            here: list[bytes | None] = [v for v in some if chance.random() < 0.7]
            if micro_batches:
                here += chance.sample(values[:half], 30)
            here += [b"{", None, *chance.sample(here, 10)]
            # As other producers write it, and so that its price tells which delivery is kept.
            for at in chance.sample(range(len(here) - 12), 15):
                value = json.loads(here[at] or b"null") or {}
                if value:
                    here[at] = json.dumps(
                        {**value, "price_usd": f"{float(value['price_usd']) + partition:.4f}"}
                    ).encode()
            part += in_kafka(here, partition=partition, first=offsets[partition])
            offsets[partition] += len(here)
        micro_batches.append(part)
    write(None, settings, micro_batches[:1], tasks=5)
    write(None, settings, micro_batches[1:], first=1, tasks=4)
    records = in_first_micro_batch(micro_batches)
    expected = lake_of(records)
    assert len(expected.silver) < sum(map(len, micro_batches)) - 200
    told = wrong_rows(settings.lake_root, expected)
    told.pop("bronze.ticks", None)
    assert told == {}
    assert len(rows_of(settings.lake_root, GOLD_CURRENT_PRICE)) == len(expected.current_price)
    assert wrong_gaps(settings.lake_root, expected) == []


def in_first_micro_batch(micro_batches: Sequence[list[Record]]) -> list[Record]:
    """The records without those that repeat a tick of an earlier micro-batch.

    Among repeats the lowest place wins; but what silver has, it has, and a micro-batch knows nothing of later ones.
    """
    kept: list[Record] = []
    known: set[str] = set()
    for part in micro_batches:
        new = lake_of(part)
        repeats = {row.event_id for row in new.silver.values()} & known
        known |= {row.event_id for row in new.silver.values()}
        names = {record.place: name_of(record) for record in part}
        kept += [record for record in part if names[record.place] not in repeats]
    return kept


def name_of(record: Record) -> str | None:
    """event_id, if it is a tick."""
    ticks: Mapping[Hashable, Any] = lake_of([record]).silver
    return next((tick.event_id for tick in ticks.values()), None)


# Late ticks


@pytest.mark.parametrize("restart", [False, True])
def test_ticks_that_are_days_late_change_their_own_windows(tmp_path: Path, restart: bool) -> None:
    """A day and three days late, in order and not, with alerts of their own, and next to minutes that are there."""
    chance = random.Random(3)
    day = 86_400
    early = [tick(n, after(8 * n), f"{100 + n % 3}") for n in range(40)]
    now = [tick(1_000 + n, after(3 * day + 8 * n), f"{100 + n % 4}") for n in range(40)]
    late = [
        *(tick(500 + n, after(2 * day + 7 * n), f"{100 + 4 * (n % 5 == 4)}") for n in range(20)),
        *(tick(300 + n, after(4 + 8 * n), f"{104 - n % 7}") for n in range(20)),
        tick(600, after(3 * day - 59), "97"),
    ]
    chance.shuffle(late)
    parts = [in_kafka(early), in_kafka(now, first=100), in_kafka(late[:20], first=200), in_kafka(late[20:], first=300)]
    settings = lake_in(tmp_path)
    for first, some in ((0, parts[:2]), (2, parts[2:3]), (3, parts[3:])) if restart else ((0, parts),):
        write(None, settings, some, first=first)
    expected = lake_of([record for part in parts for record in part])
    assert len(expected.alerts) > 3
    assert_right(settings, expected)


@pytest.mark.parametrize("silence", [20, 61, 3_600, 2 * 86_400])
@pytest.mark.parametrize("restart", [False, True])
def test_a_pair_that_fell_silent_has_its_last_minute_seen_once_it_speaks_again(
    tmp_path: Path, silence: int, restart: bool
) -> None:
    """A row of gold.rolling_price is there only up to the newest tick: the look back waits for that one."""
    before = [tick(n, after(2.5 * n), f"{100 + n % 5}") for n in range(30)]
    other = [tick(n, after(2.5 * n), "5", "y") for n in range(1_000)]
    again = [tick(100, after(72.5 + silence), "101")]
    late = [tick(200, after(71), "90"), tick(201, after(72.5 + silence - 1), "102"), tick(202, after(130), "103")]
    settings = lake_in(tmp_path)
    parts = [
        in_kafka([*before, *other[:40]]),
        in_kafka(other[40:], first=100),
        in_kafka(again, first=2_000),
        in_kafka(late[:1], first=2_001),
        in_kafka(late[1:], first=2_002),
    ]
    if restart:
        for batch, part in enumerate(parts):
            write(None, settings, [part], first=batch)
    else:
        write(None, settings, parts)
    assert_right(settings, lake_of([record for part in parts for record in part]))


def test_prices_a_minute_earlier_are_of_the_same_venue_and_not_too_old(tmp_path: Path) -> None:
    """At the very ends: 60 s and 120 s before; among the ticks of a bucket; of a venue that is not the newest."""
    newest = 600.0
    for seconds in (60.0, 59.999999, 60.000001, 120.0, 120.000001, 61.5, 118.0):
        settings = lake_in(tmp_path / f"{seconds}")
        values = [
            tick(1, after(newest - seconds), "90"),
            tick(2, after(newest - 58), "95"),
            tick(3, after(newest - 60), "50", source="b"),
            tick(4, after(newest), "100"),
        ]
        late = [tick(5, after(newest - seconds - 0.5), "80"), tick(6, after(newest - 62.5), "85", source="b")]
        parts = [in_kafka(values), in_kafka(late, first=10)]
        write(None, settings, parts)
        assert_right(settings, lake_of([record for part in parts for record in part]))


def test_a_clock_that_runs_ahead_moves_no_other_pair_s_windows(tmp_path: Path) -> None:
    """Promise 6: neither an hour at a venue, nor one at an ingester."""
    settings = lake_in(tmp_path)
    hour = timedelta(hours=1)
    ahead = [
        tick(n, after(5 * n), f"{100 + n}", event_time=(after(5 * n) + hour * (n % 3 == 1)).isoformat())
        for n in range(30)
    ]
    wrong = [tick(n, after(5 * n) + hour, "7", "y") for n in range(5)]
    right = [tick(n, after(5 * n), "8", "z") for n in range(30)]
    records = in_kafka([value for n in range(30) for value in (ahead[n], *wrong[n : n + 1], right[n])])
    write(None, settings, pieces(records, random.Random(1), 6))
    assert_right(settings, lake_of(records))


def test_a_long_episode_that_begins_before_what_is_looked_at_first(tmp_path: Path) -> None:
    """Minutes of changes above half the threshold, with and without holes; a late tick in its middle and at its end."""
    for hole in (1, 2, 3, 5):
        settings = lake_in(tmp_path / f"{hole}", alert_cooldown_seconds=0)
        # The price goes up for ever: each tick is 1.3 % above the one before.
        seconds = [4.0 * n for n in range(80) if n % 13 > hole]
        values = [tick(n + 1, after(s), f"{10 * 1.013 ** (s / 4):.6f}") for n, s in enumerate(seconds)]
        late = [tick(500, after(200.5), "100"), tick(501, after(310), "520"), tick(502, after(3), "10.5")]
        parts = [in_kafka(values), *([record] for record in in_kafka(late, first=900))]
        write(None, settings, parts)
        expected = lake_of([record for part in parts for record in part], alert_cooldown=timedelta())
        assert expected.alerts
        assert_right(settings, expected)


def test_the_console_tells_a_row_in_a_line() -> None:
    out = StringIO()
    row = ("bitcoin", Decimal("61685.990000000000"), "binance", START, "binance:BTCUSDT:0:7", 0.125, START, None)
    rows = pl.DataFrame([row], schema=list(GOLD_CURRENT_PRICE.column_names), orient="row")
    Console(out).changed(GOLD_CURRENT_PRICE, {}, (), rows)
    assert out.getvalue() == (
        "gold.current_price asset=bitcoin price_usd=61685.99 source=binance event_time=2024-08-09T23:50:00+00:00 "
        "event_id=binance:BTCUSDT:0:7 change_pct_1m=0.125\n"
    )


# Quotes


def quoted(number: int, source: str, symbol: str, quote: str | None, price: str) -> bytes:
    at = (START + timedelta(seconds=number)).isoformat(timespec="microseconds")
    tick = {"timestamp": at, "asset": "x", "price_usd": price, "source": source, "symbol": symbol, "quote": quote}
    return compact({**tick, "trade_id": number})


@pytest.mark.parametrize("symbols", [{}, {"kraken:x": "X/USDT"}], ids=["by the venue", "by a setting"])
@pytest.mark.parametrize("quotes", [None, {}, {"venue": "USDT"}], ids=["default", "none", "another venue's"])
def test_one_quote_of_an_asset_at_a_venue_feeds_gold(
    tmp_path: Path, symbols: dict[str, str], quotes: dict[str, str] | None
) -> None:
    """USD and USDT may be percents apart: in one candle they would be an alert. Silver has both."""
    kinds = [
        *(("kraken", "X/USD", "USD", "100"), ("kraken", "X/USDT", "USDT", "104"), ("kraken", "X", None, "100")),
        *(("binance", "XUSDT", "USDT", "104"), ("binance", "XUSD", "USD", "100")),
        *(("venue", "X-USD", "USD", "100"), ("venue", "X-USDT", "USDT", "104")),
    ]
    records = in_kafka([quoted(n, *kinds[n % len(kinds)]) for n in range(60)])
    chosen: dict[str, Any] = (
        {"gold_symbols": symbols} if quotes is None else {"gold_symbols": symbols, "gold_quotes": quotes}
    )
    settings = lake_in(tmp_path, **chosen)
    write(None, settings, [records[:25], records[25:]], tasks=2)
    expected = lake_of(records, gold_symbols=symbols, gold_quotes=quotes)
    assert_right(settings, expected)
    assert len(expected.silver) == 60
    assert bool([alert for alert in expected.alerts.values() if alert.source == "kraken"]) == (
        quotes is not None and not symbols
    ), "no alert between two currencies, but where a setting lets both feed gold"
    rules = gold_rules(settings)
    one_by_one = [feeds(rules.symbols, rules.quotes, (k[0], "x"), k[1], k[2] or "USD") for k in kinds]
    together = feeding(pl.DataFrame([(k[0], "x", k[1], k[2] or "USD") for k in kinds], QUOTED, orient="row"), rules)
    assert together["symbol"].to_list() == [k[1] for k, is_fed in zip(kinds, one_by_one, strict=True) if is_fed]


QUOTED = ["source", "asset", "symbol", "quote"]


def test_a_lake_of_before_the_choice_of_quotes_is_refused_with_advice() -> None:
    """Its gold may have candles of both."""
    before = json.loads(deciding(Settings()))
    del before["gold_quotes"]
    [difference] = setting_differences(json.dumps(before), Settings())
    assert difference.startswith("gold_quotes was {}, is {'coinbase': 'USD'")
    assert setting_differences(json.dumps(before), Settings(gold_quotes={})) == []
