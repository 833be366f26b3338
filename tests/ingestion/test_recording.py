"""A recording is an extra: whatever becomes of it, the ticks go on."""

from __future__ import annotations

import asyncio
import gzip
import logging
from pathlib import Path

import pytest

from conf.settings import Settings
from ingestion.operation import fetch_status
from ingestion.recording import Recording
from tests.programs import ingestion, simulator, wait_until

FRAME = b'{"stream":"btcusdt@trade"}'


def test_frames_are_read_again_line_by_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        recording = Recording(tmp_path / "day.gz", 1 << 20)
        running = asyncio.create_task(recording.run())
        for number in range(3):
            recording.take("binance", number, FRAME)
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(scenario())
    (file,) = tmp_path.glob("day-binance-*.gz")
    assert gzip.decompress(file.read_bytes()).splitlines() == [b"%d %b" % (number, FRAME) for number in range(3)]


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_disk_that_fails_stops_the_recording_with_one_message_and_raises_nothing(
    tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is always full stands in for the disk."""
    monkeypatch.setattr("ingestion.recording.FLUSH_SECONDS", 0.05)
    caplog.set_level(logging.ERROR)

    async def scenario() -> Recording:
        recording = Recording(tmp_path / "day.gz", 1 << 20)
        if when == "at the start":
            # A file where the recordings' folder was.
            recording._file = tmp_path / "no" / "day.gz"
            (tmp_path / "no").write_text("")
        else:
            full = gzip.open("/dev/full", "wb", compresslevel=0)  # noqa: SIM115
            recording._open["binance"] = full, 0
        running = asyncio.create_task(recording.run())
        async with asyncio.timeout(60):
            while recording.failure is None:
                recording.take("binance", 1, FRAME * 9999)
                await asyncio.sleep(0.01)
        for _ in range(20):
            recording.take("binance", 1, FRAME)
            await asyncio.sleep(0.01)
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        return recording

    recording = asyncio.run(scenario())
    assert recording.left_out >= 20
    assert len([one for one in caplog.records if "has stopped" in one.getMessage()]) == 1


def test_a_recording_that_fails_leaves_the_ingester_going_and_is_told_in_its_status(
    suite: Settings, tmp_path: Path
) -> None:
    """Its folder vanishes before the second file."""
    nowhere = suite.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})
    folder = tmp_path / "recordings"
    arguments = ("--stop-seconds", "0", "--record", str(folder / "day.gz"), "--record-bytes", "20000")
    with simulator(tmp_path, "--rate", "500") as (_, url), ingestion(tmp_path, nowhere, url, *arguments) as program:
        wait_until(lambda: any(folder.glob("*.gz")), "it records")
        for file in folder.glob("*.gz"):
            file.unlink()
        folder.rmdir()
        wait_until(lambda: program.logged("has stopped"), "it says so")
        spool = tmp_path / "spool"
        before = (fetch_status(spool) or {})["received"]
        wait_until(lambda: (fetch_status(spool) or {})["received"] > before + 500, "ticks go on")
        assert "the recording" in str((fetch_status(spool) or {})["notes"])
        assert program.stop() == 0


def test_a_recording_that_cannot_begin_is_a_wrong_setting(suite: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ingestion(
        tmp_path, suite, "ws://127.0.0.1:1/stream", "--record", str(tmp_path / "file" / "day.gz")
    ) as program:
        assert program.process.wait(60) == 2
        assert "record = " in program.log.read_text()
