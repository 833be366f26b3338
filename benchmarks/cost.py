"""What a command costs: `python -m benchmarks.cost COMMAND [ARGUMENT ...]`

Prints one line of JSON when the command and all that it started have ended: the command's exit code, seconds of wall
clock, processor seconds (user and system), and the most memory at one time in MB. The command's own output goes to
stderr.

Processor time is what the kernel tells of each process when it has ended, so that no short-lived one is missed: who
loses its parent, as Spark's JVM does, becomes a child of this program (a subreaper), which waits for it. Memory is
looked at five times a second: resident sizes, added up over all processes, so what they share counts more than once.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36
LOOK_EVERY = 0.2


class Memory(threading.Thread):
    """Looks at the memory of all that runs below this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        here = psutil.Process()
        while True:
            self.peak = max(self.peak, sum(map(resident, here.children(recursive=True))))
            time.sleep(LOOK_EVERY)


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def cost(command: list[str]) -> dict[str, float]:
    """Run the command; of this process's children, only its tree may run."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    memory = Memory()
    memory.start()
    began = time.monotonic()
    to_stderr = [(os.POSIX_SPAWN_DUP2, 2, 1)]
    first = os.posix_spawnp(command[0], command, os.environ, file_actions=to_stderr)
    exit_code, cpu = 0, 0.0
    while True:
        try:
            pid, status, used = os.wait4(-1, 0)
        except ChildProcessError:
            break
        cpu += used.ru_utime + used.ru_stime
        if pid == first:
            exit_code = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": exit_code,
        "seconds": round(time.monotonic() - began, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(memory.peak / 1e6),
    }


if __name__ == "__main__":
    print(json.dumps(cost(sys.argv[1:])))
