"""Ask the web pages of daemons on this machine."""

from __future__ import annotations

import json
from typing import Any

from operation import addresses


def ask(url: str, seconds: float = addresses.ANSWER_SECONDS, method: str = "GET") -> Any:
    """The answer, which is JSON. Raises OSError, also after so many seconds of silence, and ValueError.

    Raises FileNotFoundError where there is no such page.
    """
    code, content = addresses.ask(url, seconds, method)
    if code == 404:
        raise FileNotFoundError(f"HTTP {code}")
    if code >= 400:
        raise OSError(f"HTTP {code}")
    return json.loads(content)


def beans(web: str, query: str) -> dict[str, dict[str, Any]]:
    """Hadoop's figures: the name of a bean -> its attributes. Raises as `ask`."""
    return {bean["name"].rpartition("name=")[2]: bean for bean in ask(f"{web}/jmx?qry={query}")["beans"]}
