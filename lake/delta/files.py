"""The lake's files, on HDFS or on the local disk, by Python alone: the one way to them for drivers and executors.

HDFS answers over WebHDFS. We speak it with urllib3 itself: a write takes 1.3 ms of CPU, where the `hdfs` package takes
3 ms, and a micro-batch of 150 ms does some 14 file operations. `file:` is for lakes on one machine, and for tests.

Every method takes whole URLs: `hdfs://HOST:PORT/path` or `file:/path`. As in Hadoop's own paths, a `%` or a `?` in the
path is just a character of a name.
"""

from __future__ import annotations

import builtins
import getpass
import io
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlencode
from uuid import uuid4

import urllib3
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_AHEAD = 1 << 20
"""How many bytes an opened file reads at least, at a time."""
PATIENCE_SECONDS = 60.0
"""How long we retry. A NameNode that starts again is back by then; a longer outage ends the job, which may restart."""
FINAL = (
    *("AccessControlException", "AuthorizationException", "SecurityException", "QuotaExceededException"),
    *("InvalidPathException", "IllegalArgumentException", "ParentNotDirectoryException"),
    *("PathIsNotEmptyDirectoryException", "UnsupportedOperationException", "out of the range"),
)
"""Java exceptions, and one text of a plain IOException, after which a retry is of no use."""


class UnknownStore(ValueError):
    """A lake's root that is neither on HDFS nor on the local disk."""


class StoreError(OSError):
    """The store refuses an operation; the message has its reason."""


class StoreUnavailable(StoreError):
    """The store does not answer, or answers that it cannot yet: raised after PATIENCE_SECONDS of retries."""


class QuotaExceeded(StoreError):
    """A folder's quota is used up."""


@dataclass(frozen=True)
class FileStatus:
    """A file or folder in its folder. size: bytes, 0 of a folder; modified: milliseconds since 1970."""

    name: str
    size: int
    modified: int
    is_folder: bool


