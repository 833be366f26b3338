"""A connection to a venue, kept up: the thin shell around a feed that does its input and output."""

from __future__ import annotations

import asyncio
import logging
import random
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.frames import CloseCode

from ingestion.clock import Clock
from ingestion.errors import VenueRefused, delays, next_step
from ingestion.intake import Intake
from ingestion.ticks import Reject

log = logging.getLogger(__name__)

# A venue that says nothing for so long is asked whether it is still there, and left if it does not answer.
SILENCE_SECONDS = 20.0
PONG_SECONDS = 10.0
# A connection that lasted so long was a good one: the next delay starts from the shortest again.
GOOD_SECONDS = 30.0
# What a venue sent before it answered our goodbye is still read, for so long.
GOODBYE_SECONDS = 5.0
# Frames that wait for us before TCP pushes back on the venue.
FRAMES_WAITING = 256


class Connection:
    """Connects, hands every frame to the intake, and connects again until `stop`."""

    def __init__(self, intake: Intake, clock: Clock, max_frame_bytes: int) -> None:
        self._intake = intake
        self._feed = intake.feed
        self._clock = clock
        self._max_frame_bytes = max_frame_bytes
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._socket: ClientConnection | None = None
        self._goodbye: asyncio.Task[None] | None = None
        self._handling = False
        address = urlsplit(self._feed.url)
        # Without user and query, which may hold a key.
        self._venue = f"{self._feed.name} at {address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"

    def stop(self) -> None:
        """Say goodbye and read what the venue sent before it heard that; then `run` returns."""
        self._stopping.set()
        if self._socket is not None:
            self._goodbye = asyncio.ensure_future(self._socket.close())
        elif self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Returns after `stop`. Raises VenueRefused, or DeliveryFailed from the intake."""
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        waits = delays(random.Random())
        try:
            while not self._stopping.is_set():
                began = loop.time()
                least_wait = 0.0
                try:
                    await self._converse()
                except (OSError, WebSocketException) as error:
                    step = next_step(error)
                    if step.fatal:
                        raise VenueRefused(f"{self._venue}: {step.reason}") from error
                    if not self._stopping.is_set():
                        log.warning("%s: %s", self._venue, step.reason)
                    least_wait = step.wait
                if self._stopping.is_set():
                    break
                lasted = loop.time() - began
                if lasted > GOOD_SECONDS:
                    waits = delays(random.Random())
                await asyncio.sleep(max(least_wait, next(waits) - lasted))
        except asyncio.CancelledError:
            # `stop` cancels an attempt to connect, or the wait for the next: no frame is in hand then.
            if not self._stopping.is_set():
                raise

    async def _converse(self) -> None:
        """One connection, from the opening handshake to its end, which raises ConnectionClosed."""
        async with connect(
            self._feed.url,
            max_size=self._max_frame_bytes,
            max_queue=FRAMES_WAITING,
            compression=None,
            # `_watch` instead: while Kafka holds us up no pong is read, and the connection is good all the same.
            ping_interval=None,
            close_timeout=GOODBYE_SECONDS,
        ) as socket:
            self._socket = socket
            self._intake.counts.connections += 1
            log.info("%s: connected", self._venue)
            watch = asyncio.create_task(self._watch(socket))
            try:
                for text in self._feed.opening_frames():
                    await socket.send(text)
                while True:
                    frame = await socket.recv(decode=False)
                    received_ns = self._clock.now_ns()
                    self._handling = True
                    await self._intake.frame(frame, received_ns)
                    self._handling = False
            except ConnectionClosed as closed:
                if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                    reason = f"a frame larger than {self._max_frame_bytes} bytes"
                    self._intake.reject(Reject(self._clock.now_ns(), self._feed.name, reason, b""))
                raise
            finally:
                watch.cancel()
                self._handling = False
                self._socket = None

    async def _watch(self, socket: ClientConnection) -> None:
        """Cut a connection whose other end has gone without a word."""
        counts = self._intake.counts
        while True:
            frames = counts.frames
            await asyncio.sleep(SILENCE_SECONDS)
            if counts.frames != frames or self._handling:
                continue
            try:
                await asyncio.wait_for(await socket.ping(), PONG_SECONDS)
            except TimeoutError:
                log.warning("%s: silent for %d s", self._venue, SILENCE_SECONDS + PONG_SECONDS)
                socket.transport.abort()
                return
            except ConnectionClosed:
                return
