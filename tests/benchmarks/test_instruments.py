"""The load is what ingestion sends, and a row says what the log and the lake say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.figures import (
    GoldCommit,
    batch_figures,
    compare,
    frame_to_gold,
    gold_figures,
    render_table,
    restart_to_gold,
)
from benchmarks.job import MicroBatch, count_records, read_micro_batches
from benchmarks.load import DELAY_NS, FIRST_TRADE_ID, REPEAT_AFTER_NS, Market, Record, Shape
from benchmarks.scenarios import parse_scenario
from ingestion.ticks import Tick

START_NS = 1_700_000_000_000_000_000
RATE = 1_000

LOG = """\
[0.884s][warning][cds,dynamic] Unable to use shared archive. The top archive failed to load
2026-11-25 18:08:30,262 streaming.ticks INFO 127.0.0.1:29092 -> hdfs://127.0.0.1:28020/tickhouse
2026-11-25 18:08:34,036 streaming.lakehouse INFO batch 0: 0 records in 0.56 s
2026-11-25 18:08:38,500 streaming.lakehouse INFO batch 1: 12,436 records in 4.05 s
2026-11-25T18:08:38.646Z WARN DAGScheduler: Failed to cancel job group ea6e3565
2026-11-25 18:08:39,000 streaming.lakehouse INFO batch 2: 500 records (3 of them odd) in 1 s, of which 0.5 s in gold
"""


def send(market: Market, ticks: int) -> list[Record]:
    """The market's records at RATE."""
    records = [
        record for number in range(ticks) for record in market.next_records(START_NS + number * 1_000_000_000 // RATE)
    ]
    return [*records, *market.last_records()]


def test_a_tick_of_the_load_is_what_ingestion_sends_of_it() -> None:
    for number, (key, value) in enumerate(send(Market(Shape(3), RATE, "producer"), 200)):
        fields = json.loads(value)
        now_ns = START_NS + number * 1_000_000_000 // RATE
        tick = Tick(
            received_ns=now_ns,
            asset=fields["asset"],
            price_usd=fields["price_usd"],
            quote=fields["quote"],
            source=fields["source"],
            symbol=fields["symbol"],
            event_ns=now_ns - DELAY_NS,
            quantity=fields["quantity"],
            trade_id=fields["trade_id"],
        )
        assert (key, value) == (tick.key, tick.to_json("producer", number + 1))


def test_each_instrument_has_ticks_and_its_trade_ids_have_no_holes() -> None:
    trade_ids: dict[str, list[int]] = {}
    for _, value in send(Market(Shape(50), RATE, "producer"), 2_000):
        tick = json.loads(value)
        trade_ids.setdefault(tick["symbol"], []).append(tick["trade_id"])
    assert len(trade_ids) == 50
    for ids in trade_ids.values():
        assert ids == list(range(FIRST_TRADE_ID + 1, FIRST_TRADE_ID + 1 + len(ids)))


def test_odd_records_and_repeats_have_their_shares_and_come_on_top_of_the_ticks() -> None:
    market = Market(Shape(5, odd_share=0.02, repeat_share=0.1), RATE, "producer")
    values = [value for _, value in send(market, 20_000)]
    odd = [value for value in values if not is_tick(value)]
    ticks = [value for value in values if is_tick(value)]
    assert (market.ticks, market.non_ticks, market.repeats) == (20_000, len(odd), len(ticks) - len(set(ticks)))
    assert market.records == len(values)
    assert len(set(ticks)) == 20_000
    assert market.non_ticks / 20_000 == pytest.approx(0.02, rel=0.2)
    assert market.repeats / 20_000 == pytest.approx(0.1, rel=0.1)
    assert {"no JSON", '{"timestamp":"x"}'} < {value.decode() for value in odd}


def test_half_of_the_repeats_come_at_once_and_half_seconds_later() -> None:
    market = Market(Shape(5, repeat_share=0.1), RATE, "producer")
    records = send(market, 10_000)
    positions: dict[Record, list[int]] = {}
    for position, record in enumerate(records):
        positions.setdefault(record, []).append(position)
    distances = [later - first for first, later in (each for each in positions.values() if len(each) == 2)]
    at_once = sum(distance == 1 for distance in distances)
    assert len(distances) == market.repeats
    assert abs(at_once - market.repeats / 2) <= 1
    # Those of the load's last seconds come at its end.
    due = sum(distance >= REPEAT_AFTER_NS / 1e9 * RATE for distance in distances)
    assert due == pytest.approx(market.repeats / 2 * 0.7, rel=0.2)


def is_tick(value: bytes) -> bool:
    try:
        return "trade_id" in json.loads(value)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("name", "shape", "restart"),
    [
        ("5000", Shape(5_000), False),
        ("5+odd", Shape(5, 0.002, 0.0), False),
        ("5+repeats", Shape(5, 0.0, 0.01), False),
        ("restart-20000+both", Shape(20_000, 0.002, 0.01), True),
    ],
)
def test_a_scenario_has_a_name(name: str, shape: Shape, restart: bool) -> None:
    scenario = parse_scenario(name)
    assert (scenario.shape, scenario.restart) == (shape, restart)


