"""Data files by Python alone: what was written is there, in whole and in part, on HDFS and on the local disk."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import hdfs
import pytest

from conf.settings import Settings
from lake.store import Store, UnknownStore


def exercise(store: Store, root: str) -> None:
    content = random.Random(1).randbytes(3_000_000)
    url = f"{root}/database/table/day=2024-08-09/part.parquet"
    assert not store.has(url)
    store.write(url, b"half of it")
    store.write(url, content)
    assert store.has(url)
    assert store.read(url) == content
    assert store.read(url, 2_999_990, 100) == content[-10:]
    with store.open(url, len(content)) as file:
        for offset, length in ((2_999_992, 8), (0, 5), (1_500_000, 1_200_000), (3_000_000, 1)):
            file.seek(offset)
            assert file.read(length) == content[offset : offset + length]
        assert file.seek(-4, io.SEEK_END) == 2_999_996
        assert file.read() == content[-4:]
    store.delete(url)
    store.delete(url)
    assert not store.has(url)


def test_files_on_the_local_disk(tmp_path: Path) -> None:
    exercise(Store.of(f"file:{tmp_path}", ""), f"file:{tmp_path}")


@pytest.mark.services
def test_files_on_hdfs(running: Callable[..., Settings]) -> None:
    suite = running("hdfs")
    exercise(Store.of(suite.lake_root, str(suite.webhdfs_url)), f"{suite.lake_root}-store")


@pytest.mark.services
def test_what_hdfs_forbids_is_not_tried_again(
    running: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be forbidden for a minute, and then be an error all the same."""
    suite = running("hdfs")
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    monkeypatch.setenv("HADOOP_USER_NAME", "nobody-in-particular")
    stranger = Store.of(suite.lake_root, str(suite.webhdfs_url))
    assert stranger.user == "nobody-in-particular"
    with pytest.raises(hdfs.HdfsError, match="Permission denied"):
        stranger.write(f"{suite.lake_root.rpartition('/')[0]}/not-yours", b"")
    with pytest.raises(hdfs.HdfsError, match="not found"):
        stranger.read(f"{suite.lake_root}-store/none")
    assert waits == []


def test_what_does_not_answer_is_tried_again_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    ticks = iter(range(0, 1_000, 7))
    monkeypatch.setattr("tenacity.time.monotonic", lambda: next(ticks))
    with pytest.raises(OSError, match="refused"):
        Store.of("hdfs://127.0.0.1:1/lake", "http://127.0.0.1:1").write("hdfs://127.0.0.1:1/lake/file", b"")
    assert len(waits) > 2
    for ask in (Store.read, Store.delete):
        waits.clear()
        with pytest.raises(OSError, match="refused"):
            ask(Store.of("hdfs://127.0.0.1:1/lake", "http://127.0.0.1:1"), "hdfs://127.0.0.1:1/lake/file")
        assert len(waits) > 2


def test_other_stores_are_refused_by_name() -> None:
    with pytest.raises(UnknownStore, match="s3a://bucket/lake"):
        Store.of("s3a://bucket/lake", "")
