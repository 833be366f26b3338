"""The oracle's gold, on cases small enough to compute by hand, and against the definitions taken literally."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import Lake, Record, Tick, lake_of
from tests.oracle_gold import (
    Alert,
    CurrentPrice,
    GoldRow,
    alerts_of,
    current_prices_of,
    instruments,
    lowest_before,
    rolling_prices_of,
    top_movers_of,
    windows_of,
)

NOON = datetime(2024, 8, 9, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def tick(seconds: float, price: str, trade_id: int = 0, *, source: str = "s", asset: str = "a") -> Tick:
    """A tick so many seconds after noon; without a number its time numbers it."""
    trade_id = trade_id or round(1_000_000 * (seconds + 100_000))
    return Tick(
        event_id=f"{source}:{asset}:0:{trade_id}",
        source=source,
        symbol=asset,
        asset=asset,
        quote="USD",
        price_usd=Decimal(price).quantize(Decimal("1e-12")),
        quantity=None,
        trade_id=trade_id,
        trade_epoch=0,
        event_time=at(seconds),
        received_at=at(seconds),
        producer="p",
        sequence=trade_id,
        kafka_partition=0,
        kafka_offset=trade_id,
        is_future=False,
        event_date=at(seconds).date(),
    )


def only_alert(*ticks: Tick) -> Alert:
    (alert,) = alerts_of(ticks)
    return alert


# Windows of other lengths


def test_windows_start_at_multiples_of_their_length_and_hold_all_their_ticks() -> None:
    """12:04:59.999999 ends the five minutes from 12:00, 11:59:59 the hour from 11:00; all are of one day."""
    ticks = [tick(299.999999, "3"), tick(300, "5"), tick(-1, "1")]
    five = {row.window_start: row for row in windows_of(ticks, timedelta(minutes=5))}
    assert [five[start].close for start in sorted(five)] == [1, 3, 5]
    assert sorted(five) == [at(-300), at(0), at(300)]
    hours = sorted(windows_of(ticks, timedelta(hours=1)), key=lambda row: row.window_start)
    assert [(row.window_start, row.window_end, row.tick_count) for row in hours] == [
        (at(-3600), at(0), 1),
        (at(0), at(3600), 2),
    ]
    (day,) = windows_of(ticks, timedelta(days=1))
    assert (day.window_start, day.window_end) == (NOON.replace(hour=0), NOON.replace(hour=0) + timedelta(days=1))
    assert [day.open, day.high, day.low, day.close, day.average] == [1, 5, 1, 5, 3]
    assert day.volatility_pct == pytest.approx(100 * 2 / 3)  # deviations -2, 0, 2: variance 8 / 2, mean 3


# The last minute, seen every five seconds


def test_a_rolling_price_sees_the_sixty_seconds_before_it() -> None:
    """A tick at as_of is not in [as_of - 60 s, as_of), one at as_of - 60 s is."""
    rows = {row.as_of: row for row in rolling_prices_of([tick(0, "10"), tick(3, "13"), tick(60, "20"), tick(65, "8")])}
    assert sorted(rows) == [at(second) for second in range(5, 70, 5)], "none above the newest tick at 65 s"
    assert (rows[at(5)].average_1m, rows[at(5)].tick_count) == (Decimal("11.5"), 2)
    assert rows[at(60)] == replace(rows[at(5)], as_of=at(60))
    last = rows[at(65)]  # [5 s, 65 s) holds the tick at 60 s alone
    assert [last.average_1m, last.low, last.high, last.tick_count] == [20, 20, 20, 1]
    assert last.volatility_pct is None


def test_a_rolling_price_is_where_its_minute_has_a_tick() -> None:
    rows = {row.as_of for row in rolling_prices_of([tick(1, "10"), tick(200, "11"), tick(206, "12")])}
    # The tick at 1 s is in [as_of - 60, as_of) for 5 to 60 s, the one at 200 s for 205 s on, up to 206 s.
    assert rows == {at(second) for second in (*range(5, 65, 5), 205)}


def test_a_rolling_average_is_rounded_half_up_and_its_volatility_is_a_sample_s() -> None:
    rows = {row.as_of: row for row in rolling_prices_of([tick(0, "1"), tick(1, "1"), tick(2, "2"), tick(9, "1")])}
    assert list(rows) == [at(5)]
    assert rows[at(5)].average_1m == Decimal("1.333333333333")
    # Mean 4/3, squared differences 1/9 + 1/9 + 4/9 = 6/9, over n - 1 = 2: 1/3.
    assert rows[at(5)].volatility_pct == pytest.approx(100 * sqrt(1 / 3) / (4 / 3))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (5, None),  # 3 alone
        (30, 100 * sqrt(2) / 2),  # 1 and 3: mean 2, squared differences 1 + 1, over 1
        (90, 100 * sqrt(7 / 3) / (8 / 3)),  # 4, 1 and 3: mean 8/3, squared differences 16/9 + 25/9 + 1/9, over 2
    ],
)
def test_volatility_looks_back_by_its_own_length(seconds: int, expected: float | None) -> None:
    """The average's minute is a minute, whatever the setting: 1 and 3."""
    ticks = [tick(5, "4"), tick(60, "1"), tick(75, "3"), tick(81, "9")]
    rows = {row.as_of: row for row in rolling_prices_of(ticks, seconds * SECOND)}
    assert rows[at(80)].average_1m == 2
    assert rows[at(80)].volatility_pct == (None if expected is None else pytest.approx(expected))


