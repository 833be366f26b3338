"""The state of deduplication between starts: a driver knows what the one before it knew, or says that it cannot."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from conf.settings import Settings
from lake.delta.files import LocalDisk
from lake.delta.log import LogDamaged, TableLog
from lake.silver import state
from lake.silver.state import State, StateLost
from lake.tables import SILVER_TICKS
from streaming.lakehouse import Lakehouse
from tests.lakes import wrong_gaps, wrong_rows
from tests.micro_batches import in_kafka, lake_in, market, opened, pieces, write_one
from tests.oracle import Record, lake_of
from tests.ticks import GAP, compact


def records(seed: int = 1) -> list[Record]:
    """Ticks with repeats, odd records that name a trade, and reports of which some wait."""
    chance = random.Random(seed)
    values: list[bytes | None] = list(market(chance))
    for at in chance.sample(range(len(values)), 40):
        # No tick, but it names its trade.
        negative = (values[at] or b"").replace(b'"price_usd":"', b'"price_usd":"-')
        values[at] = chance.choice([values[max(0, at - 1)], b"{", negative])
    ticks = in_kafka(values)
    reports = [
        compact({**GAP, "source": "a", "symbol": "X", "first_missing": first, "last_missing": first + 3, "reason": "r"})
        for first in (20, 90, 400)
    ]
    ticks[100:100] = in_kafka(reports, "gaps")
    return ticks


def folder(settings: Settings) -> Path:
    return Path(SILVER_TICKS.path(settings.lake_root).removeprefix("file:"))


def log(settings: Settings) -> Path:
    return folder(settings) / "_delta_log"


def snapshots(settings: Settings) -> list[Path]:
    return sorted(path for path in folder(settings).glob("_seen/*") if not path.name.startswith("."))


def known(of: State) -> object:
    """All that matters, comparable."""
    kept = json.loads(json.dumps(of.to_json()))
    for name in ("instruments", "rejected", "producers", "minutes", "sequences"):
        kept["seen"][name].sort()
    kept["early"]["waiting"].sort(key=str)
    return kept


def streamed(settings: Settings, parts: Sequence[list[Record]], first: int = 0) -> Lakehouse:
    """Micro-batches, after which the driver dies without a word."""
    lakehouse = opened(settings)
    for batch, part in enumerate(parts, first):
        write_one(lakehouse, part, batch)
    lakehouse.writer.close()
    return lakehouse


@pytest.mark.parametrize("every", [None, 10**9, 1, 4], ids=["none", "of starts", "of each commit", "of some"])
def test_a_driver_knows_what_the_one_before_it_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    """Without snapshots, with one of the newest commit, and with one and some commits after it."""
    monkeypatch.setattr("lake.silver.state.SNAPSHOT_EVERY", every or 10**9)
    settings = lake_in(tmp_path)
    everything = records()
    parts = pieces(everything, random.Random(1), 12)
    for start in range(0, 12, 3):
        before = streamed(settings, parts[start : start + 3], start).state
        if every is None:
            for snapshot in snapshots(settings):
                snapshot.unlink()
        after = opened(settings).state
        assert known(after) == known(before)
        assert after.last == before.last, "what the newest micro-batch added, for its replay"
    assert 1 <= len(snapshots(settings)) <= state.KEPT_SNAPSHOTS
    opened(settings).finish()
    assert wrong_gaps(settings.lake_root, lake_of(everything)) == []


def test_the_snapshot_of_the_end_needs_no_commit_before_it(tmp_path: Path) -> None:
    """Commits that a checkpoint of the log has made needless are deleted after a day."""
    settings = lake_in(tmp_path)
    everything = records()
    parts = pieces(everything, random.Random(2), 6)
    lakehouse = streamed(settings, parts[:3])
    lakehouse.finish()
    version = int(snapshots(settings)[-1].name.split(".")[0])
    before = known(lakehouse.state)
    streamed(settings, parts[3:5], 3)
    TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).checkpoint()
    for number in range(version + 1):
        (log(settings) / f"{number:020d}.json").unlink()
    after = opened(settings)
    assert known(after.state) != before
    write_one(after, parts[5], 5)
    after.finish()
    expected = lake_of(everything)
    assert wrong_rows(settings.lake_root, expected) == {}
    assert wrong_gaps(settings.lake_root, expected) == []


def test_a_snapshot_that_is_half_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that dies leaves a draft beside it."""
    settings = lake_in(tmp_path)
    lakehouse = streamed(settings, pieces(records(), random.Random(1), 3))
    lakehouse.finish()
    real = LocalDisk.replace

    def dies(disk: LocalDisk, url: str, content: bytes) -> None:
        real(disk, url, content)
        monkeypatch.undo()
        path = Path(url.removeprefix("file:"))
        path.rename(path.with_name(f".{path.name}.0815.tmp"))
        raise OSError("the driver dies")

    monkeypatch.setattr(LocalDisk, "replace", dies)
    with pytest.raises(OSError, match="dies"):
        opened(settings)
    assert any(path.name.endswith(".tmp") for path in folder(settings).glob("_seen/*"))
    assert known(opened(settings).state) == known(lakehouse.state)


