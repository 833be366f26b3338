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

    A wall clock that is set while the program runs moves no receipt time; `check` notices it.
    """

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns, elapsed_ns: Callable[[], int] = _elapsed_ns) -> None:
        self._wall_ns = wall_ns
        self._elapsed_ns = elapsed_ns
        self._offset = wall_ns() - elapsed_ns()
        self._wall_offset = self._offset

    def now_ns(self) -> int:
        """Nanoseconds since 1970 in UTC, as the wall clock would show them had nobody set it."""
        return self._offset + self._elapsed_ns()

    def check(self) -> int:
        """By how many nanoseconds the wall clock was set since the last check; 0 for less than half a second."""
        offset = self._wall_ns() - self._elapsed_ns()
        step = offset - self._wall_offset
        # Compared with the last check, not with the start: a clock that is slowly kept right is not a step.
        self._wall_offset = offset
        return step if abs(step) >= STEP_NS else 0