# The change within a minute


def current(*ticks: Tick) -> CurrentPrice:
    (row,) = current_prices_of(ticks)
    return row


def test_the_change_is_against_the_last_price_at_least_a_minute_older() -> None:
    row = current(tick(0, "50"), tick(40, "80"), tick(40.000001, "90"), tick(100, "100"))
    assert row.change_pct_1m == 25.0, "100 / 80: at 60 s exactly the tick at 40 s counts, the next no more"


def test_the_change_is_null_against_a_price_older_than_two_minutes_or_none() -> None:
    assert current(tick(0, "50"), tick(120, "100")).change_pct_1m == 100.0
    assert current(tick(0, "50"), tick(120.000001, "100")).change_pct_1m is None
    assert current(tick(0, "50"), tick(59.999999, "100")).change_pct_1m is None


def test_the_change_is_against_the_same_venue_and_the_last_of_an_instant() -> None:
    other = tick(30, "1", source="other")
    row = current(tick(20, "40", 1), other, tick(20, "50", 2), tick(100, "75"))
    assert row.change_pct_1m == 50.0
    assert current(tick(30, "1", source="other"), tick(100, "75")).change_pct_1m is None


def test_the_change_counts_in_gold_time() -> None:
    """The price of a clock an hour ahead counts at its receipt, 10 s: no minute before the one at 60 s."""
    ahead = tick(3600, "50")
    ahead = replace(ahead, received_at=at(10), is_future=True)
    assert current(ahead, tick(60, "75")).change_pct_1m is None
    assert current(ahead, tick(70, "75")).change_pct_1m == 50.0


# Alerts


def test_an_alert_opens_strictly_above_the_threshold() -> None:
    assert list(alerts_of([tick(0, "100"), tick(5, "102")])) == []
    up = tick(5, "102.000000000001", 7)
    assert only_alert(tick(0, "100"), up) == Alert(
        alert_id="s:a:up:s:a:0:7",
        source="s",
        asset="a",
        direction="up",
        threshold_pct=2.0,
        window_seconds=10,
        opened_at=at(5),
        reference_price=Decimal("100.000000000000"),
        reference_time=NOON,
        trigger_price=Decimal("102.000000000001"),
        peak_change_pct=float(Fraction(2_000_000_000_001, 10**12)),
        closed_at=None,
    )


