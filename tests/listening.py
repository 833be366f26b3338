"""Who listens where: for tests that everything stays on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import psutil


def family(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes with all their descendants that live."""
    found: dict[int, psutil.Process] = {}
    for process in processes:
        try:
            found |= {member.pid: member for member in (process, *process.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def listeners(processes: Iterable[psutil.Process]) -> dict[tuple[str, int], str]:
    """(address, port) of every TCP or UDP socket on which a process waits for others -> the process's command."""
    found: dict[tuple[str, int], str] = {}
    for process in processes:
        try:
            command = " ".join(process.cmdline())
            for connection in process.net_connections("inet"):
                # A UDP socket has no state; one without a peer receives from anybody.
                if connection.status == psutil.CONN_LISTEN or (
                    connection.status == psutil.CONN_NONE and not connection.raddr
                ):
                    found[connection.laddr.ip, connection.laddr.port] = command
        except psutil.NoSuchProcess:
            continue
    return found


def beyond_loopback(found: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """The listeners that another machine could reach."""
    return {where: who for where, who in found.items() if not _is_loopback(where[0])}


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    # An IPv6 socket of Java that is bound to an IPv4 address shows as ::ffff:127.0.0.1.
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback
