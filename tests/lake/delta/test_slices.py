"""Rows that change: only the files of the changed spans are written again, and no row is lost, doubled, or old."""

from __future__ import annotations

import random
from collections.abc import Collection
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lake.delta.files import LocalDisk
from lake.delta.log import DataFile
from lake.delta.parquet import as_stored, encoded_file
from lake.delta.slices import Changes, Slices
from lake.delta.writer import Changed, LakeWriter
from lake.tables import SILVER_GAPS, Table
from tests.lake.delta.spanned import (
    DAY,
    SPANNED,
    Key,
    at,
    batch,
    claimed,
    compact,
    counts_of,
    lake_in,
    layout,
    log_of,
    rows,
    span,
    stored,
    upsert,
)


@pytest.fixture
def writer(tmp_path: Path) -> LakeWriter:
    return lake_in(f"file:{tmp_path}", SPANNED)


def names(minute: int, count: int) -> dict[Key, int]:
    """So many rows of one minute."""
    return {(minute, f"{number}"): number for number in range(count)}


# Files


def test_a_file_has_whole_spans_until_it_has_enough_rows(writer: LakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lake.delta.frames.ROWS_A_FILE", 10)
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {**names(0, 4), **names(10, 7), **names(20, 25), **names(30, 1), **names(40, 1)})
    assert layout(writer) == [[0, 1], [2], [3, 4]]


def test_spans_of_later_micro_batches_join_the_newest_file_until_it_has_enough_rows(
    writer: LakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every micro-batch would leave a small file for ever."""
    monkeypatch.setattr("lake.delta.frames.ROWS_A_FILE", 10)
    slices = Slices(writer, SPANNED)
    for number in range(7):
        upsert(slices, number, names(10 * number, 4))
    assert layout(writer) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_late_row_rewrites_one_file(writer: LakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lake.delta.frames.ROWS_A_FILE", 4)
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {key: n for number in range(8) for key, n in names(10 * number, 4).items()})
    before = {file.path for file in log_of(writer).files()}
    assert len(before) == 8
    upsert(slices, 1, {(32, "late"): 1})
    after = {file.path for file in log_of(writer).files()}
    assert (len(before - after), len(after - before)) == (1, 1)
    assert layout(writer) == [[number] for number in range(8)]
    assert stored(writer)[32, "late"] == 1


def test_late_rows_in_a_hole_between_files_get_a_file_of_their_own(
    writer: LakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rows on both sides of a file that is not touched are not put together around it."""
    monkeypatch.setattr("lake.delta.frames.ROWS_A_FILE", 2)
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1, (0, "b"): 1})
    upsert(slices, 1, {(300, "a"): 1, (300, "b"): 1})
    upsert(slices, 2, {(150, "late"): 1})
    assert layout(writer) == [[0], [15], [30]]
    upsert(slices, 3, {(140, "late"): 1, (160, "late"): 1})
    assert layout(writer) == [[0], [14], [15], [16], [30]]
    upsert(slices, 4, {(140, "later"): 1, (150, "later"): 1, (160, "later"): 1})
    assert stored(writer).keys() >= {(minute, "later") for minute in (140, 150, 160)}


def test_a_file_has_rows_of_one_day(writer: LakeWriter) -> None:
    """The table is partitioned by it."""
    upsert(Slices(writer, SPANNED), 0, {(minute, "n"): minute for minute in (0, 1_430, 1_440, 1_450, 2_890)})
    assert layout(writer) == [[0, 143], [144, 145], [289]]
    days = sorted(file.add["partitionValues"]["day"] for file in log_of(writer).files())
    assert days == ["2024-08-09", "2024-08-10", "2024-08-11"]


def test_a_file_without_rows_is_not_written(writer: LakeWriter) -> None:
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1})
    upsert(slices, 1, {}, gone=[(0, "a"), (500, "never was")])
    assert log_of(writer).files() == []
    upsert(slices, 2, {(0, "a"): 2})
    assert stored(writer) == {(0, "a"): 2}


# Old lakes


def test_rows_of_a_file_without_statistics_of_its_time_are_found_and_replaced(writer: LakeWriter) -> None:
    """As an old silver.gaps has: its rows may be of any span, until they are written again."""
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1, (500, "b"): 2})
    compact(writer, statistics=False)
    writer.catch_up(SPANNED)
    assert counts_of(slices.load([span(500)])) == {(500, "b"): 2}
    upsert(slices, 1, {(500, "b"): 3, (2_000, "c"): 4})
    assert stored(writer) == {(0, "a"): 1, (500, "b"): 3, (2_000, "c"): 4}
    upsert(slices, 2, {(0, "a"): 5}, gone=[(2_000, "c")])
    assert stored(writer) == {(0, "a"): 5, (500, "b"): 3}
    assert all("at" in file.lowest for file in log_of(writer).files())