def test_a_fall_is_measured_from_the_highest_and_its_peak_has_no_sign() -> None:
    alert = only_alert(tick(0, "90"), tick(1, "91"), tick(2, "100", 1), tick(3, "100", 2), tick(4, "90.5", 9))
    # Up from 90 at 1 s: 1.1 %; at 2 s: 11 %, an episode that the fall of 9.5 % continues.
    assert (alert.direction, alert.opened_at, alert.peak_change_pct) == ("up", at(2), float(Fraction(100, 9)))
    alert = only_alert(tick(2, "100", 1), tick(3, "100", 2), tick(4, "90", 9))
    assert (alert.alert_id, alert.direction) == ("s:a:down:s:a:0:9", "down")
    assert (alert.reference_time, alert.peak_change_pct) == (at(2), 10.0), "the earlier of equals"


def test_up_counts_where_both_directions_are_equal() -> None:
    """Of 90 and 110 in the window, 99 is 10 % above the one and 10 % below the other; 99 itself was 10 % above 90."""
    ticks = [tick(0, "90", 1), tick(0, "110", 2), tick(1, "99", 3)]
    alert = only_alert(*ticks)
    assert (alert.direction, str(alert.reference_price), alert.peak_change_pct) == ("up", "90.000000000000", 10.0)


def test_ticks_of_the_same_instant_are_not_compared() -> None:
    assert list(alerts_of([tick(0, "100", 1), tick(0, "200", 2)])) == []
    assert only_alert(tick(0, "100", 1), tick(0, "200", 2), tick(1, "150", 3)).opened_at == at(1)


@pytest.mark.parametrize(("seconds", "count"), [(10, 1), (10.000001, 0)])
def test_the_window_begins_at_its_first_instant(seconds: float, count: int) -> None:
    assert len(list(alerts_of([tick(0, "100"), tick(seconds, "200")]))) == count


def test_an_episode_closes_below_half_the_threshold_not_at_it() -> None:
    """At 11 s 103 is the lowest of the window; 104.03 is exactly 1 % above it, 104.029999 is less."""
    begin = [tick(0, "100"), tick(3, "103"), tick(11, "103.5")]
    assert only_alert(*begin).closed_at == at(11), "against 103: 0.49 %"
    held = [tick(0, "100"), tick(3, "103"), tick(11, "104.03"), tick(13, "104.04")]
    assert only_alert(*held).closed_at is None, "1 % at 11 s, 1.01 % at 13 s"
    assert only_alert(*held[:2], tick(11, "104.029999")).closed_at == at(11)


def test_an_episode_closes_at_the_first_tick_with_nothing_before_it() -> None:
    alert = only_alert(tick(0, "100"), tick(1, "103"), tick(50, "200"))
    assert (alert.closed_at, alert.peak_change_pct) == (at(50), 3.0)
    assert only_alert(tick(0, "100"), tick(1, "103")).closed_at is None, "with no tick it stays open"


def test_a_tick_of_the_same_instant_can_close_an_episode() -> None:
    """Both are compared with 100; the second, later in tick order, is 0.5 % above it."""
    alert = only_alert(tick(0, "100", 1), tick(1, "103", 2), tick(1, "100.5", 3))
    assert (alert.opened_at, alert.closed_at, alert.peak_change_pct) == (at(1), at(1), 3.0)


def test_the_peak_is_the_largest_change_of_the_episode() -> None:
    """A tick that closes it is none of it."""
    alert = only_alert(tick(0, "100"), tick(1, "103"), tick(2, "107"), tick(3, "104"), tick(40, "1"))
    assert alert.peak_change_pct == 7.0


@pytest.mark.parametrize(("opens", "count"), [(79.999999, 1), (80, 2)])
def test_nothing_opens_until_a_minute_after_the_last_was_closed(opens: float, count: int) -> None:
    """Opened at 1 s, closed at 20 s by a tick with nothing before it; so 80 s is the first instant."""
    ticks = [tick(0, "100"), tick(1, "103"), tick(20, "100"), tick(75, "100"), tick(opens, "110")]
    assert len(list(alerts_of(ticks))) == count


