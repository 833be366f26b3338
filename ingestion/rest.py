"""A venue's REST, asked no faster than it allows.

What fails is told as one of two kinds: RestBusy, where asking again later may help, and RestRefused, where it does not.
Neither says more of an address than its path: a key travels in a header, and stays out of logs and messages.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import zlib
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import Self

import httpx

from conf.text import shown
from ingestion import fields
from ingestion.errors import retry_after

log = logging.getLogger(__name__)
# It would log every request with its query.
logging.getLogger("httpx").setLevel(logging.WARNING)

# Without a byte for so long, and for a whole answer.
TIMEOUT_SECONDS, ANSWER_SECONDS = 20.0, 120.0
# Of a list of all that a venue trades (Binance's has some 15 MB), and of a page of trades. Bounds what an answer can
# cost in memory, with the number of values in it: a compressed one may be a thousand times as large as it looks.
LARGEST_LIST, LARGEST_PAGE = 32 << 20, 4 << 20
MOST_VALUES = 3_000_000
AGAIN_SECONDS = 5.0
# Answers that may be others a moment later. 403 is a firewall's, as Binance says of its own ("WAF Limit").
_PASSING = {403, 408, 409, 418, 423, 425, 429}
_CLOSED_FOR_LEGAL_REASONS = 451


class RestBusy(Exception):
    """No answer now; perhaps `wait` seconds later."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = AGAIN_SECONDS if wait is None else wait


class RestRefused(Exception):
    """The same question will get the same refusal."""


class Rest:
    """One venue's REST. Requests follow one another by `least_seconds` at least."""

    def __init__(
        self,
        base_url: str,
        least_seconds: float,
        bearer: str | None = None,
        *,
        proxy: str | None = None,
        market_data_url: str | None = None,
        largest_answer: int = LARGEST_PAGE,
    ) -> None:
        """`market_data_url` is asked instead once the first address is closed to us for legal reasons (HTTP 451)."""
        self._least_seconds = least_seconds
        self._largest_answer = largest_answer
        self._market_data_url = market_data_url
        self._next = 0.0
        self._turn = asyncio.Lock()
        self._client = httpx.AsyncClient(
            base_url=base_url,
            proxy=proxy,
            # The environment has no say in where we connect to.
            trust_env=False,
            verify=_certificates(),
            timeout=TIMEOUT_SECONDS,
            headers={"Accept-Encoding": "gzip"} | ({} if bearer is None else {"Authorization": f"Bearer {bearer}"}),
            follow_redirects=False,
        )

    async def get(self, path: str, query: Mapping[str, str | int]) -> object:
        """The answer's JSON, its numbers with a point as text. Raises RestBusy or RestRefused."""
        async with self._turn:
            status, content = await self._ask(path, query)
            if status == _CLOSED_FOR_LEGAL_REASONS and self._market_data_url is not None:
                closed, self._client.base_url = self._client.base_url, httpx.URL(self._market_data_url)
                self._market_data_url = None
                log.warning("%s: HTTP %d at %s; asking %s", path, status, closed.host, self._client.base_url.host)
                status, content = await self._ask(path, query)
        if status != 200:
            raise RestRefused(f"{path}: HTTP {status}")
        if content.count(b",") > MOST_VALUES:
            raise RestRefused(f"{path}: an answer of more than {MOST_VALUES} values")
        try:
            return fields.decode(content)
        except ValueError:
            raise RestBusy(f"{path}: the answer is not JSON") from None

    async def _ask(self, path: str, query: Mapping[str, str | int]) -> tuple[int, bytes]:
        """Status and content of an answer that will stay the same; of a refusal there is no content."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._next - loop.time())
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._client.stream("GET", path, params=query) as response:
                status = response.status_code
                content = await self._content(path, response) if status == 200 else b""
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RestRefused(f"{path}: {shown(error)}") from None
        except (httpx.HTTPError, TimeoutError) as error:
            raise RestBusy(f"{path}: {type(error).__name__}") from None
        finally:
            self._next = loop.time() + self._least_seconds
        if status in _PASSING or status >= 500:
            wait = retry_after(status, response.headers) if "Retry-After" in response.headers else AGAIN_SECONDS
            # Everybody waits, not only who asked.
            self._next = max(self._next, loop.time() + wait)
            raise RestBusy(f"{path}: HTTP {status}", wait)
        return status, content

    async def _content(self, path: str, response: httpx.Response) -> bytes:
        """The body, uncompressed as far as is allowed and no further."""
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip"):
            raise RestRefused(f"{path}: an answer that is encoded as {shown(encoding)}")
        gunzip = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
        content = bytearray()
        async for chunk in response.aiter_raw():
            try:
                content += (
                    chunk if gunzip is None else gunzip.decompress(chunk, self._largest_answer + 1 - len(content))
                )
            except zlib.error:
                raise RestBusy(f"{path}: the answer is not gzip") from None
            if len(content) > self._largest_answer:
                raise RestRefused(f"{path}: an answer of more than {self._largest_answer} bytes")
        if gunzip is not None and not gunzip.eof:
            raise RestBusy(f"{path}: the answer is cut off")
        return bytes(content)

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Those that the WebSockets are checked by."""
    return ssl.create_default_context()
