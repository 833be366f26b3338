"""A program's log: one line a message, whatever comes from outside, and no passwords of URLs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conf.settings import PROJECT

PROGRAM = """
import logging, sys
from conf.logs import set_up_logging

set_up_logging(sys.argv[1])
log = logging.getLogger("program")
log.warning("closed: %s at %s", "bye\\r\\n2026-01-01 00:00:00,000 INFO program: forged\\x1b[2J", "https://user:canary@h/x")
try:
    raise ValueError("no\\n2026-01-01 00:00:00,000 INFO program: forged \\x1b[2J https://user:canary@h/x")
except ValueError:
    log.exception("failed %d %%", 1)
log.warning("x" * 100_000)
"""


@pytest.mark.parametrize("kind", ["text", "json"])
def test_foreign_text_forges_no_line_and_no_password_is_logged(kind: str) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, kind], cwd=PROJECT, capture_output=True, check=True)
    text = ran.stderr.decode()
    assert not [mark for mark in ("\r", "\x1b", "canary", "x" * 10_000) if mark in text]
    lines = text.splitlines()
    if kind == "text":
        messages = [line.partition(" program: ")[2] for line in lines if not line.startswith("  ")]
        assert any(line.startswith("  ValueError: no") for line in lines)
    else:
        objects = [json.loads(line) for line in lines]
        messages = [entry["message"] for entry in objects]
        assert "ValueError: no" in objects[1]["exc_info"]
    assert messages[0].endswith("forged\\x1b[2J at https://***@h/x")
    assert messages[1:] == ["failed 1 %", "x" * 7_997 + "..."]
