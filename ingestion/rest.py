"""A venue's REST, asked no faster than it allows.

What fails is told as one of two kinds: RestBusy, where asking again later may help, and RestRefused, where it does not.
Neither says more of an address than its path: a key travels in a header, and stays out of logs and messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from ingestion import fields
from ingestion.errors import LONGEST_RETRY_AFTER

# It would log every request with its query.
logging.getLogger("httpx").setLevel(logging.WARNING)

TIMEOUT_SECONDS = 20.0
LARGEST_ANSWER = 64 << 20
AGAIN_SECONDS = 5.0


class RestBusy(Exception):
    """No answer now; perhaps `wait` seconds later."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = AGAIN_SECONDS if wait is None else wait


class RestRefused(Exception):
    """The same question will get the same refusal."""


class Rest:
    """One venue's REST. Requests follow one another by `least_seconds` at least."""

    def __init__(self, base_url: str, least_seconds: float, bearer: str | None = None) -> None:
        self._least_seconds = least_seconds
        self._next = 0.0
        self._turn = asyncio.Lock()
        self._client = httpx.AsyncClient(
            base_url=base_url,
            # What is on this machine is not behind the environment's proxy.
            mounts={"all://127.0.0.1": None},
            timeout=TIMEOUT_SECONDS,
            headers={} if bearer is None else {"Authorization": f"Bearer {bearer}"},
            follow_redirects=False,
        )

    async def get(self, path: str, query: Mapping[str, str | int]) -> object:
        """The answer's JSON, its numbers with a point as text. Raises RestBusy or RestRefused."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            await asyncio.sleep(self._next - loop.time())
            try:
                response = await self._client.get(path, params=query)
            except httpx.InvalidURL as error:
                raise RestRefused(f"{path}: {error}") from None
            except httpx.HTTPError as error:
                raise RestBusy(f"{path}: {type(error).__name__}") from None
            finally:
                self._next = loop.time() + self._least_seconds
            if response.status_code in (418, 429):
                wait = _seconds(response.headers.get("Retry-After"))
                # Everybody waits, not only who asked.
                self._next = loop.time() + wait
                raise RestBusy(f"{path}: HTTP {response.status_code}", wait)
        if response.status_code >= 500:
            raise RestBusy(f"{path}: HTTP {response.status_code}")
        if response.status_code != 200:
            raise RestRefused(f"{path}: HTTP {response.status_code}")
        if len(response.content) > LARGEST_ANSWER:
            raise RestRefused(f"{path}: an answer of {len(response.content)} bytes")
        try:
            return fields.decode(response.content)
        except ValueError:
            raise RestBusy(f"{path}: the answer is not JSON") from None

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _seconds(retry_after: str | None) -> float:
    return min(float(retry_after), LONGEST_RETRY_AFTER) if retry_after and retry_after.isdecimal() else AGAIN_SECONDS
