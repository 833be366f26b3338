"""Many records at once: the fast path, the judge and the oracle agree, and no record is dropped."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

from lake.contract import FIELDS, NUMBER, TIME, TickRules
from lake.silver.judge import Rejection, judge
from lake.silver.read import CANONICAL, QUARANTINED, TICKS, Contents, read
from tests.ingestion.test_ticks import TICK as INGESTED
from tests.oracle import Quarantined, Record, notional_of, row_of, trade_named_by
from tests.oracle import Tick as ExpectedTick
from tests.ticks import CASES, GAP, INGESTED_AT, TICK, arrow_records, compact, with_raw

RULES = TickRules("rejects", "gaps", 5.0)


def record(value: bytes | None, topic: str = "ticks", offset: int = 0) -> Record:
    return Record(topic, 0, offset, None, value, ingested_at=INGESTED_AT)


def assert_agrees(records: Sequence[Record]) -> Contents:
    """All that the reader says of records is what the oracle says, and the judge of each alone."""
    contents = read(arrow_records(records), RULES)
    assert contents.ticks.schema == TICKS
    assert contents.quarantined.schema == QUARANTINED
    contents.ticks.validate(full=True)
    expected = {one.place: row_of(one) for one in records}
    ticks = {(row["kafka_partition"], row["kafka_offset"]): row for row in contents.ticks.to_pylist()}
    wanted = {place[1:]: row for place, row in expected.items() if isinstance(row, ExpectedTick)}
    assert ticks.keys() == wanted.keys()
    for place, tick in wanted.items():
        row = ticks[place]
        notional = row.pop("notional")
        assert ExpectedTick(**row) == tick
        assert notional == (None if tick.quantity is None else notional_of(tick.price_usd, tick.quantity))
    bad = {
        (row["topic"], row["partition"], row["offset"]): (row["value"], row["rule"])
        for row in contents.quarantined.to_pylist()
    }
    wrong = [row for row in expected.values() if isinstance(row, Quarantined)]
    assert bad == {(row.topic, row.partition, row.offset): (row.value, row.rule) for row in wrong}
    assert all(contents.quarantined["reason"].to_pylist())
    assert sorted(contents.rejected_ids) == sorted(filter(None, (trade_named_by(row.value) for row in wrong)))
    assert len(contents.reports) == sum(row is None for row in expected.values())
    assert contents.ticks.num_rows + contents.quarantined.num_rows + len(contents.reports) == len(records)
    for one in records:
        verdict = judge(one.value, one.topic, one.partition, one.offset, one.ingested_at, RULES)
        rule = getattr(expected[one.place], "rule", None)
        assert (verdict.rule if isinstance(verdict, Rejection) else None) == rule
    return contents


def test_all_cases_at_once() -> None:
    records = [case.record(offset) for offset, case in enumerate(CASES)]
    contents = assert_agrees(records)
    rules = {row["offset"]: row["rule"] for row in contents.quarantined.to_pylist()}
    assert [rules.get(offset) for offset in range(len(CASES))] == [case.rule for case in CASES]
    assert 100 < contents.non_canonical < len(CASES) - 20, "some cases take the fast path, most do not"


def test_each_case_alone() -> None:
    for case in CASES:
        assert_agrees([case.record()])


def test_reports_come_by_partition_and_offset() -> None:
    places = [(partition, offset) for partition in range(3) for offset in range(5)]
    random.Random(1).shuffle(places)
    records = [
        Record("gaps", partition, offset, None, compact({**GAP, "trade_epoch": 10 * partition + offset}))
        for partition, offset in places
    ]
    epochs = [report.trade_epoch for report in read(arrow_records(records), RULES).reports]
    assert epochs == sorted(epochs)
    assert len(epochs) == 15


def test_nothing_is_nothing() -> None:
    contents = read(arrow_records([]), RULES)
    assert (contents.ticks.num_rows, contents.quarantined.num_rows, contents.reports) == (0, 0, [])
    assert (contents.ticks.schema, contents.quarantined.schema) == (TICKS, QUARANTINED)
    assert read(arrow_records([]).slice(0, 0), RULES).non_canonical == 0


def test_pieces_of_a_table_are_read_as_one() -> None:
    records = [record(compact({**TICK, "trade_id": number}), offset=number) for number in range(10)]
    records[4] = record(b"{", offset=4)
    table = arrow_records(records)
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 0), table.slice(3)])
    contents = read(pieces, RULES)
    assert sorted(contents.ticks["kafka_offset"].to_pylist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert contents.quarantined["offset"].to_pylist() == [4]


def test_what_ingestion_writes_takes_the_fast_path() -> None:
    """A pattern that did not fit it would be right, and slow."""
    message = INGESTED.to_json("producer", 12)
    assert re.fullmatch(CANONICAL, message.decode())
    contents = assert_agrees([record(message)])
    assert (contents.non_canonical, contents.ticks.num_rows) == (0, 1)
    for wrong in (b'"trade_id":"1"', b'"trade_id":1.5', b'"trade_id":01', b'"trade_id":true', b'"trade_id":-1'):
        assert assert_agrees([record(re.sub(rb'"trade_id":\d+', wrong, message))]).non_canonical == 1


def test_days_that_exist_take_the_fast_path_and_others_no_path() -> None:
    days = [datetime(1999, 12, 31, tzinfo=UTC) + timedelta(days=number) for number in range(800)]
    ends = [f"{year}-02-{day}" for year in (*range(1970, 2110), 2400, 2800, 2900, 2996) for day in (28, 29)]
    impossible = ("2024-04-31", "2024-02-30", "2024-00-10", "2024-13-01", "2024-01-32", "2024-01-00")
    dates = [*(f"{day:%Y-%m-%d}" for day in days), *ends, *impossible]
    values = [compact({**TICK, "event_time": f"{date}T23:59:59.999999+17:59"}) for date in dates]
    contents = assert_agrees([record(value, offset=offset) for offset, value in enumerate(values)])
    assert contents.non_canonical == contents.quarantined.num_rows
    assert set(impossible) < {dates[offset] for offset in contents.quarantined["offset"].to_pylist()}


def test_other_topics_and_times_out_of_range_do_not_take_the_fast_path() -> None:
    for topic in ("rejects", "gaps"):
        assert assert_agrees([record(compact(TICK), topic)]).non_canonical == 1
    for time in ("1970-01-01T00:00:00+00:01", "2999-12-31T23:59:00-00:01"):
        contents = assert_agrees([record(compact({**TICK, "event_time": time}))])
        assert contents.quarantined["rule"].to_pylist() == ["event_time"]
    ahead = compact({**TICK, "timestamp": "2024-08-10T00:00:03.000001Z"})
    assert assert_agrees([record(ahead), record(compact(TICK), offset=1)]).non_canonical == 1


def test_notional_is_rounded_half_up() -> None:
    value = compact({**TICK, "price_usd": "0.000000000005", "quantity": "0.0000001"})
    for spaced in (value, json.dumps(json.loads(value)).encode()):
        (tick,) = read(arrow_records([record(spaced)]), RULES).ticks.to_pylist()
        assert f"{tick['notional']:f}" == "0.000000000000000001"


def test_records_are_judged_by_their_own_arrival() -> None:
    arrivals = [INGESTED_AT - timedelta(days=days) for days in range(4)]
    records = [Record("ticks", 0, day, None, compact(TICK), ingested_at=at) for day, at in enumerate(arrivals)]
    contents = assert_agrees(records)
    assert sorted(contents.ticks["kafka_offset"].to_pylist()) == [0, 1]
    assert pc.all(pc.equal(contents.quarantined["rule"], "timestamp")).as_py()


# Property tests: whatever the bytes are, nothing raises, and all three agree.

TOPICS = st.sampled_from(["ticks", "rejects", "gaps"])
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.from_regex(re.compile(rf"-?{NUMBER}", re.ASCII), fullmatch=True)
TIMES = st.from_regex(re.compile(TIME, re.ASCII), fullmatch=True)
RAW_NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
)
ANY_JSON = st.recursive(
    st.one_of(
        st.sampled_from(["null", "true", "false", "NaN", "-Infinity", "-0", '""']),
        RAW_NUMBERS,
        *(texts.map(json.dumps) for texts in (ANY_TEXT, NUMBERS, TIMES)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(ANY_TEXT.map(json.dumps), inner), max_size=4).map(
            lambda pairs: "{" + ",".join(f"{key}:{part}" for key, part in pairs) + "}"
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), TOPICS)
def test_any_bytes_have_one_verdict(value: bytes, topic: str) -> None:
    assert_agrees([record(value, topic)])


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*FIELDS, "price_usd", "quantity", "mood"]), ANY_JSON), min_size=1, max_size=3),
    TOPICS,
)
def test_a_tick_with_any_json_in_its_fields_has_one_verdict(changes: list[tuple[str, str]], topic: str) -> None:
    value = compact({**TICK, **{name: f"MARK-{name}" for name, _ in changes}})
    for name, raw in changes:
        value = value.replace(f'"MARK-{name}"'.encode(), raw.encode())
    assert_agrees([record(value, topic)])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*GAP]), ANY_JSON)
def test_a_report_with_any_json_in_a_field_has_one_verdict(name: str, raw: str) -> None:
    assert_agrees([record(with_raw(name, raw, GAP), "gaps")])


@settings(max_examples=300, deadline=None)
@given(
    NUMBERS | st.from_regex(r"[0-9]{1,17}(\.[0-9]{1,13})?", fullmatch=True),
    st.from_regex(r"[0-9]{1,17}(\.[0-9]{1,13})?", fullmatch=True),
)
def test_numbers_have_one_verdict(price: str, quantity: str) -> None:
    assert_agrees([record(compact({**TICK, "price_usd": price, "quantity": quantity}))])


@settings(max_examples=200, deadline=None)
@given(TIMES, st.from_regex(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z", fullmatch=True))
def test_times_have_one_verdict(event_time: str, timestamp: str) -> None:
    assert_agrees([record(compact({**TICK, "event_time": event_time, "timestamp": timestamp}))])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([compact(TICK), json.dumps(TICK).encode(), compact(GAP)]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=3)), min_size=1, max_size=3),
    TOPICS,
)
def test_flipped_bytes_have_one_verdict(value: bytes, flips: list[tuple[int, int, bytes]], topic: str) -> None:
    """Some bytes taken out, and others put in."""
    for place, length, added in flips:
        value = value[:place] + added + value[place + length :]
    assert_agrees([record(value, topic)])
