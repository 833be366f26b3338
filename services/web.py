"""Ask the web pages of daemons on this machine."""

from __future__ import annotations

import http.client
import json
import urllib.request
from typing import Any

# What is on this machine never goes through a proxy, whatever the environment says.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, seconds: float = 5.0, method: str = "GET") -> Any:
    """The answer, which is JSON. Raises OSError, also after so many seconds of silence, and ValueError."""
    try:
        with _DIRECT.open(urllib.request.Request(url, method=method), timeout=seconds) as answer:
            return json.load(answer)
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def beans(web: str, query: str) -> dict[str, dict[str, Any]]:
    """Hadoop's figures: the name of a bean -> its attributes. Raises as `ask`."""
    return {bean["name"].rpartition("name=")[2]: bean for bean in ask(f"{web}/jmx?qry={query}")["beans"]}
