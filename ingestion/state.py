"""What an ingester knows beside the spool, in one small file that is replaced as a whole."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class State:
    """Sections by name, each JSON. `position` is where in the spool they stand: what comes after is not in them."""

    def __init__(self, file: Path, position: int, sections: dict[str, Any]) -> None:
        self._file = file
        self.position = position
        self.sections = sections

    @classmethod
    def load(cls, folder: Path) -> State:
        """As it was saved last; empty where it never was, or cannot be read any more."""
        file = folder / "state.json"
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            return cls(file, int(read["position"]), dict(read["sections"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s cannot be read, and is begun anew: %r", file, error)
        return cls(file, 0, {})

    def save(self, position: int) -> bool:
        """Write it durably; whether there was room. The old one stays until the new one is whole."""
        draft = self._file.with_suffix(".new")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump({"position": position, "sections": self.sections}, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._file)
        except OSError as error:
            log.warning("%s cannot be saved: %s", self._file, error)
            draft.unlink(missing_ok=True)
            return False
        self.position = position
        return True
