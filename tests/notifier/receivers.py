"""Where notifications arrive: an HTTP server and a mail server on loopback, which can misbehave."""

from __future__ import annotations

import base64
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hook(ThreadingHTTPServer):
    """Keeps what is POSTed; answers with the next of `answers`, then with 204; with nothing from `silent_from` on."""

    def __init__(self, port: int = 0, answers: tuple[int, ...] = ()) -> None:
        self.bodies: list[bytes] = []
        self.asked: list[str] = []
        self.answers = list(answers)
        self.headers: dict[str, str] = {}
        self.silent_from: int | None = None
        self.answer = threading.Event()
        super().__init__(("127.0.0.1", port), _Posted)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Posted(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        status = self.server.answers.pop(0) if self.server.answers else 204
        if status == 204:
            self.server.bodies.append(body)
        if self.server.silent_from == len(self.server.bodies):
            self.server.answer.wait(60)
            return
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Mailbox(socketserver.ThreadingTCPServer):
    """Speaks as much SMTP (RFC 5321) as a client needs; answers MAIL with the next of `answers`, then with 250."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None, *, rude: bool = False) -> None:
        """`context`: offers STARTTLS, and after it AUTH. `rude`: hangs up instead of answering QUIT."""
        self.mails: list[Message] = []
        self.recipients: list[str] = []
        self.logins: list[str] = []
        self.answers: list[int] = []
        self.context = context
        self.rude = rude
        super().__init__(("127.0.0.1", 0), _Session)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not trust us hangs up; it says so itself."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Session(socketserver.StreamRequestHandler):
    server: Mailbox

    def say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())

    def handle(self) -> None:
        secure = False
        self.say("220 mailbox")
        while line := self.rfile.readline().decode().strip():
            command, _, rest = line.partition(" ")
            if command.upper() == "EHLO":
                offered = ["250-mailbox"] + (["250-STARTTLS"] if self.server.context and not secure else [])
                self.say(*offered, "250 AUTH PLAIN" if secure else "250 8BITMIME")
            elif command == "STARTTLS" and self.server.context:
                self.say("220 go ahead")
                self.connection = self.server.context.wrap_socket(self.request, server_side=True)
                self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
                secure = True
            elif command == "AUTH":
                self.server.logins.append(base64.b64decode(rest.split()[1]).decode())
                self.say("235 welcome")
            elif command.upper() == "MAIL" and self.server.answers:
                self.say(f"{self.server.answers.pop(0)} not you")
            elif command.upper() == "RCPT":
                self.server.recipients.append(rest)
                self.say("250 ok")
            elif command.upper() == "DATA":
                self.say("354 go on")
                lines = iter(self.rfile.readline, b".\r\n")
                self.server.mails.append(message_from_bytes(b"".join(text.removeprefix(b".") for text in lines)))
                self.say("250 taken")
            elif command.upper() == "QUIT":
                if not self.server.rude:
                    self.say("221 bye")
                return
            else:
                self.say("250 ok")


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
