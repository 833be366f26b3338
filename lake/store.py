"""Files of the lake's tables, written and read by Python alone: on an executor no JVM helps it.

On HDFS that is WebHDFS: a file of a small micro-batch takes some 25 ms, one of 20 MB a tenth of a second. `file:` is
for lakes on one machine, and for tests.
"""

from __future__ import annotations

import getpass
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import hdfs
import requests
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_AHEAD = 1 << 20
# A NameNode that starts again is back within this time; what takes longer ends the job, which may be started again.
PATIENCE_SECONDS = 60
# What WebHDFS answers with where asking again is of no use.
FINAL = (
    *("AccessControlException", "QuotaExceededException", "InvalidPathException", "SecurityException"),
    "FileNotFoundException",
)

Answer = TypeVar("Answer")


class UnknownStore(ValueError):
    """A lake's root that is neither on HDFS nor on the local disk."""


def _may_pass(error: BaseException) -> bool:
    """Whether a failure is one that a server which is starting, or moving, gives."""
    if isinstance(error, hdfs.HdfsError):
        return not any(name in str(error) or name == error.exception for name in FINAL)
    return isinstance(error, requests.ConnectionError | requests.Timeout)


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """What WebHDFS answers; it is asked again for a minute while it does not, or says that it cannot yet."""
    asking = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_exponential_jitter(multiplier=0.2, max=5),
        stop=stop_after_delay(PATIENCE_SECONDS),
        reraise=True,
    )
    return asking(ask)


@cache
def _client(webhdfs_url: str, user: str) -> hdfs.InsecureClient:
    return hdfs.InsecureClient(webhdfs_url, user=user, timeout=60)


@dataclass(frozen=True)
class Store:
    """Where a lake's files are; may be sent to executors.

    webhdfs_url: of the NameNode, or of several, separated by semicolons; unused for `file:`.
    """

    scheme: str
    webhdfs_url: str
    user: str

    @classmethod
    def of(cls, root: str, webhdfs_url: str) -> Store:
        """The store of a lake's root, as the user that this process is to Hadoop. Raises UnknownStore."""
        scheme = urlsplit(root).scheme
        if scheme not in ("hdfs", "file"):
            raise UnknownStore(f"lake_root is {root}: the streaming job writes to hdfs: and file: only")
        return cls(scheme, webhdfs_url, os.environ.get("HADOOP_USER_NAME") or getpass.getuser())

    def write(self, url: str, content: bytes) -> None:
        """Make a file. Raises HdfsError, requests.RequestException or OSError when a minute of trying did not help."""
        path = _path(url)
        if self.scheme == "file":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
            return
        client = _client(self.webhdfs_url, self.user)
        # Over what an attempt may have left that failed half-way.
        _patiently(lambda: client.write(path, data=content, overwrite=True))

    def open(self, url: str, size: int) -> io.BufferedReader:
        """A file of so many bytes, to be read in parts. Reading raises as `write`."""
        return io.BufferedReader(_Opened(self, url, size), READ_AHEAD)

    def read(self, url: str, offset: int = 0, length: int | None = None) -> bytes:
        """What a file holds from an offset on. Raises as `write`, and FileNotFoundError or HdfsError if it is gone."""
        path = _path(url)
        if self.scheme == "file":
            with Path(path).open("rb") as file:
                file.seek(offset)
                return file.read(-1 if length is None else length)
        client = _client(self.webhdfs_url, self.user)

        def answer() -> bytes:
            with client.read(path, offset=offset, length=length) as told:
                return bytes(told.read())

        return _patiently(answer)

    def has(self, url: str) -> bool:
        """Whether there is such a file, as WebHDFS says at once. Raises HdfsError or requests.RequestException."""
        path = _path(url)
        if self.scheme == "file":
            return Path(path).exists()
        return _client(self.webhdfs_url, self.user).status(path, strict=False) is not None

    def delete(self, url: str) -> None:
        """Delete a file, if there is one. Raises as `write`."""
        path = _path(url)
        if self.scheme == "file":
            Path(path).unlink(missing_ok=True)
        else:
            client = _client(self.webhdfs_url, self.user)
            _patiently(lambda: client.delete(path))


class _Opened(io.RawIOBase):
    def __init__(self, store: Store, url: str, size: int) -> None:
        self._store, self._url, self._size, self._at = store, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer) as room:
            length = min(len(room), self._size - self._at)
            told = self._store.read(self._url, self._at, length) if length > 0 else b""
            room[: len(told)] = told
        self._at += len(told)
        return len(told)


def _path(url: str) -> str:
    return unquote(urlsplit(url).path)
