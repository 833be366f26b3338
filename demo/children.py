"""The programs that the demo runs beside the services: each with its log, and all ended with the demo."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.settings import PROJECT

# Seconds a program has to end by itself before it is killed: streaming finishes its micro-batch.
PATIENCE = 60.0


class Ended(RuntimeError):
    """A program that should run has ended."""


@dataclass(frozen=True)
class Child:
    """A running program, and the file that takes what it says."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raises Ended, with the end of the log, if the program runs no more."""
        if self.process.poll() is not None:
            raise Ended(f"{self.name} ended with exit code {self.process.returncode}; {self.log} ends:\n{self.tail()}")

    def tail(self, lines: int = 12) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in text[-lines:])

    def stop(self) -> None:
        """Ask the program to end, and wait until it has."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(name: str, command: Sequence[str], folder: Path) -> Child:
    """Start a program in a session of its own, so that Ctrl-C reaches the demo alone, which ends the others in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    return Child(name, log, process)
