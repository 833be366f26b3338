"""Text from outside, made fit for a log line, a message or a reason: one short line without control characters.

A venue chooses the words of a close reason, an HTTP reason phrase or an error. Written as they are, they could forge a
log line or move a terminal's cursor.
"""

from __future__ import annotations

LONGEST = 200


def escape(text: object, most: int = LONGEST) -> str:
    """The text's first `most` characters; a character that does not print is written as Python's escape for it."""
    whole = text if isinstance(text, str) else str(text)
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in whole[:most])
    return shown if len(whole) <= most else f"{shown}..."


def brief(value: object) -> str:
    """A field's value with its type visible: text has quotes."""
    return "missing" if value is None else escape(repr(value), 80)
