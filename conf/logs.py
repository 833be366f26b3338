"""How programs log: lines for people, or objects."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter


def set_up_logging(kind: str) -> None:
    """`kind` is the setting log_format."""
    handler = logging.StreamHandler()
    if kind == "json":
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Each attempt of kafka-python's to reach a broker is a line; who uses it says it in one.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    # It would log every request with its address, and so maybe a key.
    logging.getLogger("httpx").setLevel(logging.WARNING)