def test_rows_of_a_file_that_only_gets_its_statistics_later_are_there_once(writer: LakeWriter) -> None:
    """ANALYZE ... COMPUTE DELTA STATISTICS adds a file again, with its statistics, and removes nothing."""
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1})
    [file] = log_of(writer).files()
    compact(writer, statistics=False)
    writer.catch_up(SPANNED)
    log = log_of(writer)
    [blind] = log.files()
    assert log.put(log.newest() + 1, {}, [DataFile({**blind.add, "stats": file.add["stats"]}, blind.path)], [])
    writer.catch_up(SPANNED)
    assert counts_of(slices.load([span(0)])) == {(0, "a"): 1}


def test_a_column_that_an_old_file_lacks_is_null(writer: LakeWriter) -> None:
    log = log_of(writer)
    file = encoded_file(SPANNED, as_stored(SPANNED, rows({(0, "a"): 1}).to_arrow()))
    made = log.add(file)
    path = made.path.removeprefix("file:")
    pl.read_parquet(path).drop("n").write_parquet(path)
    assert log.put(log.newest() + 1, {}, [made], [])
    writer.catch_up(SPANNED)
    slices = Slices(writer, SPANNED)
    [row] = slices.load([span(0)]).to_dicts()
    assert row == {"at": at(0), "name": "a", "n": None, "day": DAY.date()}
    upsert(slices, 0, {(1, "b"): 2})
    assert stored(writer) == {(0, "a"): None, (1, "b"): 2}


# Changes


def increment(*keys: Key) -> tuple[Collection[int], object]:
    """The spans of these rows, and a change that adds one to each."""

    def change(before: pl.DataFrame) -> Changes:
        counts = counts_of(before)
        return rows({key: (counts.get(key) or 0) + 1 for key in keys}), None

    return sorted({span(minute) for minute, _ in keys}), change


def test_a_change_that_is_not_committed_yet_is_read_with_the_other_rows(writer: LakeWriter) -> None:
    """What follows from it is computed while it is written."""
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1, (500, "b"): 1})
    change = slices.prepare([span(0), span(20)], lambda _: (rows({(0, "a"): 2, (20, "c"): 3}), rows({(500, "b"): 0})))
    spans = [span(minute) for minute in (0, 20, 500)]
    after = {(0, "a"): 2, (20, "c"): 3, (500, "b"): 1}
    assert counts_of(slices.load(spans)) == {(0, "a"): 1, (500, "b"): 1}, "the table is as it was"
    # All rows of its file are before the change, so that those of other spans can be deleted too.
    del after[500, "b"]
    assert counts_of(slices.load(spans, change)) == after
    slices.commit(change, batch(1))
    assert counts_of(slices.load(spans, change)) == counts_of(slices.load(spans)) == stored(writer) == after


def test_a_micro_batch_is_written_once_unless_it_has_to_be_again(writer: LakeWriter) -> None:
    slices = Slices(writer, SPANNED)
    spans, change = increment((0, "a"))
    for number in (0, 0, 1):
        slices.update(batch(number), spans, change)  # type: ignore[arg-type]
    assert stored(writer) == {(0, "a"): 2}
    slices.update(batch(1), spans, change, again=True)  # type: ignore[arg-type]
    assert stored(writer) == {(0, "a"): 3}
    again = Slices(claimed(writer.root, SPANNED), SPANNED)
    again.update(batch(1), spans, change)  # type: ignore[arg-type]
    assert stored(writer) == {(0, "a"): 3}, "nor by the driver after a crash"


def test_what_maintenance_has_replaced_meanwhile_is_computed_again(writer: LakeWriter) -> None:
    """Between the look at the rows and the commit: the new files' rows are read, and nothing is lost."""
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1, (500, "b"): 1})
    upsert(slices, 1, {(2_000, "c"): 1})
    calls: list[dict[Key, int]] = []

    def change(before: pl.DataFrame) -> Changes:
        if not calls:
            compact(writer)
        calls.append(counts_of(before))
        return rows({(0, "a"): calls[-1][0, "a"] + 1}), None

    slices.update(batch(2), [span(0)], change)
    assert len(calls) == 2
    assert stored(writer) == {(0, "a"): 2, (500, "b"): 1, (2_000, "c"): 1}


