"""Commits of maintenance beside the stream."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lake.delta.beside import Beside
from lake.delta.drop import DROPPED_BEFORE
from lake.delta.files import LocalDisk
from lake.delta.log import MAINTENANCE, DataFile, TableLog
from lake.delta.writer import create_table
from lake.tables import BRONZE_TICKS

TIME = datetime(2024, 8, 9, tzinfo=UTC)


def data_file(name: str) -> DataFile:
    """A file as the log knows it; it need not exist."""
    add = {"path": name, "partitionValues": {}, "size": 1, "modificationTime": 0, "dataChange": True}
    return DataFile(add, name)


@pytest.fixture
def log(tmp_path: Path) -> TableLog:
    """Version 1 is of micro-batch 7 and adds a and b."""
    root = f"file:{tmp_path}"
    create_table(LocalDisk(), BRONZE_TICKS, root)
    log = TableLog(LocalDisk(), BRONZE_TICKS.path(root))
    assert log.put(1, {"query": "q", "batch": 7}, [data_file("a"), data_file("b")])
    return log


def live(log: TableLog) -> set[str]:
    return set(log.state().files)


def test_a_commit_repeats_the_newest_micro_batchs_metadata(log: TableLog) -> None:
    """Also of one that came while this was being prepared."""
    beside = Beside(log, 1, "join")
    assert log.put(2, {"query": "q", "batch": 8}, [data_file("c")])
    assert beside.commit([data_file("ab")], [data_file("a"), data_file("b")], data_change=False) is None
    assert live(log) == {"ab", "c"}
    metadata = log.metadata(3)
    assert (metadata["query"], metadata["batch"], metadata[MAINTENANCE]) == ("q", 8, "join")
    assert beside.commit([data_file("abc")], [data_file("ab"), data_file("c")], data_change=False) is None
    assert log.metadata(4)["batch"] == 8


def test_what_others_have_replaced_is_not_replaced_again(log: TableLog) -> None:
    """Whether they did it before the first attempt or after another commit of this one."""
    beside = Beside(log, 1, "join")
    assert log.put(2, {}, [data_file("A")], [data_file("a")])
    conflict = beside.commit([data_file("ab")], [data_file("a"), data_file("b")])
    assert conflict is not None
    assert conflict.lost == {"a"}
    assert beside.commit([data_file("B")], [data_file("b")]) is None
    later = beside.commit([data_file("x")], [data_file("a")])
    assert later is not None
    assert live(log) == {"A", "B"}


def test_a_new_definition_is_a_conflict(log: TableLog) -> None:
    definition = {**log.definition(), "description": "another one"}
    assert log.put(2, {}, definition=definition)
    conflict = Beside(log, 1, "join").commit([data_file("ab")], [data_file("a"), data_file("b")])
    assert conflict is not None
    assert "schema" in conflict.reason
    assert live(log) == {"a", "b"}


@dataclass(frozen=True)
class Forgetful(LocalDisk):
    """A store that does what is asked and says that it was refused, as when an answer is lost."""

    def create(self, url: str, content: bytes) -> bool:
        super().create(url, content)
        return False


def test_a_commit_whose_answer_was_lost_is_done_once(log: TableLog) -> None:
    beside = Beside(TableLog(Forgetful(), log.path), 1, "join")
    assert beside.commit([data_file("ab")], [data_file("a"), data_file("b")]) is None
    assert log.newest() == 2
    assert live(log) == {"ab"}


def test_a_drop_is_recorded_with_the_latest_time(log: TableLog) -> None:
    """The table is no longer append-only then, in a commit before."""
    assert Beside(log, 1, "drop").drop([data_file("a")], TIME) is None
    assert Beside(log, 3, "drop").drop([data_file("b")], TIME - timedelta(days=1)) is None
    assert log.state(2).configuration["delta.appendOnly"] == "false"
    assert live(log) == set()
    assert log.property(DROPPED_BEFORE) == TIME.isoformat()
