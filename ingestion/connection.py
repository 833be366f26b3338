"""A connection to a venue, kept up: the thin shell around a feed that does its input and output.

A connection that will not last - the venue cuts it after a day, or asks for a new one, or it is alive and brings no
tick - is replaced: the new one is up and speaks before the old one is closed, so that nothing is missed. What both
brought is the same trade twice, with one id. Where a venue gives no ids, the new one's frames wait until the old one
has ended, and what they repeat is left out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.frames import CloseCode

from ingestion.clock import Clock
from ingestion.errors import NextStep, VenueRefused, delays, next_step
from ingestion.gate import Gate
from ingestion.intake import Intake
from ingestion.liveness import STALE_SECONDS
from ingestion.ticks import Control, Reject

log = logging.getLogger(__name__)

# A silent venue is asked whether it is still there, and left if it does not answer in so long.
PONG_SECONDS = 5.0
# One that answers and yet says nothing for so many times its feed's silence is connected to anew.
SILENCES = 10
# A connection that brings no tick is replaced after twice the longest time that lately passed between two ticks, and
# each time that changes nothing after twice as long, up to this.
LONGEST_PATIENCE = 3600.0
# Before the venue's own cut, this much earlier at most, and this part of a connection's life.
LEAD_SECONDS, LEAD = 600.0, 0.1
# A new connection has so long to say something before the old one is closed.
OVERLAP_SECONDS = 10.0
# A connection that lasted so long was a good one: the next delay starts from the shortest again.
GOOD_SECONDS = 5.0
# A venue that takes longer to answer the opening handshake is asked again.
OPEN_SECONDS = 10.0
# What a venue sent before it answered our goodbye is still read, for so long.
GOODBYE_SECONDS = 5.0
# Between the first, the second and further connections to the same instruments.
STAGGER_SECONDS = 2.0
# A frame that waits so long for the spool has others behind it.
HELD_UP_SECONDS = 1.0
# Frames of a new connection that wait for the end of the old one.
MOST_HELD = 10_000
# Frames that wait for us before TCP pushes back on the venue.
FRAMES_WAITING = 256


@dataclass(slots=True)
class _Line:
    """One WebSocket. Times are the event loop's."""

    socket: ClientConnection
    opened: float
    heard: float
    answered: float
    ticked: float
    outbox: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """What we have to say on it."""
    spoke: asyncio.Event = field(default_factory=asyncio.Event)
    due: str = ""
    """Why it should be replaced."""
    held: list[tuple[bytes, int]] | None = None
    """Frames and times of their receipt, while the connection before is still read; None: they are taken at once."""
    is_paused: bool = False
    """We do not read: its silence is ours."""
    reading: asyncio.Task[None] = field(init=False)
    speaking: asyncio.Task[None] = field(init=False)


