"""Between the socket and Kafka: a log on disk. What is durable here is acknowledged, and is not lost.

    FOLDER/00000000000000000000.log   a segment, named by the position of its first record
    FOLDER/delivered                  up to where Kafka has acknowledged
    FOLDER/lock                       held by the one process that writes here

Position n is the end of the log's nth record. The producer's name, and how many ticks it has numbered, stand in the
records and in the head of each segment, so that they are exactly as durable as the ticks.

A group of records is written and synced at most every `fsync_ms`; one that a crash tore is recognised by its checksum,
was acknowledged to nobody, and is cut off. Segments behind `delivered` are deleted. That file is not synced: after a
power cut it may name an older position, and records are sent twice, with the same identity.

Why not SQLite (WAL, synchronous=FULL)? It appends durably at 4 to 6 us of processor a tick where this takes 1.4 to 4,
writes five times as many bytes, and on a full disk it cannot even delete. Removing a file always works.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import struct
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from crc32c import crc32c

from ingestion.errors import SpoolDamaged, SpoolFailed, SpoolInUse
from ingestion.segment import HEAD_BYTES, Head, Record, Segment, encode, new_segment, parse, read_head, write_durably

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 << 20
# What may wait in memory for the disk before `room` holds the reader of the socket.
BUFFER_BYTES = 2 << 20
READ_BYTES = 64 << 10
# Times of groups that are remembered; of more, every other one is forgotten.
MARKS = 4096
RETRY_SECONDS = 0.5
SAY_AGAIN_SECONDS = 10.0

# Position, and its checksum.
_CURSOR = struct.Struct("<QI")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Spool:
    """An append-only log with one writer and one reader, both in the same event loop. `run` makes it durable."""

    def __init__(self, folder: Path, fsync_ms: float, max_bytes: int) -> None:
        """Open it, or begin one. Raises SpoolInUse, SpoolDamaged, or OSError."""
        self.folder = folder
        self._fsync_seconds = fsync_ms / 1e3
        self._max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max(max_bytes // 8, 1))
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise SpoolInUse(f"another ingester uses the spool {folder}; give this one its own --spool-dir") from None
        self._segments: deque[Segment] = deque()
        self._buffer = bytearray()
        self._writing = 0
        self._stored = 0
        self._file = -1
        self._cursor = -1
        self._read_file = -1
        self._changed = asyncio.Event()
        self._dirty = asyncio.Event()
        self._closing = False
        self._retained: int | None = None
        self._since = 0.0
        """When the oldest record in the buffer was taken."""
        # (position, when the oldest of its group was taken), of what Kafka has not acknowledged.
        self._marks: deque[tuple[int, float]] = deque()
        self.lag_seconds = 0.0
        """From its receipt to Kafka's acknowledgement, of the oldest in the group that was acknowledged last."""
        self.disk_is_full = False
        self.producer = ""
        self.sequence = 0
        self.position = 0
        """What `read` has given out."""
        try:
            self._recover()
        except BaseException:
            self._let_go()
            raise

    # What is in it

    @property
    def size(self) -> int:
        """Bytes on disk and on their way there."""
        return self._stored + len(self._buffer) + self._writing

    @property
    def undelivered(self) -> int:
        """Records that Kafka has not acknowledged."""
        return self.end - self.delivered

    @property
    def age_seconds(self) -> float:
        """For how long the oldest record that Kafka has not acknowledged has been here, or been here this time."""
        oldest = next(iter(self._marks), None)
        return 0.0 if oldest is None else time.monotonic() - oldest[1]

    @property
    def is_full(self) -> bool:
        return self.disk_is_full or self.size >= self._max_bytes

    # Opening

    def _recover(self) -> None:
        paths = sorted(self.folder.glob("*.log"))
        heads = [read_head(path) for path in paths]
        if paths and heads[-1] is None:
            log.warning("spool: %s was never finished, and held nothing: removed", paths[-1])
            paths.pop().unlink()
            heads.pop()
        for path, head in zip(paths, heads, strict=True):
            if head is None:
                raise SpoolDamaged(f"the head of {path} is damaged; move it away to go on without its records")
            if self._segments:
                self._segments[-1].end = head.base
            self._segments.append(Segment(path, head.base, head.base, path.stat().st_size))
        self._cursor = os.open(self.folder / "delivered", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        noted = os.pread(self._cursor, _CURSOR.size, 0)
        self.delivered = self._segments[0].base if self._segments else 0
        if len(noted) == _CURSOR.size and crc32c(noted[:8]) == _CURSOR.unpack(noted)[1]:
            self.delivered = max(self.delivered, _CURSOR.unpack(noted)[0])
        self.end = self.durable_end = self.delivered
        head = heads[-1] if heads else None
        if head is None:
            self._begin_anew()
        else:
            self._open_last(head)
        self._stored = sum(segment.size for segment in self._segments)
        self._durable_sequence = self.sequence
        self.rewind()
        if self.undelivered:
            self._marks.append((self.end, time.monotonic()))
            log.info("spool: %d messages of an earlier run are still to be sent", self.undelivered)

    def _open_last(self, head: Head) -> None:
        """Find the end of the last segment, and cut off what a crash tore."""
        last = self._segments[-1]
        self._file = os.open(last.path, os.O_RDWR | os.O_CLOEXEC)
        self.producer, self.sequence = head.producer, head.sequence
        offset, position = HEAD_BYTES, head.base
        while chunk := os.pread(self._file, SEGMENT_BYTES, offset):
            records, length, sequence = parse(chunk)
            if not length:
                break
            offset, position, self.sequence = offset + length, position + len(records), sequence
        torn = last.size - offset
        last.end, last.size = position, offset
        if torn:
            log.warning("spool: %d bytes at the end of %s were never acknowledged: cut off", torn, last.path)
            os.ftruncate(self._file, offset)
        # A killed process may have written what it did not come to sync.
        os.fsync(self._file)
        if position < self.delivered:
            log.error("spool: %s has lost %d records that Kafka has", last.path, self.delivered - position)
            self._begin_anew()
        elif head.inode != os.fstat(self._file).st_ino:
            log.warning("spool: %s is a copy; from here on the ticks have a producer of their own", self.folder)
            self.end = self.durable_end = position
            self._begin_anew()
        else:
            self.end = self.durable_end = position

    def _begin_anew(self) -> None:
        """A new identity: numbers that an earlier one may have given are never given again."""
        self.producer, self.sequence = uuid.uuid4().hex[:16], 0
        if self._segments and self._segments[-1].base == self.end:
            # It is empty, and its name is the new one's.
            self._segments.pop()
        self._add(self._new_segment(self.end, 0))

    def _new_segment(self, base: int, sequence: int) -> tuple[int, Segment]:
        return new_segment(self.folder, Head(base, sequence, self.producer))

    def _add(self, opened: tuple[int, Segment]) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, segment = opened
        self._segments.append(segment)
        self._stored += segment.size

    # Writing

    def append(self, topic: str, key: bytes, value: bytes, *, numbered: bool = False) -> int:
        """Take a record; its position. A numbered one is the producer's next tick, number `sequence` from here on."""
        if numbered:
            self.sequence += 1
        if not self._buffer:
            self._since = time.monotonic()
        self._buffer += encode(self.sequence, topic, key, value)
        self.end += 1
        self._dirty.set()
        return self.end

    async def durable(self, position: int) -> None:
        """Wait until the records up to `position` are acknowledged."""
        while self.durable_end < position:
            await self._changed.wait()

    async def room(self) -> None:
        """Wait while the spool is full, or the disk slower than the venue."""
        if len(self._buffer) < BUFFER_BYTES and not self.is_full:
            return
        loop = asyncio.get_running_loop()
        began, logged_at = loop.time(), 0.0
        while len(self._buffer) >= BUFFER_BYTES or self.is_full:
            if self.is_full and (not logged_at or loop.time() - logged_at > SAY_AGAIN_SECONDS):
                logged_at = loop.time()
                why = "its disk is full" if self.disk_is_full else f"it may hold {self._max_bytes} bytes"
                log.warning("the spool is full: %s; reading from the venue pauses", why)
            await asyncio.sleep(0.01)
        if logged_at:
            log.warning("the spool has room again after %.1f s; reading goes on", loop.time() - began)

    async def run(self) -> None:
        """Make durable what is appended, until `close`. Raises SpoolFailed if the disk fails otherwise than full."""
        loop = asyncio.get_running_loop()
        while self._buffer or not self._closing:
            await self._dirty.wait()
            self._dirty.clear()
            began = loop.time()
            if self._buffer:
                await self._commit()
            if not self._closing:
                await asyncio.sleep(max(0.0, self._fsync_seconds - (loop.time() - began)))

    async def _commit(self) -> None:
        group, since, self._buffer = self._buffer, self._since, bytearray()
        position, sequence = self.end, self.sequence
        self._writing = len(group)
        last = self._segments[-1]
        is_logged = False
        while True:
            try:
                await asyncio.to_thread(write_durably, self._file, group, last.size)
                last.size, last.end, self._writing = last.size + len(group), position, 0
                self._stored += len(group)
                self._signal(position, since)
                break
            except OSError as error:
                is_logged = await self._wait_for_disk(error, is_logged)
                last = await self._make_room(last)
        self._durable_sequence = sequence
        while last.size >= self._segment_bytes:
            try:
                self._add(await asyncio.to_thread(self._new_segment, position, sequence))
                break
            except OSError as error:
                is_logged = await self._wait_for_disk(error, is_logged)
        if is_logged:
            self.disk_is_full = False
            log.warning("spool: the disk has room again")
        self._forget_segments()

    async def _make_room(self, last: Segment) -> Segment:
        """On a full disk: once Kafka has all of the last segment, begin another, so that this one can go."""
        if last.base < last.end <= self._kept_from:
            # What was written of the group in hand is room for the other's head.
            os.ftruncate(self._file, last.size)
            try:
                self._add(await asyncio.to_thread(self._new_segment, last.end, self._durable_sequence))
            except OSError as error:
                log.debug("spool: no room for another segment yet: %s", error)
            self._forget_segments()
        return self._segments[-1]

    async def _wait_for_disk(self, error: OSError, is_logged: bool) -> bool:
        if error.errno not in _FULL:
            raise SpoolFailed(f"the spool {self.folder} cannot be written: {error}") from error
        if not is_logged:
            log.error("spool: no room on the disk of %s; trying until there is", self.folder)
        self.disk_is_full = True
        await asyncio.sleep(RETRY_SECONDS)
        return True

    def _signal(self, position: int, since: float) -> None:
        self.durable_end = position
        self._marks.append((position, since))
        if len(self._marks) > MARKS:
            self._marks = deque(list(self._marks)[::2])
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Let `run` end as soon as everything taken is durable."""
        self._closing = True
        self._dirty.set()

    # Reading

    def rewind(self) -> None:
        """Read again from the first record that Kafka has not acknowledged."""
        self.position = self.delivered
        self._open(next(s for s in self._segments if self.position < s.end or s is self._segments[-1]))
        skip = self.position - self._read_segment.base
        while skip > 0 and self._offset < self._read_segment.size:
            records, length, _ = self._read_chunk(skip)
            self._offset += length
            skip -= len(records)

    def read(self) -> list[Record]:
        """The next durable records, some 64 KiB of them; none if all were read. Raises SpoolDamaged."""
        while self._offset >= self._read_segment.size and self._read_segment is not self._segments[-1]:
            after = self._segments.index(self._read_segment) + 1
            if self.position != self._segments[after].base:
                missing = self._segments[after].base - self.position
                log.error("spool: %d records before %s are lost", missing, self._segments[after].path)
                self.position += missing
            self._open(self._segments[after])
        if self._offset >= self._read_segment.size:
            return []
        records, length, _ = self._read_chunk()
        self._offset += length
        self.position += len(records)
        return records

    async def more(self, seconds: float | None = None) -> None:
        """Wait until there is something to read, at most so long."""
        changed = self._changed
        if self.position >= self.durable_end:
            try:
                await asyncio.wait_for(changed.wait(), seconds)
            except TimeoutError:
                return

    def _open(self, segment: Segment) -> None:
        if self._read_file >= 0:
            os.close(self._read_file)
        self._read_file = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        self._read_segment = segment
        self._offset = HEAD_BYTES

    def _read_chunk(self, at_most: int | None = None) -> tuple[list[Record], int, int]:
        left = self._read_segment.size - self._offset
        for size in (min(left, READ_BYTES), left):
            records = parse(os.pread(self._read_file, size, self._offset), at_most)
            if records[1]:
                return records
        raise SpoolDamaged(
            f"{self._read_segment.path} is damaged at byte {self._offset}; move it away to go on without its records"
        )

    def records(self, position: int) -> Iterator[Record]:
        """What is durable after `position`, as far back as it is still here."""
        for segment in tuple(self._segments):
            if segment.end <= position:
                continue
            records, _, _ = parse(segment.path.read_bytes()[HEAD_BYTES : segment.size])
            yield from records[max(0, position - segment.base) :]

    # Forgetting

    def forget(self, position: int) -> None:
        """Kafka has everything up to `position`."""
        if position == self.delivered:
            return
        self.delivered = position
        while self._marks and self._marks[0][0] <= position:
            self.lag_seconds = time.monotonic() - self._marks.popleft()[1]
        noted = position.to_bytes(8, "little")
        try:
            os.pwrite(self._cursor, noted + crc32c(noted).to_bytes(4, "little"), 0)
        except OSError as error:
            # Costs repeats after the next start, and no tick.
            log.warning("spool: cannot note what is delivered: %s", error)
        self._forget_segments()

    def retain(self, position: int) -> None:
        """Keep what comes after `position`, delivered or not, until told of a higher one."""
        self._retained = position

    @property
    def _kept_from(self) -> int:
        """Nobody needs what comes before this position."""
        return self.delivered if self._retained is None else min(self.delivered, self._retained)

    def _forget_segments(self) -> None:
        while len(self._segments) > 1 and self._segments[0].end <= self._kept_from:
            if self._segments[0] is self._read_segment:
                if self.position < self._read_segment.end:
                    return
                self._open(self._segments[1])
            segment = self._segments.popleft()
            segment.path.unlink()
            self._stored -= segment.size

    def close(self) -> None:
        """Let go of the files. What `run` has not made durable is lost."""
        self._let_go()

    def _let_go(self) -> None:
        for file in (self._file, self._read_file, self._cursor, self._lock):
            if file >= 0:
                os.close(file)
        self._file = self._read_file = self._cursor = self._lock = -1
