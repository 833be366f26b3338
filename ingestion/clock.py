"""When something was received."""

from __future__ import annotations

import time
from collections.abc import Callable

# On Linux this clock also counts while the machine sleeps.
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
STEP_NS = 500_000_000


def _elapsed_ns() -> int:
    return time.clock_gettime_ns(_ELAPSED)


class Clock:
    """The wall clock at the start plus the time that has passed since.

    A wall clock that is stepped for a moment moves no receipt time. One that stays elsewhere for `persist_seconds` is
    believed: the first one may have been the wrong one.
    """

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        elapsed_ns: Callable[[], int] = _elapsed_ns,
        persist_seconds: float = 60.0,
    ) -> None:
        self._wall_ns = wall_ns
        self._elapsed_ns = elapsed_ns
        self._persist_ns = int(persist_seconds * 1e9)
        self._offset = wall_ns() - elapsed_ns()
        self._wall_offset = self._offset
        self._elsewhere: tuple[int, int] | None = None
        """The wall clock's offset since it is elsewhere, and since when by the elapsed time."""

    def now_ns(self) -> int:
        """Nanoseconds since 1970 in UTC, as the wall clock would show them had nobody set it."""
        return self._offset + self._elapsed_ns()

    @property
    def ahead_ns(self) -> int:
        """How far the wall clock is ahead of the receipt times; 0 for less than half a second."""
        ahead = self._wall_ns() - self._elapsed_ns() - self._offset
        return ahead if abs(ahead) >= STEP_NS else 0

    def check(self) -> int:
        """By how many nanoseconds the wall clock was set since the last check; 0 for less than half a second."""
        offset = self._wall_ns() - self._elapsed_ns()
        step = offset - self._wall_offset
        # Compared with the last check, not with the start: a clock that is slowly kept right is not a step.
        self._wall_offset = offset
        return step if abs(step) >= STEP_NS else 0

    def take_over(self) -> int:
        """Believe the wall clock if it has stayed elsewhere for long; by how many nanoseconds receipt times move."""
        elapsed = self._elapsed_ns()
        offset = self._wall_ns() - elapsed
        if abs(offset - self._offset) < STEP_NS:
            self._elsewhere = None
            return 0
        if self._elsewhere is None or abs(offset - self._elsewhere[0]) >= STEP_NS:
            self._elsewhere = offset, elapsed
        if elapsed - self._elsewhere[1] < self._persist_ns:
            return 0
        moved = offset - self._offset
        self._offset, self._elsewhere = offset, None
        return moved