def test_a_log_that_has_lost_commits_is_said_so(tmp_path: Path) -> None:
    """Better no stream than one that takes old ticks for new ones."""
    settings = lake_in(tmp_path)
    streamed(settings, pieces(records(), random.Random(1), 4))
    lost = log(settings) / "00000000000000000003.json"
    TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).checkpoint()
    lost.unlink()
    with pytest.raises(StateLost, match=rf"silver/ticks: .*lacks .*{lost.name}.*--rebuild"):
        opened(settings)


def test_the_first_version_of_a_lake_has_the_whole_state_in_its_newest_commit(tmp_path: Path) -> None:
    """Its older commits may be gone, and it has no snapshot: the next writer goes on from what stands there."""
    settings = lake_in(tmp_path)
    everything = records()
    parts = pieces(everything, random.Random(3), 6)
    before = streamed(settings, parts[:3]).state
    # The newest commit, as that version wrote it: reports that wait as a list.
    newest = TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).newest()
    path = log(settings) / f"{newest:020d}.json"
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    metadata = json.loads(actions[0]["commitInfo"]["userMetadata"])
    del metadata["delta"]
    whole = before.to_json()
    metadata |= {"seen": whole["seen"], "at": whole["at"], "early": whole["early"]["waiting"]}
    actions[0]["commitInfo"]["userMetadata"] = json.dumps(metadata)
    for snapshot in snapshots(settings):
        snapshot.unlink()
    path.write_text("".join(json.dumps(action) + "\n" for action in actions))
    TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).checkpoint()
    for number in range(newest):
        (log(settings) / f"{number:020d}.json").unlink()
    after = opened(settings).state
    assert after.seen == before.seen
    assert list(after.early) == list(before.early)
    streamed(settings, parts[3:], 3)
    opened(settings).finish()
    assert wrong_gaps(settings.lake_root, lake_of(everything)) == []


def test_an_emptied_lake_has_seen_nothing(tmp_path: Path) -> None:
    """Whatever snapshot is left of before."""
    settings = lake_in(tmp_path)
    lakehouse = streamed(settings, pieces(records(), random.Random(1), 3))
    lakehouse.finish()
    lakehouse.writer.empty(SILVER_TICKS)
    assert known(state.restore(lakehouse.writer)) == known(State())
    assert known(opened(settings).state) == known(State())


def test_a_micro_batch_begins_after_the_one_before_it(tmp_path: Path) -> None:
    """Also where the clock was put back meanwhile: rows that are newer are known by their time."""
    settings = lake_in(tmp_path)
    lakehouse = streamed(settings, [in_kafka(market(random.Random(1))[:20])])
    ahead = lakehouse.state.began + timedelta(days=1)
    lakehouse.state.began = ahead
    write_one(lakehouse, in_kafka(market(random.Random(1))[20:40], first=20), 1)
    assert opened(settings).state.began == ahead + timedelta(microseconds=1)


@pytest.mark.parametrize("content", [b"", b"cut"], ids=["empty", "cut"])
def test_a_damaged_snapshot_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """After a power cut: an older one, or none, and the commits since then say the same."""
    monkeypatch.setattr("lake.silver.state.SNAPSHOT_EVERY", 2)
    settings = lake_in(tmp_path)
    before = known(streamed(settings, pieces(records(), random.Random(1), 6)).state)
    for damaged in (1, 2):
        for path in snapshots(settings)[-damaged:]:
            path.write_bytes(content or path.read_bytes()[:40])
        assert known(opened(settings).state) == before
        assert "_seen/" in caplog.text
        assert "is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b'{"commitInfo":{"times'], ids=["empty", "cut"])
def test_a_damaged_commit_is_named(tmp_path: Path, content: bytes) -> None:
    settings = lake_in(tmp_path)
    streamed(settings, pieces(records(), random.Random(1), 3))
    newest = max(log(settings).glob("*.json"))
    newest.write_bytes(content)
    with pytest.raises(LogDamaged, match=f"{newest.name} is empty or cut short.*--rebuild"):
        opened(settings)


@pytest.mark.parametrize("cut", [0, 30])
def test_a_damaged_checkpoint_of_the_log_is_named_and_a_damaged_pointer_to_it_does_not_matter(
    tmp_path: Path, cut: int
) -> None:
    settings = lake_in(tmp_path)
    before = known(streamed(settings, pieces(records(), random.Random(1), 3)).state)
    TableLog(LocalDisk(), SILVER_TICKS.path(settings.lake_root)).checkpoint()
    pointer = log(settings) / "_last_checkpoint"
    pointer.write_bytes(pointer.read_bytes()[:cut])
    assert known(opened(settings).state) == before
    [checkpoint] = log(settings).glob("*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:cut])
    with pytest.raises(LogDamaged, match=r"the checkpoint of version 4 in .*silver/ticks/_delta_log is empty or cut"):
        opened(settings)
