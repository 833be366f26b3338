"""Limits how often we connect to a venue: all connections to a venue share one gate."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable


class Gate:
    """Lets at most `most` attempts through in any `seconds`, and none while the venue has asked us to wait.

    A venue counts by our address, so all connections to it wait, not only the one that was told so.
    """

    def __init__(self, most: int = 0, seconds: float = 1.0, now: Callable[[], float] | None = None) -> None:
        """`most` 0: as many as are wanted. `now` is the event loop's time unless a test has its own."""
        self._most = most
        self._seconds = seconds
        self._now = now or (lambda: asyncio.get_running_loop().time())
        self._attempts: deque[float] = deque(maxlen=most or 1)
        self._not_before = -math.inf

    def hold(self, seconds: float) -> None:
        """The venue wants to be left alone for so long."""
        self._not_before = max(self._not_before, self._now() + seconds)

    def seconds(self) -> float:
        """For how long to wait before the next attempt."""
        opens = self._not_before
        if self._most and len(self._attempts) == self._most:
            opens = max(opens, self._attempts[0] + self._seconds)
        return max(0.0, opens - self._now())

    def enter(self) -> None:
        """An attempt is made now."""
        self._attempts.append(self._now())
