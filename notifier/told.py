"""Which alerts somebody was told of, across restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


class Told:
    """The newest ids, in a file of JSON strings that is appended to, durably.

    An id is needed for as long as its alert may be told of, which is minutes; nobody is told of so many in that time.
    """

    def __init__(self, file: Path, most: int = 10_000) -> None:
        """What the file holds; a line that a crash cut short is left out. Raises OSError."""
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
        """Remember it, on disk too when this returns. Raises OSError, and then remembers it while the program runs."""
        self._ids[alert_id] = None
        if len(self._ids) >= 2 * self._most:
            self._rewrite()
        else:
            _write(self._file, "a", [alert_id])

    def _rewrite(self) -> None:
        """The newest alone. The old file stays until the new one is whole."""
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
