"""`scripts/services` as people call it, and ports for services of a test's own."""

from __future__ import annotations

import os
import socket
import subprocess

from conf.settings import PROJECT


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def services_command(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    exported = {f"TICKHOUSE_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.run(
        [PROJECT / "scripts" / "services", *arguments],
        env=os.environ | exported,
        capture_output=True,
        text=True,
        check=False,
    )
