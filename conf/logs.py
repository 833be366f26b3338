"""How programs log: lines for people, or objects. No text from outside forges a line, and no URL shows its password."""

from __future__ import annotations

import logging
import traceback

from pythonjsonlogger.json import JsonFormatter

from conf.text import redacted, shown

LONGEST_MESSAGE = 8_000


class SafeText(logging.Filter):
    """Makes each message one line; a stack trace follows in lines that are indented."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(redacted(record.getMessage()), LONGEST_MESSAGE), None
        if record.exc_info:
            text = "".join(traceback.format_exception(*record.exc_info))
            lines = redacted(text).splitlines()
            record.exc_text = "\n".join(f"  {shown(line, LONGEST_MESSAGE)}" for line in lines)
            record.exc_info = None
        return True


def set_up_logging(kind: str) -> None:
    """`kind` is the setting log_format."""
    handler = logging.StreamHandler()
    handler.addFilter(SafeText())
    if kind == "json":
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Each attempt of kafka-python's to reach a broker is a line; who uses it says it in one.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    # It would log every request with its address, and so maybe a key.
    logging.getLogger("httpx").setLevel(logging.WARNING)
