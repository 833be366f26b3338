"""Live files by the spans of time that they hold: each that may have a row of a span is found, and found once."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lake.delta.live import SPANS_A_CELL, LiveFiles
from lake.delta.log import Action, DataFile
from lake.delta.slices import Slices
from tests.lake.delta.spanned import SPANNED, compact, counts_of, lake_in, span, upsert

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Spans = tuple[int, int] | None


def file(number: int, spans: Spans) -> DataFile:
    """With rows from the first to the last of these spans; None: without statistics."""
    add: Action = {"path": f"{number}.parquet", "size": 1, "partitionValues": {}}
    if spans:
        low, high = (EPOCH + timedelta(minutes=10 * number) for number in spans)
        ends = (low, high + timedelta(minutes=9, seconds=59, milliseconds=999))
        low_text, high_text = (time.isoformat(timespec="milliseconds").replace("+00:00", "Z") for time in ends)
        add["stats"] = json.dumps({"numRecords": 1, "minValues": {"at": low_text}, "maxValues": {"at": high_text}})
    return DataFile(add, add["path"])


SPANS = st.none() | st.tuples(
    st.integers(0, 3 * SPANS_A_CELL), st.sampled_from([0, 0, 1, 5, SPANS_A_CELL, 2 * SPANS_A_CELL])
).map(lambda drawn: (drawn[0], drawn[0] + drawn[1]))
CHANGES = st.lists(st.tuples(st.integers(0, 9), st.booleans(), SPANS), max_size=25)


@given(CHANGES, st.lists(st.integers(0, 5 * SPANS_A_CELL), max_size=5))
def test_each_file_that_may_have_rows_of_a_span_is_found_once(
    changes: list[tuple[int, bool, Spans]], asked: list[int]
) -> None:
    """Files come and go; a file may be added again with other statistics, and an unknown one may be removed."""
    live, wanted = LiveFiles(SPANNED, []), dict[str, Spans]()
    for number, added, spans in changes:
        one = file(number, spans)
        if added:
            live.add([one])
            wanted[one.path] = spans
        else:
            live.remove([one.path])
            wanted.pop(one.path, None)
    assert len(live) == len(wanted)
    assert sorted(one.path for one in live.all()) == sorted(wanted)
    touching = [
        path for path, spans in wanted.items() if spans is None or any(spans[0] <= n <= spans[1] for n in asked)
    ]
    assert sorted(one.path for one in live.touching(asked)) == sorted(touching)
    for first in asked:
        end = first + SPANS_A_CELL // 2
        within = [path for path, spans in wanted.items() if spans and spans[0] < end and spans[1] >= first]
        assert sorted(one.path for one in live.between(first, end)) == sorted(within)
        assert live.between(first, first) == []
    highest = max((spans[1] for spans in wanted.values() if spans), default=None)
    last = live.last()
    assert (None if last is None else live.spans(last)[-1]) == highest  # type: ignore[index]


def test_a_table_in_one_span_has_all_files_in_it() -> None:
    live = LiveFiles(SPANNED.__class__("test", "one", "", ("name",), SPANNED.columns), [file(1, None), file(2, (7, 9))])
    assert [one.path for one in live.touching([0])] == ["1.parquet", "2.parquet"]


def test_files_that_maintenance_replaces_are_there_before_or_after_and_never_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream reads rows of other spans while a commit of its own looks at what maintenance has done."""
    writer = lake_in(f"file:{tmp_path}", SPANNED)
    slices = Slices(writer, SPANNED)
    monkeypatch.setattr("lake.delta.frames.ROWS_A_FILE", 1)
    upsert(slices, 0, {(0, "a"): 1, (500, "b"): 1})
    compact(writer)
    found: list[dict[tuple[int, str], int]] = []
    readers: list[threading.Thread] = []
    real = LiveFiles.remove

    def remove(live: LiveFiles, paths: list[str]) -> None:
        real(live, paths)
        readers.append(threading.Thread(target=lambda: found.append(counts_of(slices.load([span(500)])))))
        readers[-1].start()
        # Who holds what the reader needs lets it wait.
        readers[-1].join(0.3)

    monkeypatch.setattr(LiveFiles, "remove", remove)
    writer.catch_up(SPANNED)
    monkeypatch.undo()
    for reader in readers:
        reader.join()
    assert all(rows == {(500, "b"): 1} for rows in found), found
