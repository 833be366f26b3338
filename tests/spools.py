"""What an ingester's spool holds, for tests."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ingestion.spool import Spool


def spooled(folder: Path, topic: str) -> list[Any]:
    """The messages that the spool in this folder has acknowledged and not yet forgotten; the folder is only read."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        spool = Spool(Path(copy), 1.0, 1 << 40)
        try:
            return [json.loads(record.value) for record in spool.records(0) if record.topic == topic]
        finally:
            spool.close()
