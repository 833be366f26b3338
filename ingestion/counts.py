"""What an ingester has done so far, for people and machines to read."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field

from conf.text import shown
from ingestion.ticks import Reject

log = logging.getLogger(__name__)

NAMED_AT_MOST = 5
MOST_KINDS = 100


@dataclass(slots=True)
class Counts:
    """Counts of one feed since the start."""

    frames: int = 0
    bytes: int = 0
    ticks: int = 0
    rejected: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    """Trades that another connection had brought before."""
    connections: int = 0
    backfilled: int = 0
    heard: float = -math.inf
    """When the last frame came, by the event loop's clock."""

    def ignore(self, kind: str) -> None:
        """Count a frame that carries no tick. The kind may be a venue's word: only so many are told apart."""
        self.ignored[kind if kind in self.ignored or len(self.ignored) < MOST_KINDS else "other kinds"] += 1


class RejectLog:
    """Names the first few rejects of a period in the log, and counts the others by reason at its end."""

    def __init__(self) -> None:
        self._logged_rejects = 0
        self._others: Counter[str] = Counter()

    def add(self, reject: Reject) -> None:
        if self._logged_rejects < NAMED_AT_MOST:
            self._logged_rejects += 1
            log.warning("%s: rejected a frame: %s; it began %r", reject.source, shown(reject.reason), reject.raw[:120])
        else:
            # The words before what differs from frame to frame.
            reason = reject.reason.partition(":")[0][:80]
            self._others[reason if reason in self._others or len(self._others) < MOST_KINDS else "other reasons"] += 1

    def end_period(self) -> None:
        if self._others:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._others.most_common(5))
            log.warning("rejected %d more frames: %s", self._others.total(), reasons)
        self._logged_rejects = 0
        self._others.clear()