def test_who_prepares_a_change_learns_that_maintenance_was_quicker(writer: LakeWriter) -> None:
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1})
    change = slices.prepare([span(0)], lambda _: (rows({(0, "a"): 2}), None))
    compact(writer)
    with pytest.raises(Changed, match=r"test\.spanned was changed"):
        slices.commit(change, batch(1))
    assert stored(writer) == {(0, "a"): 1}
    # Maintenance of other files only goes before it.
    upsert(slices, 1, {(1_440, "b"): 1})
    change = slices.prepare([span(1_440)], lambda _: (rows({(1_440, "b"): 2}), None))
    [other] = [file for file in log_of(writer).files() if file.add["partitionValues"]["day"] == "2024-08-09"]
    log = log_of(writer)
    assert log.put(log.newest() + 1, {}, [], [other])
    slices.commit(change, batch(2))
    assert stored(writer) == {(1_440, "b"): 2}


def test_maintenance_that_never_stops_is_an_error(writer: LakeWriter) -> None:
    slices = Slices(writer, SPANNED)
    upsert(slices, 0, {(0, "a"): 1})

    def change(_: pl.DataFrame) -> Changes:
        compact(writer)
        return rows({(0, "a"): 2}), None

    with pytest.raises(Changed, match="again and again"):
        slices.update(batch(1), [span(0)], change)
    assert stored(writer) == {(0, "a"): 1}


# Memory


class CountedDisk(LocalDisk):
    """It counts which files are read."""

    def __init__(self) -> None:
        object.__setattr__(self, "urls", [])

    def read(self, url: str, offset: int = 0, length: int | None = None) -> bytes:
        self.urls.append(url)  # type: ignore[attr-defined]
        return super().read(url, offset, length)

    def data_files(self) -> int:
        """How many since the last call."""
        count = sum(url.endswith(".parquet") for url in self.urls)  # type: ignore[attr-defined]
        self.urls.clear()  # type: ignore[attr-defined]
        return count


def counted(root: str, *tables: Table) -> tuple[LakeWriter, CountedDisk]:
    disk = CountedDisk()
    writer = LakeWriter(disk, root, tables)
    writer.claim()
    return writer, disk


def test_what_a_writer_has_written_it_does_not_read(writer: LakeWriter) -> None:
    writer, disk = counted(writer.root, SPANNED)
    slices = Slices(writer, SPANNED)
    for number in range(5):
        upsert(slices, number, {(minute, f"{number}"): 1 for minute in (0, 500, 1_500)})
        slices.load([span(0), span(1_500)])
        slices.forget_unused()
    assert disk.data_files() == 0


def test_rows_beyond_the_limit_are_let_go_but_never_those_in_use(writer: LakeWriter) -> None:
    days = [1_440 * day for day in range(6)]
    upsert(Slices(writer, SPANNED), 0, {key: n for day in days for key, n in names(day, 10).items()})
    writer, disk = counted(writer.root, SPANNED)
    slices = Slices(writer, SPANNED, kept_rows=25)
    for day in days:
        slices.load([span(day)])
        slices.forget_unused()
    assert disk.data_files() == 6
    slices.load([span(day) for day in days[4:]])
    assert disk.data_files() == 0, "the last ones are kept"
    slices.forget_unused()
    slices.load([span(day) for day in days[:5]])
    slices.forget_unused()
    assert disk.data_files() == 4
    slices.load([span(day) for day in days[:5]])
    assert disk.data_files() == 0, "50 rows, all of which the last micro-batch has used"


def test_two_readers_of_one_table_see_the_same(writer: LakeWriter) -> None:
    """The minutes are read by the stream, and by the roll-up beside it."""
    one, other = Slices(writer, SPANNED), Slices(writer, SPANNED)
    upsert(one, 0, {(0, "a"): 1})
    assert counts_of(other.load([span(0)])) == {(0, "a"): 1}
    upsert(other, 1, {(0, "a"): 2})
    assert counts_of(one.load([span(0)])) == {(0, "a"): 2}
    upsert(one, 2, {(0, "a"): 3})
    assert counts_of(other.load([span(0)])) == stored(writer) == {(0, "a"): 3}


# A copy for those without Delta


