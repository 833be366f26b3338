"""The ids of the alerts already sent, kept across restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


class SentAlerts:
    """The newest ids, in an append-only file of JSON strings, synced at each append.

    An id is needed until its alert is stale, for some minutes. `most` is far above the number of alerts in that time.
    """

    def __init__(self, file: Path, most: int = 10_000) -> None:
        """Read the file; a line cut short by a crash is skipped. Raises OSError."""
        self._most = most
        self._file = file
        self._ids: dict[str, None] = {}
        if file.exists():
            for line in file.read_text(encoding="ascii", errors="replace").splitlines():
                try:
                    self._ids[str(json.loads(line))] = None
                except ValueError:
                    continue
        self._rewrite()

    def __contains__(self, alert_id: str) -> bool:
        return alert_id in self._ids

    def add(self, alert_id: str) -> None:
        """Add an id, in memory and on disk. If it raises OSError, the id is in memory only."""
        self._ids[alert_id] = None
        if len(self._ids) >= 2 * self._most:
            self._rewrite()
        else:
            _write(self._file, "a", [alert_id])

    def _rewrite(self) -> None:
        """Rewrite the file with the newest ids only. The old file stays until the new one is complete."""
        self._ids = dict.fromkeys(list(self._ids)[-self._most :])
        draft = self._file.with_suffix(".new")
        _write(draft, "w", self._ids)
        draft.replace(self._file)


def _write(path: Path, mode: str, ids: Iterable[str]) -> None:
    with path.open(mode, encoding="ascii") as file:
        # The line break comes first, so that a line cut short spoils no other.
        file.writelines(f"\n{json.dumps(alert_id)}" for alert_id in ids)
        file.flush()
        os.fsync(file.fileno())
