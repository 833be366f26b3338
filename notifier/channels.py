"""The channels: HTTP POST and e-mail.

A failed attempt raises NotNow if a retry may help, else Refused. Their messages contain no address, password or text
from the other side: an address may contain a key.
"""

from __future__ import annotations

import hashlib
import re
import smtplib
import ssl
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import TYPE_CHECKING, Protocol

import httpx

from conf.settings import SettingsError
from conf.text import shown

if TYPE_CHECKING:
    from conf.settings import Settings
    from notifier.alerts import Alert

TIMEOUT_SECONDS = 10.0
# HTTP statuses that allow a retry: timeout, too early, too many requests.
AGAIN = (408, 425, 429)


class NotNow(Exception):
    """The attempt failed; a retry may help. wait: the least seconds before it, if the other side gave any."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """The other side refuses the notification for good."""


class Channel(Protocol):
    """A way to send alerts."""

    @property
    def name(self) -> str: ...

    def send(self, alert: Alert) -> None:
        """Send an alert; returns once the other side has accepted it. Raises NotNow or Refused."""

    def close(self) -> None:
        """Close connections."""


class Webhook:
    """POSTs the alert's original JSON; any 2xx status means accepted."""

    name = "webhook"

    def __init__(self, url: str) -> None:
        """Raises SettingsError, without the URL, if no request can be sent to it."""
        try:
            self._url = httpx.URL(url)
            self._url.raw_host.decode().encode("idna")
        except (httpx.InvalidURL, UnicodeError):
            raise SettingsError("webhook_url: it is not a valid URL (its value is not shown)") from None
        self._client = httpx.Client(
            # Do not use the environment's proxy for this machine.
            mounts={"all://127.0.0.1": None},
            timeout=TIMEOUT_SECONDS,
            headers={"Content-Type": "application/json"},
            follow_redirects=False,
        )

    def send(self, alert: Alert) -> None:
        try:
            # A stream: we do not read the answer's body, which may be long.
            with self._client.stream("POST", self._url, content=alert.json) as answer:
                status, retry_after = answer.status_code, answer.headers.get("Retry-After", "")
        except httpx.HTTPError as error:
            raise NotNow(type(error).__name__) from None
        if status >= 500 or status in AGAIN:
            raise NotNow(f"HTTP {status}", float(retry_after) if retry_after.isdecimal() else 0.0)
        if not 200 <= status < 300:
            raise Refused(f"HTTP {status}")

    def close(self) -> None:
        self._client.close()


class Email:
    """Sends a short message with the alert's JSON below it, in a connection per message."""

    name = "email"

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if the settings are incomplete or contradictory."""
        if not (settings.smtp_host and settings.smtp_from and settings.smtp_to):
            raise SettingsError("smtp_host, smtp_from and smtp_to: e-mail needs all three")
        if (settings.smtp_user is None) != (settings.smtp_password is None):
            raise SettingsError("smtp_user and smtp_password: set both or neither")
        if settings.smtp_password is not None and settings.smtp_tls == "none":
            raise SettingsError("smtp_tls: smtp_password is not sent in the clear; set starttls or tls")
        try:
            settings.smtp_host.encode("idna")
        except UnicodeError:
            raise SettingsError(f"smtp_host: {shown(settings.smtp_host)} is not the name of a host") from None
        password = None if settings.smtp_password is None else settings.smtp_password.get_secret_value()
        for name, value in (("smtp_user", settings.smtp_user), ("smtp_password", password)):
            # smtplib encodes both as ASCII, and PLAIN (RFC 4616) separates them by NUL.
            if value is not None and not re.fullmatch("[ -~]+", value):
                raise SettingsError(f"{name}: SMTP takes printable ASCII characters only (its value is not shown)")
        self._address = (settings.smtp_host, settings.smtp_port)
        self._tls = settings.smtp_tls
        self._from, self._to = settings.smtp_from, settings.smtp_to
        self._user, self._password = settings.smtp_user, settings.smtp_password

    def send(self, alert: Alert) -> None:
        is_accepted = False
        try:
            with self._connected() as server:
                if self._tls == "starttls":
                    server.starttls(context=ssl.create_default_context())
                if self._user is not None and self._password is not None:
                    server.login(self._user, self._password.get_secret_value())
                server.send_message(self.message(alert), self._from, self._to)
                is_accepted = True
        except (smtplib.SMTPException, OSError) as error:
            # The server accepted the message: an error after that changes nothing.
            if not is_accepted:
                raise _failure_of(error) from None

    def _connected(self) -> smtplib.SMTP:
        host, port = self._address
        if self._tls == "tls":
            return smtplib.SMTP_SSL(host, port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context())
        return smtplib.SMTP(host, port, timeout=TIMEOUT_SECONDS)

    def message(self, alert: Alert) -> EmailMessage:
        """The message. Its Message-ID depends only on the alert, so a mail program can recognise a repeat."""
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
        """No connection stays open between messages."""


def _failure_of(error: Exception) -> NotNow | Refused:
    """Classify by SMTP's rule: 4xx is temporary, 5xx is permanent."""
    codes = []
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    elif isinstance(error, smtplib.SMTPResponseException):
        codes = [error.smtp_code]
    reason = f"{type(error).__name__} {' '.join(map(str, codes))}".strip()
    lasting = isinstance(error, smtplib.SMTPNotSupportedError) or (codes and min(codes) >= 500)
    return Refused(reason) if lasting else NotNow(reason)


def channels(settings: Settings) -> list[Channel]:
    """The configured channels. Raises SettingsError if there is none, or one is misconfigured."""
    ways: list[Channel] = []
    if settings.webhook_url is not None:
        ways.append(Webhook(settings.webhook_url.get_secret_value()))
    if settings.smtp_host is not None:
        ways.append(Email(settings))
    if not ways:
        raise SettingsError(
            "nobody to tell: set webhook_url (in the environment, TICKHOUSE_WEBHOOK_URL) for HTTP POSTs, "
            "or smtp_host, smtp_from and smtp_to for e-mail"
        )
    return ways