class Copy:
    """Files by their first span, as the plain Parquet files have them."""

    def __init__(self) -> None:
        self.files: dict[int, pl.DataFrame] = {}
        self.changed_rows: list[dict[Key, int]] = []

    def changed(self, table: Table, pieces: dict[int, pl.DataFrame], gone: Collection[int], rows: pl.DataFrame) -> None:
        assert table == SPANNED
        self.files.update(pieces)
        for first in gone:
            del self.files[first]
        self.changed_rows.append(counts_of(rows))


def test_a_sink_gets_whole_files_and_the_rows_that_changed(writer: LakeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lake.delta.frames.ROWS_A_FILE", 3)
    copy = Copy()
    slices = Slices(writer, SPANNED, copy)
    chance = random.Random(1)
    for number in range(12):
        counts = {(chance.randrange(3_000), chance.choice("ab")): number for _ in range(4)}
        before = stored(writer)
        gone = chance.sample(sorted(before), min(len(before), 2)) if number % 3 == 2 else []
        upsert(slices, number, counts, [key for key in gone if key not in counts])
        assert copy.changed_rows[-1] == counts
        assert counts_of(pl.concat(copy.files.values())) == stored(writer)


# All of it

MINUTES = st.integers(0, 4_000) | st.integers(1_400, 1_480)
KEYS = st.tuples(MINUTES, st.sampled_from("abc"))
STEPS = st.lists(
    st.tuples(
        st.dictionaries(KEYS, st.integers(0, 9), max_size=12),
        st.lists(st.integers(0, 10**6), max_size=4),
        st.sampled_from(["go on", "go on", "go on", "restart", "compact", "compact without statistics", "forget"]),
    ),
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([1, 2, 5, 1_000]))
# A new span between those of files that an outsider has just joined.
@example([({(0, "a"): 1}, [], "go on"), ({(600, "a"): 1}, [], "compact"), ({(300, "a"): 1}, [], "go on")], 1)
def test_the_rows_are_those_of_a_dictionary_and_files_do_not_interleave(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[dict[Key, int], list[int], str]],
    rows_a_file: int,
) -> None:
    """However rows come, go, and are moved: a span is in one file, and no file's spans lie between another's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lake.delta.frames.ROWS_A_FILE", rows_a_file)
        writer = lake_in(f"file:{tmp_path_factory.mktemp('lake')}", SPANNED)
        slices = Slices(writer, SPANNED, kept_rows=10)
        wanted: dict[Key, int] = {}
        blind = False
        for number, (counts, picked, then) in enumerate(steps):
            known = sorted(wanted)
            gone = {known[n % len(known)] for n in picked if known} - counts.keys()
            upsert(slices, number, counts, gone)
            wanted = {key: n for key, n in {**wanted, **counts}.items() if key not in gone}
            assert stored(writer) == wanted
            spans = {span(minute) for minute, _ in wanted}
            assert counts_of(slices.load(spans)) == wanted
            some = sorted(spans)[::2]
            assert counts_of(slices.load(some)) == {key: n for key, n in wanted.items() if span(key[0]) in some}
            ranges = [(spans[0], spans[-1]) for spans in layout(writer)]
            # Maintenance does not know of spans.
            if not blind:
                assert all(before[1] < after[0] for before, after in pairwise(ranges)), ranges
            if then.startswith("compact"):
                compact(writer, statistics=then == "compact")
                blind = blind or then != "compact"
            elif then == "restart":
                writer = claimed(writer.root, SPANNED)
                slices = Slices(writer, SPANNED, kept_rows=10)
            elif then == "forget":
                slices.forget_unused()


def test_a_table_in_one_span_is_one_file(tmp_path: Path) -> None:
    table = Table("test", "one", "How many of each", ("name",), SPANNED.columns[1:3], statistics=("name",))
    slices = Slices(lake_in(f"file:{tmp_path}", table), table)

    def change(before: pl.DataFrame) -> Changes:
        return pl.DataFrame({"name": [f"{before.height}"], "n": [before.height]}), None

    for number in range(4):
        slices.update(batch(number), [0], change)
    assert slices.load([0]).sort("n").rows() == [(f"{n}", n) for n in range(4)]


def test_spans_of_rows_go_by_the_time_that_is_asked_for(writer: LakeWriter) -> None:
    slices = Slices(writer, SPANNED)
    assert slices.spans_of(rows({(25, "a"): 1, (0, "a"): 1, (29, "b"): 1})) == [span(0), span(20)]
    assert slices.spans_of(slices.empty()) == []
    assert SILVER_GAPS.file_span == timedelta(hours=1)
