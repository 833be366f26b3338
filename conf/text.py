"""Text that is safe to show: foreign text escaped and cut, and URLs without their passwords."""

from __future__ import annotations

import re
from collections.abc import Mapping

ELLIPSIS = "..."
LONGEST = 200
_USER_INFO = re.compile(r"://[^/\s?#]*@")
# A password with a slash is no part of a valid URL, and not to be shown either.
_PERHAPS_USER_INFO = re.compile(r"(?<=://)[^\s?#]*@")


def shown(text: object, limit: int = LONGEST) -> str:
    """One line of at most `limit` printable characters, for text (or an error, or bytes) from outside.

    Line breaks, ESC, controls of the direction of writing and everything else that is not printable become escapes like
    \\n, \\x1b and \\u202e. Text that is longer ends in `...`. It raises nothing, and shows its own result unchanged.
    """
    whole = _text(text)
    room = limit - len(ELLIPSIS)
    parts: list[str] = []
    length = fitting = end = 0
    # Each character gives at least one: what is beyond the limit is not looked at.
    for character in whole[: limit + 1]:
        part = character if character.isprintable() else character.encode("unicode_escape").decode()
        parts.append(part)
        length += len(part)
        if length <= room:
            fitting, end = fitting + 1, length
    if length <= limit:
        return "".join(parts)
    return "".join(parts[:fitting]) + ELLIPSIS[: max(0, limit - end)]


def brief(value: object) -> str:
    """A field's value with its type visible: text has quotes."""
    return "missing" if value is None else shown(repr(value), 80 + len(ELLIPSIS))


def _text(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits
        return f"<{type(value).__name__}>"


def redacted(text: str) -> str:
    """The text without users and passwords in its URLs."""
    return _PERHAPS_USER_INFO.sub("***@", text)


def has_user_info(value: object) -> bool:
    """Whether a setting's value, also of a mapping or list, holds a URL with a user or password."""
    if isinstance(value, Mapping):
        return any(map(has_user_info, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_user_info, value))
    return isinstance(value, str) and _USER_INFO.search(value) is not None
