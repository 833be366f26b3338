"""Where the running programs answer: each has a file in STATE_DIR/run, by which `scripts/status` finds it.

A file is JSON: program, pid, started (Unix seconds), url. A program that ends removes its file. One that was killed
leaves it behind, and the next start of the same program removes it.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil

log = logging.getLogger(__name__)

# A clock that is set moves the time at which a process seems to have begun.
SAME_START_SECONDS = 60.0
ANSWER_SECONDS = 5.0
ANSWER_BYTES = 16 << 20
_DIRECT = build_opener(ProxyHandler({}))


@dataclass(frozen=True)
class Address:
    """Where a program answers. started: when its process began, in Unix seconds."""

    program: str
    pid: int
    started: float
    url: str

    @property
    def is_alive(self) -> bool:
        """Whether the process runs. Another process with the same number is not taken for it."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < SAME_START_SECONDS
        except psutil.NoSuchProcess:
            return False


def own_address(program: str, url: str) -> Address:
    """The address of this process."""
    return Address(program, os.getpid(), psutil.Process().create_time(), url)


def run_file(state_dir: Path, program: str) -> Path:
    """Where this process says that it answers."""
    return state_dir / "run" / f"{program}-{os.getpid()}.json"


def write_address(path: Path, address: Address) -> None:
    """Write the file whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(json.dumps(asdict(address)), encoding="utf-8")
    draft.replace(path)


def read_address(path: Path) -> Address | None:
    """None where there is no such file, or it is no address."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Address(str(content["program"]), int(content["pid"]), float(content["started"]), str(content["url"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def addresses(state_dir: Path) -> list[Address]:
    """The addresses of the programs with this state folder, of killed ones too."""
    read = map(read_address, sorted((state_dir / "run").glob("*.json")))
    return [address for address in read if address is not None]


def remove_dead(state_dir: Path, program: str) -> None:
    """Remove what killed processes of a program have left behind."""
    for path in (state_dir / "run").glob(f"{program}-*.json"):
        address = read_address(path)
        if address is not None and not address.is_alive:
            with suppress(OSError):
                path.unlink()


def ask(url: str, seconds: float = ANSWER_SECONDS, method: str = "GET") -> tuple[int, bytes]:
    """A page of a program on this machine: HTTP status and body. Raises OSError.

    A proxy is never asked, whatever the environment says. seconds: the longest silence that is waited for.
    """
    try:
        with _DIRECT.open(Request(url, method=method), timeout=seconds) as answer:
            return answer.status, answer.read(ANSWER_BYTES)
    except HTTPError as error:
        with error:
            return error.code, error.read(ANSWER_BYTES)
    except HTTPException as error:
        raise OSError(f"{url}: what answers is no web server of ours: {error!r}") from error