def test_a_change_that_outlasts_the_cooldown_opens_late() -> None:
    """103 against 100 at 79 s is too early; 103 at 81 s, still against 100 at 75 s, opens."""
    ticks = [tick(0, "100"), tick(1, "103"), tick(20, "100"), tick(75, "100"), tick(79, "103"), tick(81, "103")]
    assert [alert.opened_at for alert in sorted(alerts_of(ticks), key=lambda a: a.opened_at)] == [at(1), at(81)]


def test_settings_of_alerts_are_taken_as_written() -> None:
    """The double 0.3 is a little below three tenths; a change of exactly 0.3 % is not above it all the same."""
    assert not list(alerts_of([tick(0, "1000"), tick(1, "1003")], threshold_pct=0.3))
    ticks = [tick(0, "1000"), tick(1, "1002"), tick(1.5, "1001.5")]
    (alert,) = alerts_of(ticks, threshold_pct=0.1, window=2 * SECOND)
    assert (alert.threshold_pct, alert.window_seconds, alert.closed_at) == (0.1, 2, None)
    # Of no cooldown and a window of a second: opened at 1 s, closed at 1.5 s by 0 % against 1002, open again at 2.1 s.
    ticks = [tick(0, "1000"), tick(1, "1002"), tick(1.5, "1002"), tick(2.1, "1004")]
    alerts = list(alerts_of(ticks, threshold_pct=0.15, window=SECOND, cooldown=0 * SECOND))
    assert [(alert.opened_at, alert.closed_at) for alert in alerts] == [(at(1), at(1.5)), (at(2.1), None)]


def test_each_venue_and_asset_has_alerts_of_its_own() -> None:
    ticks = [tick(0, "100"), tick(1, "103", source="t"), tick(1, "103", asset="b"), tick(2, "100.5")]
    assert list(alerts_of(ticks)) == []


# Top movers


def test_movers_are_ranked_by_the_size_of_their_change_then_by_name() -> None:
    """+10 % of t, -10 % of s (twice), 0 % of one tick; another minute has ranks of its own."""
    ticks = [
        *(tick(1, "100", source="t"), tick(2, "110", source="t")),
        *(tick(1, "100", source="s", asset="b"), tick(2, "90", source="s", asset="b")),
        *(tick(1, "100", source="s", asset="a"), tick(2, "90", source="s", asset="a")),
        *(tick(1, "7", source="r"), tick(61, "7", source="r")),
    ]
    rows = sorted(top_movers_of(windows_of(ticks, 60 * SECOND)), key=lambda row: (row.window_start, row.rank))
    assert [(row.window_start, row.rank, row.source, row.asset, row.change_pct) for row in rows] == [
        (at(0), 1, "s", "a", -10.0),
        (at(0), 2, "s", "b", -10.0),
        (at(0), 3, "t", "a", 10.0),
        (at(0), 4, "r", "a", 0.0),
        (at(60), 1, "r", "a", 0.0),
    ]


def test_movers_are_compared_exactly() -> None:
    """100 % and 1e-25 % more, which a double cannot tell: the second by name comes first."""
    low, high = "1000000000000000.000000000000", "2000000000000000.000000000000"
    ticks = [
        *(tick(1, low, asset="a"), tick(2, high, asset="a")),
        *(tick(1, low, asset="b"), tick(2, high[:-1] + "1", asset="b")),
    ]
    rows = {row.rank: row.asset for row in top_movers_of(windows_of(ticks, 60 * SECOND))}
    assert rows == {1: "b", 2: "a"}


# Against the definitions taken literally

