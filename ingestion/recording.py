"""Raw frames with the times of their receipt, as `python -m simulator --replay` plays them.

FILE-FEED-TIME.gz has a line `receive_ns FRAME` for each frame. A line break within a frame, which in JSON can only
stand between tokens, is written as a space; a byte that is not UTF-8 as \\xNN.

A recording is an extra: when its disk is full or fails, it stops with a message, and the ticks go on.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
# Frames that wait for the disk; above this they are left out, and counted: a recording never holds up the ticks.
WAITING_BYTES = 32 << 20
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")


class Recording:
    """Takes frames at once, and writes them in a thread."""

    def __init__(self, file: Path, rotate_bytes: int) -> None:
        """Raises OSError if the file's folder cannot be made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._rotate_bytes = rotate_bytes
        self._waiting: dict[str, bytearray] = {}
        self._open: dict[str, tuple[gzip.GzipFile, int]] = {}
        # At the end the rest may come while a thread still writes what came before.
        self._one_at_a_time = threading.Lock()
        self.left_out = 0
        self.failure: str | None = None
        """Why it has stopped."""

    def take(self, feed: str, received_ns: int, frame: bytes) -> None:
        waiting = self._waiting.setdefault(feed, bytearray())
        if self.failure is not None or len(waiting) > WAITING_BYTES:
            self.left_out += 1
            return
        waiting += b"%d %b\n" % (received_ns, _text(frame))

    async def run(self) -> None:
        """Write until cancelled, then write the rest."""
        try:
            while True:
                await asyncio.sleep(FLUSH_SECONDS)
                await self._flush()
        finally:
            for feed, lines in self._waiting.items():
                if lines:
                    self._write(feed, lines)
            for file, _ in self._open.values():
                self._close(file)
            if self.left_out:
                log.warning("the recording lacks %d frames: the disk did not take them", self.left_out)

    async def _flush(self) -> None:
        for feed in tuple(self._waiting):
            lines, self._waiting[feed] = self._waiting[feed], bytearray()
            if lines:
                await asyncio.shield(asyncio.create_task(asyncio.to_thread(self._write, feed, lines)))

    def _write(self, feed: str, lines: bytearray) -> None:
        with self._one_at_a_time:
            if self.failure is None:
                try:
                    self._write_lines(feed, lines)
                    return
                except OSError as error:
                    self.failure = f"the recording {self._file} has stopped: {error}"
                    log.error("%s; ticks go on", self.failure)
            self.left_out += lines.count(b"\n")

    def _write_lines(self, feed: str, lines: bytearray) -> None:
        if feed not in self._open:
            self._open[feed] = self._begin(feed), 0
        file, size = self._open[feed]
        file.write(lines)
        # Readable so far, should we be killed.
        file.flush()
        size += len(lines)
        if size >= self._rotate_bytes:
            del self._open[feed]
            file.close()
        else:
            self._open[feed] = file, size

    def _close(self, file: gzip.GzipFile) -> None:
        try:
            file.close()
        except OSError as error:
            if self.failure is None:
                self.failure = f"the recording {file.name} has no end: {error}"
                log.error("%s", self.failure)

    def _begin(self, feed: str) -> gzip.GzipFile:
        moment = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment // 10**9)) + f".{moment % 10**9 // 1000:06d}Z"
        stem = self._file.name.removesuffix(".gz")
        path = self._file.parent / f"{stem}-{feed}-{stamp}.gz"
        log.info("recording %s's frames in %s", feed, path)
        return gzip.open(path, "xb", compresslevel=3)


def _text(frame: bytes) -> bytes:
    if b"\n" in frame or b"\r" in frame:
        frame = frame.translate(_LINE_BREAKS)
    try:
        frame.decode()
    except UnicodeDecodeError:
        return frame.decode("utf-8", "backslashreplace").encode()
    return frame
