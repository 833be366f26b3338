"""The ways to tell somebody: an HTTP POST, and e-mail.

What fails is told as one of two kinds: NotNow, where another attempt may help, and Refused, where it does not. Neither
says an address, a password or what the other side wrote: an address may hold a key.
"""

from __future__ import annotations

import hashlib
import smtplib
import ssl
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import TYPE_CHECKING, Protocol

import httpx

from conf.settings import SettingsError

if TYPE_CHECKING:
    from conf.settings import Settings
    from notifier.alerts import Alert

TIMEOUT_SECONDS = 10.0
# What HTTP says of a request that would do at another time: timeout, too early, too many.
AGAIN = (408, 425, 429)


class NotNow(Exception):
    """Not told; perhaps `wait` seconds later, or sooner than that if it does not say so."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """The same notification will be refused again."""


class Channel(Protocol):
    """A way to tell somebody."""

    @property
    def name(self) -> str: ...

    def send(self, alert: Alert) -> None:
        """Returns when the other side has taken it. Raises NotNow or Refused."""

    def close(self) -> None:
        """Let go of connections."""


class Webhook:
    """The row's JSON, as it came, in an HTTP POST; any 2xx is thanks."""

    name = "webhook"

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = httpx.Client(
            # What is on this machine is not behind the environment's proxy.
            mounts={"all://127.0.0.1": None},
            timeout=TIMEOUT_SECONDS,
            headers={"Content-Type": "application/json"},
            follow_redirects=False,
        )

    def send(self, alert: Alert) -> None:
        try:
            # A stream, because nobody reads the body of the answer, however long it is.
            with self._client.stream("POST", self._url, content=alert.json) as answer:
                status, retry_after = answer.status_code, answer.headers.get("Retry-After", "")
        except httpx.InvalidURL:
            raise Refused("webhook_url is not a URL") from None
        except httpx.HTTPError as error:
            raise NotNow(type(error).__name__) from None
        if status >= 500 or status in AGAIN:
            raise NotNow(f"HTTP {status}", float(retry_after) if retry_after.isdecimal() else 0.0)
        if not 200 <= status < 300:
            raise Refused(f"HTTP {status}")

    def close(self) -> None:
        self._client.close()


class Email:
    """A short message, with the row's JSON below it, in a connection of its own."""

    name = "email"

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the settings do not make a message."""
        if not (settings.smtp_host and settings.smtp_from and settings.smtp_to):
            raise SettingsError("smtp_host, smtp_from and smtp_to: e-mail needs all three")
        if (settings.smtp_user is None) != (settings.smtp_password is None):
            raise SettingsError("smtp_user and smtp_password: set both or neither")
        if settings.smtp_password is not None and settings.smtp_tls == "none":
            raise SettingsError("smtp_tls: smtp_password is not sent in the clear; set starttls or tls")
        self._address = (settings.smtp_host, settings.smtp_port)
        self._tls = settings.smtp_tls
        self._from, self._to = settings.smtp_from, settings.smtp_to
        self._user, self._password = settings.smtp_user, settings.smtp_password

    def send(self, alert: Alert) -> None:
        taken = False
        try:
            with self._connected() as server:
                if self._tls == "starttls":
                    server.starttls(context=ssl.create_default_context())
                if self._user is not None and self._password is not None:
                    server.login(self._user, self._password.get_secret_value())
                server.send_message(self.message(alert), self._from, self._to)
                taken = True
        except (smtplib.SMTPException, OSError) as error:
            # A server that has taken the message and then forgets its manners has taken it.
            if not taken:
                raise _told(error) from None

    def _connected(self) -> smtplib.SMTP:
        host, port = self._address
        if self._tls == "tls":
            return smtplib.SMTP_SSL(host, port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context())
        return smtplib.SMTP(host, port, timeout=TIMEOUT_SECONDS)

    def message(self, alert: Alert) -> EmailMessage:
        """The same alert has the same Message-ID, by which a mail program may know a repeat."""
        message = EmailMessage()
        message["Subject"] = f"{alert.asset} {alert.direction} {alert.change_pct:.2f} % at {alert.source}"
        message["From"] = self._from
        message["To"] = ", ".join(self._to)
        message["Date"] = format_datetime(datetime.now(UTC))
        message["Message-ID"] = f"<{hashlib.sha256(alert.alert_id.encode()).hexdigest()[:32]}@tickhouse>"
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(
            f"{alert.asset} at {alert.source}: {alert.direction} {alert.change_pct:.2f} %,\n"
            f"from {alert.reference_price} to {alert.trigger_price} USD at {alert.opened_at.isoformat()}.\n\n"
            f"{alert.json.decode()}\n"
        )
        return message

    def close(self) -> None:
        """There is nothing open between two messages."""


def _told(error: Exception) -> NotNow | Refused:
    """SMTP's own rule: 4xx may pass, 5xx does not."""
    codes = []
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    elif isinstance(error, smtplib.SMTPResponseException):
        codes = [error.smtp_code]
    reason = f"{type(error).__name__} {' '.join(map(str, codes))}".strip()
    lasting = isinstance(error, smtplib.SMTPNotSupportedError) or (codes and min(codes) >= 500)
    return Refused(reason) if lasting else NotNow(reason)


def channels(settings: Settings) -> list[Channel]:
    """Those that are configured. Raises SettingsError where there is none, or one that cannot be used."""
    found: list[Channel] = []
    if settings.webhook_url is not None:
        found.append(Webhook(settings.webhook_url.get_secret_value()))
    if settings.smtp_host is not None:
        found.append(Email(settings))
    if not found:
        raise SettingsError(
            "nobody to tell: set webhook_url (in the environment, TICKHOUSE_WEBHOOK_URL) for HTTP POSTs, "
            "or smtp_host, smtp_from and smtp_to for e-mail"
        )
    return found
