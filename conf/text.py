"""Foreign text, made safe for a log, a mail's header, a field of a webhook's body or a terminal."""

from __future__ import annotations

ELLIPSIS = "..."


def shown(text: object, limit: int = 200) -> str:
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


def _text(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits
        return f"<{type(value).__name__}>"
