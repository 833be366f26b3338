"""Send Kafka's alerts by webhook and e-mail: `TICKHOUSE_WEBHOOK_URL=https://... python -m notifier`

The notifier sends each alert once, when its episode opens, by HTTP POST (webhook_url), by e-mail (smtp_host, smtp_from,
smtp_to), or both. It retries until the alert is older than alert_stale_seconds, and sends no older alert. It may send
an alert twice only after a crash just after sending, or if the receiver's answer is lost. The webhook's address and
smtp_password come from the environment or the settings file, never from a flag. The notifier runs until SIGINT or
SIGTERM; a second signal ends it at once.

Exit codes: 0 stopped by a signal; 2 wrong settings, or no channel; 4 another notifier
uses the same folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from conf.logs import set_up_logging
from conf.settings import USAGE_ERROR, Settings, SettingsError, arguments, from_command_line
from notifier.channels import channels
from notifier.delivery import Delivery
from notifier.sent_alerts import SentAlerts
from notifier.status import Subject
from operation.server import Server

log = logging.getLogger("notifier")

IN_USE, KILLED = 4, 130
FLAGS = (
    "kafka_bootstrap_servers", "alerts_topic", "alert_stale_seconds", "smtp_host", "smtp_port", "smtp_tls", "smtp_from",
    "smtp_to", "smtp_user", "state_dir", "notifier_metrics_port", "stream_stale_seconds", "log_format",
)  # fmt: skip


class InUse(Exception):
    """Another notifier of this topic runs with the same state folder."""


def notify(settings: Settings) -> int:
    """Run until a signal, and return the exit code. Raises SettingsError and InUse."""
    ways = channels(settings)
    stop = _stop_on_signal()
    with _own_folder(settings.state_dir / "notifier" / settings.alerts_topic) as folder:
        try:
            parts = [Delivery(settings, way, SentAlerts(folder / f"{way.name}.ids"), stop) for way in ways]
        except OSError as error:
            raise SettingsError(f"state_dir: {error}") from error
        log.info("telling of %s by %s", settings.alerts_topic, " and ".join(way.name for way in ways))
        subject = Subject(
            settings, {way.name: (part.figures, part.group) for way, part in zip(ways, parts, strict=True)}
        )
        for lag in subject.lags.values():
            lag.start()
        server = Server("notifier", settings.notifier_metrics_port, subject, settings.state_dir, or_any=True)
        with server, ThreadPoolExecutor(len(parts)) as pool:
            for run in [pool.submit(part.run) for part in parts]:
                run.result()
    return 0


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """A folder that no other notifier uses meanwhile. Raises SettingsError and InUse."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise SettingsError(f"state_dir: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InUse(f"another notifier uses {folder} (state_dir), and sends these alerts") from None
        yield folder


def _stop_on_signal() -> threading.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(KILLED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, *FLAGS)
    parser.prog = "python -m notifier"
    settings, _ = from_command_line(parser, argv)
    set_up_logging(settings.log_format)
    try:
        return notify(settings)
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except InUse as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return IN_USE


if __name__ == "__main__":
    sys.exit(main())
