"""Promise 1: what the spool has acknowledged comes out of it, in order and with its identity, whatever was killed."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import ingestion.spool
from ingestion.errors import SpoolDamaged, SpoolInUse
from ingestion.segment import Record, write_durably
from ingestion.spool import Spool

KEY = b"binance:BTCUSDT"


def value(number: int) -> bytes:
    return b"tick %d " % number + b"x" * 300


async def fill(spool: Spool, first: int, last: int) -> None:
    """Make ticks `first` to `last` durable, in groups."""
    writing = asyncio.create_task(spool.run())
    for number in range(first, last + 1):
        assert spool.append("ticks", KEY, value(number), numbered=True) == number
        if number % 50 == 0:
            await spool.durable(number)
    spool.stop()
    await writing


def with_spool(folder: Path, scenario: Callable[[Spool], Awaitable[None]], max_bytes: int = 1 << 30) -> None:
    async def run() -> None:
        spool = Spool(folder, 0.0, max_bytes)
        try:
            await scenario(spool)
        finally:
            spool.close()

    asyncio.run(run())


def read_all(spool: Spool) -> list[Record]:
    found: list[Record] = []
    while records := spool.read():
        found.extend(records)
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def ticks(first: int, last: int) -> list[Record]:
    return [Record("ticks", KEY, value(number)) for number in range(first, last + 1)]


def test_what_was_appended_is_read_again_by_the_next_with_the_same_identity(tmp_path: Path) -> None:
    producers: list[str] = []

    async def first(spool: Spool) -> None:
        producers.append(spool.producer)
        await fill(spool, 1, 1000)
        assert read_all(spool) == ticks(1, 1000)
        spool.forget(400)

    async def second(spool: Spool) -> None:
        assert (spool.producer, spool.sequence, spool.undelivered) == (producers[0], 1000, 600)
        await fill(spool, 1001, 1500)
        assert read_all(spool) == ticks(401, 1500)
        spool.forget(1500)

    async def third(spool: Spool) -> None:
        assert (spool.producer, spool.sequence, spool.undelivered) == (producers[0], 1500, 0)
        assert read_all(spool) == []

    for scenario in (first, second, third):
        with_spool(tmp_path, scenario)


def test_segments_go_when_delivered_and_identity_stays(tmp_path: Path) -> None:
    async def scenario(spool: Spool) -> None:
        await fill(spool, 1, 5000)
        before = len(segments(tmp_path))
        assert before > 5
        size = spool.size
        assert read_all(spool) == ticks(1, 5000)
        spool.forget(4999)
        assert len(segments(tmp_path)) == 1
        assert spool.size < size / 5
        assert spool.size == sum(path.stat().st_size for path in segments(tmp_path))

    with_spool(tmp_path, scenario, max_bytes=1 << 20)

    async def again(spool: Spool) -> None:
        assert spool.sequence == 5000
        assert read_all(spool) == ticks(5000, 5000)

    with_spool(tmp_path, again)


def test_what_must_be_kept_for_another_is_kept_though_delivered(tmp_path: Path) -> None:
    async def scenario(spool: Spool) -> None:
        spool.retain(4000)
        await fill(spool, 1, 5000)
        read_all(spool)
        spool.forget(5000)
        assert list(spool.records(4000)) == ticks(4001, 5000)
        spool.retain(5000)
        spool.forget(5000)

    with_spool(tmp_path, scenario, max_bytes=1 << 20)


@pytest.mark.parametrize("torn", [1, 5, 20, 100, 349])
def test_a_torn_tail_is_cut_off_and_its_number_given_again(tmp_path: Path, torn: int) -> None:
    """A tick that nobody was told of may be torn; the one before it may not."""
    with_spool(tmp_path, lambda spool: fill(spool, 1, 100))
    (file,) = segments(tmp_path)
    os.truncate(file, file.stat().st_size - torn)

    async def scenario(spool: Spool) -> None:
        assert (spool.sequence, spool.end) == (99, 99)
        await fill(spool, 100, 120)
        assert read_all(spool) == ticks(1, 120)

    with_spool(tmp_path, scenario)


def test_a_tail_of_garbage_is_recognised_by_its_checksum(tmp_path: Path) -> None:
    with_spool(tmp_path, lambda spool: fill(spool, 1, 100))
    (file,) = segments(tmp_path)
    good = file.read_bytes()
    for garbage in (b"\0" * 4096, good[-347:-9] + b"123456789", os.urandom(1000)):
        file.write_bytes(good + garbage)

        async def scenario(spool: Spool) -> None:
            assert spool.end == 100
            assert read_all(spool) == ticks(1, 100)

        with_spool(tmp_path, scenario)
        assert file.read_bytes() == good


def test_damage_where_all_was_durable_is_named_and_not_skipped(tmp_path: Path) -> None:
    with_spool(tmp_path, lambda spool: fill(spool, 1, 5000), max_bytes=1 << 20)
    second = segments(tmp_path)[1]
    with second.open("r+b") as file:
        file.seek(20_000)
        file.write(b"?")

    async def damaged(spool: Spool) -> None:
        with pytest.raises(SpoolDamaged, match=second.name):
            read_all(spool)

    with_spool(tmp_path, damaged)
    second.unlink()

    async def moved_away(spool: Spool) -> None:
        found = read_all(spool)
        assert found[-1] == ticks(5000, 5000)[0]
        assert spool.position == 5000
        assert len(found) < 5000

    with_spool(tmp_path, moved_away)


def test_a_copy_is_another_producer_and_still_sends_what_it_holds(tmp_path: Path) -> None:
    producers: set[str] = set()

    async def scenario(spool: Spool) -> None:
        await fill(spool, 1, 100)
        producers.add(spool.producer)

    with_spool(tmp_path / "one", scenario)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")

    async def copy(spool: Spool) -> None:
        producers.add(spool.producer)
        assert (spool.sequence, spool.end) == (0, 100)
        await fill(spool, 101, 110)
        assert read_all(spool) == ticks(1, 110)

    with_spool(tmp_path / "copy", copy)
    assert len(producers) == 2


def test_a_copy_of_an_empty_spool_is_another_producer_too(tmp_path: Path) -> None:
    producers: set[str] = set()

    async def scenario(spool: Spool) -> None:
        producers.add(spool.producer)

    with_spool(tmp_path / "one", scenario)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for _ in range(2):
        with_spool(tmp_path / "copy", scenario)
    assert len(segments(tmp_path / "copy")) == 1
    assert len(producers) == 2


def test_records_that_kafka_has_and_the_disk_lost_make_a_new_producer(tmp_path: Path) -> None:
    """Their numbers must not be given to other ticks."""

    async def scenario(spool: Spool) -> None:
        await fill(spool, 1, 100)
        spool.forget(100)
        producers.add(spool.producer)

    producers: set[str] = set()
    with_spool(tmp_path, scenario)
    (file,) = segments(tmp_path)
    os.truncate(file, file.stat().st_size // 2)

    async def again(spool: Spool) -> None:
        assert spool.producer not in producers
        await fill(spool, 101, 110)
        assert read_all(spool) == ticks(101, 110)

    with_spool(tmp_path, again)


def test_two_processes_cannot_write_one_spool(tmp_path: Path) -> None:
    async def scenario(spool: Spool) -> None:
        with pytest.raises(SpoolInUse, match="--spool-dir"):
            Spool(tmp_path, 0.0, 1 << 30)

    with_spool(tmp_path, scenario)


def test_a_full_disk_is_waited_for_and_nothing_taken_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, on a real full disk, is in tests/faults."""
    monkeypatch.setattr(ingestion.spool, "RETRY_SECONDS", 0.01)
    write, failures = write_durably, 3

    def failing(file: int, data: bytes | bytearray, offset: int) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            os.pwrite(file, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data, offset)

    monkeypatch.setattr(ingestion.spool, "write_durably", failing)

    async def scenario(spool: Spool) -> None:
        await fill(spool, 1, 200)
        assert failures < 0
        assert not spool.is_full
        assert read_all(spool) == ticks(1, 200)

    with_spool(tmp_path, scenario)


def test_a_message_of_any_size_goes_through(tmp_path: Path) -> None:
    sizes = [0, 1, 65_500, 65_536, 400_000, 3, 200_000]

    async def scenario(spool: Spool) -> None:
        writing = asyncio.create_task(spool.run())
        for size in sizes:
            spool.append("rejects", b"", b"r" * size)
        await spool.durable(len(sizes))
        assert [len(record.value) for record in read_all(spool)] == sizes
        spool.rewind()
        spool.forget(4)
        spool.rewind()
        assert [len(record.value) for record in read_all(spool)] == sizes[4:]
        spool.stop()
        await writing
        assert spool.sequence == 0

    with_spool(tmp_path, scenario)