few_ticks = st.lists(
    st.tuples(
        st.integers(0, 240).map(lambda half: half / 2), st.integers(95, 105).map(str), st.sampled_from(["a", "b"])
    ),
    max_size=40,
).map(lambda rows: [tick(time, price, number, asset=asset) for number, (time, price, asset) in enumerate(rows, 1)])


@given(few_ticks)
def test_the_lowest_before_a_tick_is_the_first_lowest_of_its_window(ticks: list[Tick]) -> None:
    for ordered in instruments(ticks).values():
        for one, found in zip(ordered, lowest_before(ordered, 10 * SECOND, lambda t: t.price_usd), strict=True):
            window = [t for t in ordered if one.gold_time - 10 * SECOND <= t.gold_time < one.gold_time]
            assert found == min(window, key=lambda t: t.price_usd, default=None)


@given(few_ticks)
def test_rolling_prices_are_all_windows_that_have_a_tick(ticks: list[Tick]) -> None:
    expected: dict[Hashable, object] = {}
    for (source, asset), ordered in instruments(ticks).items():
        for second in range(0, 200, 5):
            prices = [t.price_usd for t in ordered if at(second - 60) <= t.gold_time < at(second)]
            if prices and at(second) <= ordered[-1].gold_time:
                expected[source, asset, at(second)] = (min(prices), max(prices), len(prices))
    rows = rolling_prices_of(ticks)
    assert {(row.source, row.asset, row.as_of): (row.low, row.high, row.tick_count) for row in rows} == expected


@given(few_ticks, st.randoms(use_true_random=False))
def test_gold_does_not_depend_on_the_order_in_which_ticks_come(ticks: list[Tick], chance: random.Random) -> None:
    def tables(of: list[Tick]) -> set[GoldRow]:
        minutes = list(windows_of(of, 60 * SECOND))
        rows: set[GoldRow] = {*minutes, *windows_of(of, 300 * SECOND), *rolling_prices_of(of)}
        return rows | {*current_prices_of(of), *alerts_of(of), *top_movers_of(minutes)}

    assert tables(chance.sample(ticks, len(ticks))) == tables(ticks)


@given(few_ticks)
def test_episodes_do_not_overlap_and_are_a_cooldown_apart(ticks: list[Tick]) -> None:
    by_asset: dict[str, list[Alert]] = {"a": [], "b": []}
    for alert in alerts_of(ticks, cooldown=20 * SECOND):
        by_asset[alert.asset].append(alert)
        assert alert.peak_change_pct > 2
    for alerts in by_asset.values():
        alerts.sort(key=lambda alert: alert.opened_at)
        for one, following in pairwise(alerts):
            assert one.closed_at is not None
            assert one.opened_at <= one.closed_at
            assert following.opened_at >= one.closed_at + 20 * SECOND


# All of it from records


def test_a_lake_has_all_gold_tables_by_their_keys() -> None:
    def record(offset: int, seconds: float, price: str) -> Record:
        value = f'{{"timestamp": "{at(seconds).isoformat()}", "asset": "a", "price_usd": "{price}", "source": "s"}}'
        return Record("ticks", 0, offset, None, value.encode())

    lake: Lake = lake_of([record(2, 61, "103"), record(0, 0, "100"), record(1, 60, "100")])
    tables: list[Mapping[Hashable, GoldRow]] = [lake.price_1m, lake.price_5m, lake.price_1h, lake.price_1d]
    assert [len(table) for table in tables] == [2, 1, 1, 1]
    assert ("s", "a", NOON.replace(hour=0)) in lake.price_1d
    assert set(lake.rolling_price) == {("s", "a", at(second)) for second in range(5, 65, 5)}
    assert lake.current_price["a"].change_pct_1m == pytest.approx(3.0)
    assert set(lake.alerts) == {"s:a:up:ticks:0:2"}
    assert lake.top_movers[at(60), 1].change_pct == 3.0
    assert not lake_of(lake.bronze.values(), alert_threshold_pct=3.0).alerts