@pytest.mark.parametrize("name", ["", "0", "5+late", "restart", "5-restart", "1e3"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no scenario"):
        parse_scenario(name)


def test_the_micro_batches_of_a_log_are_found_among_other_lines() -> None:
    batches = read_micro_batches(LOG)
    assert [(batch.number, batch.records, batch.seconds) for batch in batches] == [
        (0, 0, 0.56),
        (1, 12_436, 4.05),
        (2, 500, 1.0),
    ]
    assert batches[2].ended_at - batches[1].ended_at == pytest.approx(0.5)


def test_a_micro_batch_that_was_done_again_after_a_kill_counts_once() -> None:
    batches = [MicroBatch(7, 100, 0.2, 1.0), MicroBatch(8, 50, 0.2, 2.0), MicroBatch(8, 50, 3.0, 9.0)]
    assert count_records(batches) == 150


def test_the_mean_is_of_the_second_half_and_the_slope_of_its_last_quarter_to_the_second() -> None:
    # At 1, 2, ... 40 s a micro-batch that took as many tenths of a second; an empty one before the load.
    batches = [MicroBatch(number, min(number, 1), number / 10, float(number)) for number in range(41)]
    figures = batch_figures(batches, 0.5, 40.5)
    assert figures == {"micro_batch_seconds": 3.05, "first_micro_batch_seconds": 0.1, "slope": round(3.55 / 1.55, 2)}


def test_a_job_that_ends_one_micro_batch_late_or_none_at_all_has_a_row() -> None:
    assert batch_figures([MicroBatch(0, 9, 183.0, 3.0)], 0, 100)["micro_batch_seconds"] == 183.0
    assert set(batch_figures([], 0, 100).values()) == {None}
    assert set(gold_figures([], 0, 100, 50).values()) == {None}


def test_frame_to_gold_ends_with_the_commit_and_a_restart_with_the_first_that_has_a_new_tick() -> None:
    in_gold = [GoldCommit(103.0, [100.0, 102.0]), GoldCommit(112.0, [104.0]), GoldCommit(118.5, [105.0, 111.0])]
    assert frame_to_gold(in_gold, since=102.0) == [1.0, 8.0, 13.5, 7.5]
    assert restart_to_gold(in_gold, 110.0) == 8.5
    assert restart_to_gold(in_gold, 112.0) is None


def row(scenario: str, job: str, **figures: Any) -> dict[str, Any]:
    return {"scenario": scenario, "job": job, "outcome": "exact", **figures}


def test_the_table_has_multiples_of_row_5_and_of_the_first_checkout_and_says_what_died() -> None:
    rows = [
        row("5", "/before", micro_batch_seconds=0.2, driver_jvm_mb=1_200, slope=1.0),
        row("5", "/after", micro_batch_seconds=0.1, driver_jvm_mb=600, slope=1.0),
        row("5000", "/before", micro_batch_seconds=0.8, slope=2.0)
        | {"outcome": "died, exit code 1, 61 s after the load began"},
        row("5000", "/after", micro_batch_seconds=0.15, driver_jvm_mb=660, slope=1.1),
        row("restart-5", "/before", micro_batch_seconds=0.3, restart_to_gold_seconds=10.0),
        row("restart-5000", "/before", restart_to_gold_seconds=25.0)
        | {"outcome": "died, exit code 1, before the load began"},
    ]
    compare(rows)
    assert rows[2]["of_base"] == {"micro_batch_seconds": 4.0}
    assert rows[3]["of_base"] == {"micro_batch_seconds": 1.5, "driver_jvm_mb": 1.1}
    assert rows[3]["of_first"] == {"micro_batch_seconds": 0.19}
    assert rows[5]["of_base"] == {"restart_to_gold_seconds": 2.5}
    lines = [line.split() for line in render_table(rows).splitlines()]
    assert lines[3] == ["5", "0.2", *["-"] * 6, "1,200", "-", "-", "1", "exact"]
    assert lines[4][:2] == ["5000", "0.8"]
    assert " ".join(lines[4]).endswith("died, exit code 1, 61 s after the load began")
    assert lines[5] == ["/", "5", "x", "4.00"]
    assert ["job", "of", "/after"] in lines
    assert lines[-2:] == [["/", "5", "x", "1.50", "x", "1.10"], ["/", "1st", "x", "0.19"]]
