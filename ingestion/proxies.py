"""Which connections go through a proxy: those to a venue on another machine, where the setting venue_proxy names one.

The environment's proxies (http_proxy and the like) are ignored: requests to this machine must not leave it, and a proxy
that cuts idle connections would cut a feed.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from pydantic import SecretStr


def proxy_of(url: str, venue_proxy: SecretStr | None) -> str | None:
    """The proxy for this address, which may hold a password; None: connect directly."""
    return None if venue_proxy is None or is_here(url) else venue_proxy.get_secret_value()


def is_here(url: str) -> bool:
    """Whether an address is on this machine."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)
