"""Text from outside forges no line of a log, no header and no picture on a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.text import redacted, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bitcoin at 61,500.5 €", "bitcoin at 61,500.5 €"),
        ("bye\r\n2026-01-01 INFO all is well", "bye\\r\\n2026-01-01 INFO all is well"),
        ("\x1b[2Jred\x07", "\\x1b[2Jred\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202eb\u2066c\u200b", "a\\u202eb\\u2066c\\u200b"),
        ("a\u2028b\x85c", "a\\u2028b\\x85c"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        (b"caf\xc3\xa9 \xff\n", "café \\xff\\n"),
        (ValueError("two\nlines"), "two\\nlines"),
        (None, "None"),
        pytest.param(10**5_000, "<int>", id="huge"),
    ],
)
def test_unprintable_characters_become_escapes(text: object, expected: str) -> None:
    assert shown(text) == expected


def test_long_text_is_cut_and_says_so() -> None:
    assert shown("x" * 200) == "x" * 200
    assert shown("x" * 201) == "x" * 197 + "..."
    assert shown("x" * 300, limit=300) == "x" * 300
    # No half of an escape.
    assert shown("\n" * 10, limit=10) == "\\n" * 3 + "..."
    assert shown("\u202e" * 10, limit=10) == "\\u202e..."


@given(st.text() | st.binary(), st.integers(0, 60))
def test_whatever_comes_is_one_short_line_of_printable_characters(text: str | bytes, limit: int) -> None:
    line = shown(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert shown(line, limit) == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://user:p@ss@h:1/x failed", "GET https://***@h:1/x failed"),
        ("redis://:98765432@h, wss://a@b/", "redis://***@h, wss://***@b/"),
        ("https://user:a/b@h/", "https://***@h/"),
        ("wss://h/stream?streams=btcusdt@trade", "wss://h/stream?streams=btcusdt@trade"),
        ("mail to a@b.test", "mail to a@b.test"),
    ],
)
def test_urls_are_shown_without_user_and_password(text: str, expected: str) -> None:
    assert redacted(text) == expected