class Files(Protocol):
    """Files of one store; may be sent to executors.

    Every method raises StoreError where the store refuses (QuotaExceeded, or no permission: at once) or does not answer
    for a minute (StoreUnavailable); on the local disk another OSError.
    """

    def read(self, url: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of a file from an offset on, at most `length`. Raises FileNotFoundError if it is absent."""

    def open(self, url: str, size: int) -> io.BufferedReader:
        """A file of `size` bytes, to be read in parts of at least READ_AHEAD bytes. Reading raises as `read`."""

    def write(self, url: str, content: bytes) -> None:
        """Write a file, and the folders above it; replaces a file that is there. A reader may see a part of it."""

    def create(self, url: str, content: bytes) -> bool:
        """Create a file, which appears whole or not at all; False, and nothing changes, if it exists already."""

    def replace(self, url: str, content: bytes) -> None:
        """As `write`, but a reader sees the whole old file or the whole new one."""

    def rename(self, url: str, to: str) -> bool:
        """Rename a file or folder; False, and nothing changes, if it or the target's folder is absent or `to` exists.

        On HDFS also False if a first request succeeded and its answer was lost.
        """

    def list(self, url: str, after: str = "", limit: int | None = None) -> builtins.list[FileStatus]:
        """What is in a folder, by name, of names above `after`, the first `limit` of them; [] if it is absent."""

    def exists(self, url: str) -> bool:
        """Whether there is such a file or folder."""

    def delete(self, url: str, recursive: bool = False) -> None:
        """Delete a file, or a folder if it is empty or `recursive`; nothing happens if it is absent."""


def files_of(root: str, webhdfs_url: str) -> Files:
    """The files of a lake's root, as the user that this process is to Hadoop. Raises UnknownStore.

    webhdfs_url: of the NameNode, or of several, separated by semicolons; unused for `file:`.
    """
    scheme = root.partition(":")[0]
    if scheme == "file":
        return LocalDisk()
    if scheme == "hdfs":
        return WebHdfs(webhdfs_url, os.environ.get("HADOOP_USER_NAME") or getpass.getuser())
    raise UnknownStore(f"lake_root is {root}: a lake can be on hdfs: and file: only")


@dataclass(frozen=True)
class LocalDisk:
    """Files of `file:` URLs; see Files."""

    def read(self, url: str, offset: int = 0, length: int | None = None) -> bytes:
        with Path(_path(url)).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def open(self, url: str, size: int) -> io.BufferedReader:
        return io.BufferedReader(_Parts(self, url, size), READ_AHEAD)

    def write(self, url: str, content: bytes) -> None:
        path = Path(_path(url))
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_checksum(path)
        path.write_bytes(content)

    def create(self, url: str, content: bytes) -> bool:
        draft = self._draft(url, content)
        try:
            os.link(draft, _path(url))
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def replace(self, url: str, content: bytes) -> None:
        draft, path = self._draft(url, content), Path(_path(url))
        _forget_checksum(path)
        draft.replace(path)

    def _draft(self, url: str, content: bytes) -> Path:
        """Write a hidden file beside a file-to-be. It is synced: a crash of the machine must not cut it short."""
        draft = Path(_path(_draft_of(url)))
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return draft

    def rename(self, url: str, to: str) -> bool:
        source, target = Path(_path(url)), Path(_path(to))
        if source.is_dir():
            if target.exists() or not target.parent.is_dir():
                return False
            source.rename(target)
            return True
        try:
            os.link(source, target)
        except (FileExistsError, FileNotFoundError):
            return False
        source.unlink()
        return True

    def list(self, url: str, after: str = "", limit: int | None = None) -> builtins.list[FileStatus]:
        statuses: builtins.list[FileStatus] = []
        with suppress(FileNotFoundError), os.scandir(_path(url)) as entries:
            for entry in sorted((entry for entry in entries if entry.name > after), key=lambda entry: entry.name):
                if len(statuses) == limit:
                    break
                # A file may go between the listing and its status.
                with suppress(FileNotFoundError):
                    status, is_folder = entry.stat(), entry.is_dir()
                    size = 0 if is_folder else status.st_size
                    statuses.append(FileStatus(entry.name, size, status.st_mtime_ns // 1_000_000, is_folder))
        return statuses

    def exists(self, url: str) -> bool:
        return Path(_path(url)).exists()

    def delete(self, url: str, recursive: bool = False) -> None:
        path = Path(_path(url))
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif recursive:
            shutil.rmtree(path)
        else:
            path.rmdir()


@dataclass(frozen=True)
class WebHdfs:
    """Files of `hdfs:` URLs, over WebHDFS; see Files.

    webhdfs_url: of the NameNode, or of several, separated by semicolons. user: whom Hadoop takes us for.
    patience_seconds: how long an operation is retried; 0 for one try.
    """

    webhdfs_url: str
    user: str
    patience_seconds: float = PATIENCE_SECONDS

    def read(self, url: str, offset: int = 0, length: int | None = None) -> bytes:
        limit: dict[str, Any] = {} if length is None else {"length": length}
        try:
            return self._ask("GET", "OPEN", url, noredirect="true", offset=offset, **limit)
        except StoreError as error:
            # HDFS refuses an offset at or behind the end; Python's files have no bytes there.
            if "out of the range" in str(error):
                return b""
            raise

    def open(self, url: str, size: int) -> io.BufferedReader:
        return io.BufferedReader(_Parts(self, url, size), READ_AHEAD)

    def write(self, url: str, content: bytes) -> None:
        # With overwrite also over what a try has left that failed half-way.
        self._ask("PUT", "CREATE", url, content, noredirect="true", overwrite="true")

    def create(self, url: str, content: bytes) -> bool:
        draft, created = _draft_of(url), False
        try:
            self.write(draft, content)
            # A rename whose answer was lost is refused at the retry, and the draft is gone: it is the file.
            created = self.rename(draft, url) or (not self.exists(draft) and self.exists(url))
        finally:
            if not created:
                self._discard(draft)
        return created

    def replace(self, url: str, content: bytes) -> None:
        draft, done = _draft_of(url), False
        try:
            self.write(draft, content)
            with suppress(FileNotFoundError):  # Of a retry, after an answer that was lost.
                self._ask("PUT", "RENAME", draft, destination=_path(url), renameoptions="OVERWRITE")
            done = True
        finally:
            if not done:
                self._discard(draft)

    def _discard(self, draft: str) -> None:
        """Delete a draft, if the store answers at once: what became of the operation is known already."""
        with suppress(OSError):
            replace(self, patience_seconds=0).delete(draft)

    def rename(self, url: str, to: str) -> bool:
        try:
            # With an option WebHDFS never moves into a folder of the target's name, and says why it refuses.
            answer = self._ask("PUT", "RENAME", url, destination=_path(to), renameoptions="NONE")
        except (FileNotFoundError, FileExistsError):
            return False
        # Of a gateway that does not know the option.
        return b"false" not in answer

    def list(self, url: str, after: str = "", limit: int | None = None) -> builtins.list[FileStatus]:
        statuses: builtins.list[FileStatus] = []
        # HDFS answers with some thousand at a time, by a setting of its own.
        while True:
            # Hadoop 3.5 knows the parameter in lower case only, its documents in mixed case only.
            start: dict[str, Any] = {"startafter": after, "startAfter": after} if after else {}
            try:
                answer = json.loads(self._ask("GET", "LISTSTATUS_BATCH", url, **start))["DirectoryListing"]
            except FileNotFoundError:
                return []
            page = [_status(status) for status in answer["partialListing"]["FileStatuses"]["FileStatus"]]
            statuses += page
            is_enough = limit is not None and len(statuses) >= limit
            if is_enough or not answer["remainingEntries"] or not page:
                return statuses[:limit]
            after = page[-1].name

    def exists(self, url: str) -> bool:
        try:
            self._ask("GET", "GETFILESTATUS", url)
        except FileNotFoundError:
            return False
        return True

    def delete(self, url: str, recursive: bool = False) -> None:
        self._ask("DELETE", "DELETE", url, recursive="true" if recursive else "false")

    def _ask(self, method: str, operation: str, url: str, body: bytes | None = None, **options: str | int) -> bytes:
        """Do an operation, with retries, and return the answer.

        With noredirect the NameNode answers where the data is, and a DataNode does the rest.
        """
        query = urlencode({"op": operation, "user.name": self.user, **options})
        resource = f"/webhdfs/v1{quote(_path(url))}?{query}"
        name_nodes = _name_nodes(self.webhdfs_url, os.getpid())

        def ask() -> bytes:
            failures = []
            for _ in name_nodes.urls:
                try:
                    answer = name_nodes.send(method, name_nodes.urls[0] + resource)
                    if "noredirect" not in options:
                        return answer
                    return name_nodes.send(method, json.loads(answer)["Location"], body)
                except StoreUnavailable as error:
                    failures.append(str(error))
                    name_nodes.switch()
            raise StoreUnavailable("; ".join(failures))

        try:
            return _retries(self.patience_seconds)(ask)
        except OSError as error:
            raise type(error)(f"{operation} {url}: {error}") from None


def _retries(patience_seconds: float) -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(StoreUnavailable),
        wait=wait_exponential_jitter(multiplier=0.2, max=5),
        stop=stop_after_delay(patience_seconds),
        reraise=True,
    )


class _NameNodes:
    """The NameNodes' URLs, the one that answered last first, and the connections to them and to DataNodes."""

    def __init__(self, urls: str) -> None:
        self.urls = [url.strip().rstrip("/") for url in urls.split(";")]
        timeout = urllib3.Timeout(connect=10, read=60)
        self._pool = urllib3.PoolManager(num_pools=64, maxsize=16, retries=False, timeout=timeout)

    def switch(self) -> None:
        """Let the next NameNode be the first."""
        self.urls = self.urls[1:] + self.urls[:1]

    def send(self, method: str, url: str, body: bytes | None = None) -> bytes:
        """Send one request, and return the answer. Raises FileNotFoundError, FileExistsError or StoreError."""
        headers = {} if body is None else {"Content-Type": "application/octet-stream"}
        try:
            answer = self._pool.urlopen(method, url, redirect=False, body=body, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise StoreUnavailable(str(error)) from error
        if answer.status >= 300:
            raise _error(answer.status, answer.data)
        return answer.data


@cache
def _name_nodes(urls: str, process: int) -> _NameNodes:
    """The connections of a process: a forked one must not share its parent's."""
    return _NameNodes(urls)


def _error(status: int, content: bytes) -> OSError:
    """The error that WebHDFS's answer stands for."""
    try:
        remote = json.loads(content)["RemoteException"]
        kind, reason = str(remote["exception"]), str(remote["message"]).partition("\n")[0]
    except (ValueError, KeyError, TypeError):
        # Not from WebHDFS itself, but from what is before it.
        message = f"HTTP status {status}: {content[:200].decode(errors='replace')}"
        return StoreUnavailable(message) if status >= 500 else StoreError(message)
    # A server may have wrapped the exception into another one.
    text = f"{kind}: {reason}"
    if "FileNotFoundException" in text:
        return FileNotFoundError(reason)
    if "FileAlreadyExistsException" in text:
        return FileExistsError(reason)
    if "QuotaExceededException" in text:
        remedy = "delete files, or raise it: hdfs dfsadmin -setQuota (names), -setSpaceQuota (bytes)"
        return QuotaExceeded(f"the quota is used up; {remedy}: {reason}")
    if any(name in text for name in FINAL):
        return StoreError(text)
    return StoreUnavailable(text)


def _status(status: dict[str, Any]) -> FileStatus:
    is_folder = status["type"] == "DIRECTORY"
    return FileStatus(status["pathSuffix"], status["length"], status["modificationTime"], is_folder)


class _Parts(io.RawIOBase):
    """A file of which each read asks the store for a part."""

    def __init__(self, files: Files, url: str, size: int) -> None:
        self._files, self._url, self._size, self._at = files, url, size, 0

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
        with memoryview(buffer) as target:
            length = min(len(target), self._size - self._at)
            content = self._files.read(self._url, self._at, length) if length > 0 else b""
            target[: len(content)] = content
        self._at += len(content)
        return len(content)


def _path(url: str) -> str:
    """The path of a URL: after the scheme, and the authority if there is one."""
    path = url.partition(":")[2]
    return "/" + path[2:].partition("/")[2] if path.startswith("//") else path


def _forget_checksum(path: Path) -> None:
    """Hadoop keeps a checksum beside each local file that it has written, and refuses the file once that is not its."""
    path.with_name(f".{path.name}.crc").unlink(missing_ok=True)


def _draft_of(url: str) -> str:
    """The URL of a hidden file beside a file, which Spark, Delta and DuckDB pass over."""
    folder, _, name = url.rpartition("/")
    return f"{folder}/.{name}.{uuid4()}.tmp"