class Connection:
    """Connects, hands every frame to the intake, and connects again until `stop`."""

    def __init__(
        self,
        intake: Intake,
        clock: Clock,
        max_frame_bytes: int,
        *,
        record: Callable[[str, int, bytes], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        stale_seconds: float = STALE_SECONDS,
        gate: Gate | None = None,
        proxy: str | None = None,
        number: int = 0,
    ) -> None:
        """`record` is given every frame: its source, when it was received, and its bytes. `gate` is the venue's.

        `number` tells connections apart that bring the same instruments.
        """
        self._intake = intake
        self._feed = intake.feed
        self._clock = clock
        self._max_frame_bytes = max_frame_bytes
        self._record = record
        self._sleep = sleep
        self._stale_seconds = stale_seconds
        self._gate = Gate() if gate is None else gate
        self._proxy = proxy
        self._number = number
        self._is_opening = False
        self._due_when_open = ""
        self._forbidden = 0
        self._longest_gap = 0.0
        self._renewals = 0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._lines: list[_Line] = []
        self._goodbyes: set[asyncio.Task[None]] = set()
        self.heard = -math.inf
        """When the last frame came, by the event loop's clock."""
        self._ticked = -math.inf
        address = urlsplit(self._feed.url)
        # Without user and query, which may hold a key.
        self._venue = f"{self._feed.name} at {address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"

    @property
    def is_up(self) -> bool:
        return bool(self._lines)

    @property
    def is_held(self) -> bool:
        """Whether we do not read from it, because the spool has no room."""
        return any(line.is_paused for line in self._lines)

    def send(self, texts: Iterable[str]) -> None:
        """Say something on every connection that is up, as fast as the venue wants to hear it."""
        texts = tuple(texts)
        for line in self._lines:
            self._say(line, texts)

    @staticmethod
    def _say(line: _Line, texts: Iterable[str]) -> None:
        for text in texts:
            line.outbox.put_nowait(text)

    def renew(self, reason: str) -> None:
        """Replace the connection, where there is one, or is about to be one."""
        if self._is_opening:
            self._due_when_open = reason
        for line in self._lines:
            line.due = line.due or reason

    def stop(self) -> None:
        """Say goodbye and read what the venue sent before it heard that; then `run` returns."""
        self._stopping.set()
        for line in self._lines:
            self._say_goodbye(line)
        if not self._lines and self._task is not None:
            self._task.cancel()

    def _say_goodbye(self, line: _Line) -> None:
        goodbye = asyncio.create_task(line.socket.close())
        self._goodbyes.add(goodbye)
        goodbye.add_done_callback(self._goodbyes.discard)

    async def run(self) -> None:
        """Returns after `stop`. Raises VenueRefused."""
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        waits = delays(random.Random())
        try:
            # Connections that bring the same are not made, and do not end, at one time.
            await asyncio.sleep(self._number * STAGGER_SECONDS)
            while not self._stopping.is_set():
                began, opened = loop.time(), math.inf
                try:
                    line = await self._open()
                    opened = loop.time()
                    await self._keep(line)
                except (OSError, WebSocketException) as error:
                    step = self._step_after(error)
                    if step.fatal:
                        raise VenueRefused(f"{self._venue}: {step.reason}") from error
                    if not self._stopping.is_set():
                        log.warning("%s: %s", self._venue, step.reason)
                if self._stopping.is_set():
                    break
                self._intake.disconnected(self._clock.now_ns())
                if loop.time() - opened > GOOD_SECONDS:
                    waits = delays(random.Random())
                await self._sleep(max(self._gate.seconds(), next(waits) - (loop.time() - began)))
        except asyncio.CancelledError:
            # `stop` cancels an attempt to connect, or the wait for the next: no frame is in hand then.
            if not self._stopping.is_set():
                raise
        finally:
            for line in self._lines:
                line.reading.cancel()

    def _step_after(self, error: Exception) -> NextStep:
        """What to do after an attempt that failed; a wait that the venue asks for is every connection's."""
        step = next_step(error)
        self._gate.hold(step.wait)
        self._forbidden = self._forbidden + 1 if step.most_tries else 0
        if step.most_tries and self._forbidden >= step.most_tries:
            return NextStep(True, f"{step.reason}, {self._forbidden} times in a row")
        return step

    async def _open(self, held: list[tuple[bytes, int]] | None = None) -> _Line:
        """A connection that is up and read, into `held` first if it is given. Raises OSError or WebSocketException."""
        while (wait := self._gate.seconds()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
                raise ConnectionAbortedError("stopping")
        self._gate.enter()
        self._is_opening, self._due_when_open = True, ""
        try:
            socket = await connect(
                self._feed.url,
                max_size=self._max_frame_bytes,
                max_queue=FRAMES_WAITING,
                compression=None,
                # None: the environment's proxies have no say either.
                proxy=self._proxy,
                open_timeout=OPEN_SECONDS,
                # `_worn` instead: while the spool holds us up no pong is read, and the connection is good all the same.
                ping_interval=None,
                close_timeout=GOODBYE_SECONDS,
            )
        finally:
            self._is_opening = False
        now = asyncio.get_running_loop().time()
        line = _Line(socket, opened=now, heard=now, answered=now, ticked=now, held=held, due=self._due_when_open)
        self._forbidden = 0
        self._intake.counts.connections += 1
        log.info("%s: connected", self._venue)
        self._lines.append(line)
        self._say(line, self._feed.opening_frames())
        line.speaking = asyncio.create_task(self._speak(line))
        line.reading = asyncio.create_task(self._read(line))
        if self._stopping.is_set():
            self._say_goodbye(line)
        return line

    async def _speak(self, line: _Line) -> None:
        """Say what is to be said, one after the other with the venue's time in between; until the connection's end."""
        try:
            while True:
                await line.socket.send(await line.outbox.get())
                await asyncio.sleep(self._feed.request_seconds)
        except ConnectionClosed:
            return

    async def _read(self, line: _Line) -> None:
        """Until the connection's end, which raises ConnectionClosed."""
        loop = asyncio.get_running_loop()
        counts = self._intake.counts
        try:
            while True:
                frame = await line.socket.recv(decode=False)
                received_ns = self._clock.now_ns()
                if self._record is not None:
                    self._record(self._feed.name, received_ns, frame)
                controls: Sequence[Control] = ()
                before = counts.ticks + counts.repeats
                if line.held is None:
                    line.is_paused, began = True, loop.time()
                    controls = await self._intake.frame(frame, received_ns)
                    line.is_paused = False
                    if loop.time() - began >= HELD_UP_SECONDS:
                        # What came meanwhile waits to be read: that no tick was taken says nothing of the venue.
                        line.ticked = loop.time()
                elif len(line.held) < MOST_HELD:
                    line.held.append((frame, received_ns))
                else:
                    counts.ignore("a frame beyond those that can wait")
                self.heard = counts.heard = line.heard = loop.time()
                if counts.ticks + counts.repeats != before:
                    self._note_tick(line)
                line.spoke.set()
                for control in controls:
                    self._heed(control, line)
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                reason = f"a frame larger than {self._max_frame_bytes} bytes"
                self._intake.reject(Reject(self._clock.now_ns(), self._feed.name, reason, b""))
            raise
        finally:
            line.speaking.cancel()
            self._lines.remove(line)

    async def _release(self, line: _Line) -> None:
        """Take the frames that waited for the end of the connection before."""
        if line.held is None:
            return
        overlapping, line.held[:] = line.held[:], []
        controls = list(await self._intake.overlapping(overlapping))
        while line.held:
            # What came meanwhile.
            controls += await self._intake.frame(*line.held.pop(0))
        line.held = None
        for control in controls:
            self._heed(control, line)

    def _note_tick(self, line: _Line) -> None:
        if line.heard - line.opened > OVERLAP_SECONDS:
            # Not a venue's answer to a subscription, which may repeat what it told before.
            self._renewals = 0
            self._longest_gap = max(0.9 * self._longest_gap, line.heard - max(line.opened, self._ticked))
        line.ticked = self._ticked = line.heard

    @property
    def _patience(self) -> float:
        """A connection that brings no tick for so long is replaced."""
        return min(LONGEST_PATIENCE, max(self._stale_seconds, 2 * self._longest_gap) * 2.0 ** min(self._renewals, 20))

    def _heed(self, control: Control, line: _Line) -> None:
        if control.kind == "reconnect":
            line.due = f"the venue asks for it: {control.text}"
        elif control.kind == "refused":
            raise VenueRefused(f"{self._venue}: {control.text}")
        elif control.kind == "error":
            log.warning("%s: the venue says: %s", self._venue, control.text)
            if control.delay:
                asyncio.get_running_loop().call_later(control.delay, self._say, line, control.frames)
            else:
                self._say(line, control.frames)

    async def _keep(self, line: _Line) -> None:
        """Replace the connection as often as is due; raises ConnectionClosed at the end of the last."""
        waits = delays(random.Random())
        while True:
            worn = asyncio.create_task(self._worn(line))
            try:
                await asyncio.wait((line.reading, worn), return_when=asyncio.FIRST_COMPLETED)
            finally:
                worn.cancel()
            if line.reading.done():
                return line.reading.result()
            log.info("%s: a new connection is due: %s", self._venue, line.due)
            await asyncio.wait((line.reading,), timeout=self._gate.seconds())
            if line.reading.done():
                return line.reading.result()
            try:
                successor = await self._open(None if self._feed.has_trade_ids else [])
            except (OSError, WebSocketException) as error:
                log.warning("%s: no new connection yet: %s", self._venue, self._step_after(error).reason)
                await asyncio.wait((line.reading,), timeout=max(next(waits), self._gate.seconds()))
                continue
            spoke = asyncio.create_task(successor.spoke.wait())
            await asyncio.wait((spoke, successor.reading), timeout=OVERLAP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            spoke.cancel()
            if successor.reading.done() and not line.reading.done():
                successor.reading.exception()
                log.warning("%s: the new connection has ended at once", self._venue)
                await asyncio.wait((line.reading,), timeout=next(waits))
                continue
            self._say_goodbye(line)
            await asyncio.wait((line.reading,))
            if not isinstance(line.reading.exception(), ConnectionClosed):
                line.reading.result()
            await self._release(successor)
            line = successor
            waits = delays(random.Random())

    async def _worn(self, line: _Line) -> None:
        """Returns when the connection is to be replaced. Cuts it if its other end has gone without a word."""
        loop = asyncio.get_running_loop()
        lifetime = self._feed.connection_lifetime_seconds or math.inf
        ends = line.opened + lifetime - min(LEAD_SECONDS, LEAD * lifetime) * (1 + self._number)
        silence = self._feed.silence_seconds
        while not line.due:
            now = loop.time()
            quiet = 0.0 if line.is_paused else now - line.heard
            if now >= ends:
                line.due = f"the venue cuts it after {lifetime:.0f} s"
            elif quiet >= SILENCES * silence:
                line.due = f"it answers and has said nothing for {quiet:.0f} s"
            elif not line.is_paused and now - line.ticked >= self._patience:
                line.due = f"it brings no tick for {now - line.ticked:.0f} s"
                self._renewals += 1
            elif quiet >= silence and now - line.answered >= silence:
                if not await self._answers(line):
                    log.warning("%s: silent for %.1f s: left", self._venue, quiet)
                    line.socket.transport.abort()
                    await asyncio.wait((line.reading,))
                    return
                line.answered = loop.time()
            await asyncio.sleep(min(silence / 4, 0.5))

    async def _answers(self, line: _Line) -> bool:
        heard = line.heard
        try:
            await asyncio.wait_for(await line.socket.ping(), PONG_SECONDS)
        except TimeoutError:
            # A pong waits behind the frames that we have not read.
            return line.is_paused or line.heard != heard
        except ConnectionClosed:
            pass
        return True
