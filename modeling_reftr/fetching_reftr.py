"""Fetch an image by its URL, limited in time and size, from public addresses only."""

import contextlib
import ipaddress
import socket
import threading
import time
import urllib.request
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_session


MAX_BYTES = 64 * 1024**2
MAX_SECONDS = 20
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses as written in networks without IPv4


class TimeLimit:
    """
    Close connections after a number of seconds.

    The timeouts of HTTP clients apply to each read, so that a server which sends a byte now and then could hold its
    caller for hours.

    Args:
        seconds (`float`): the time from now on, for all connections together.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.sockets: list[socket.socket] = []
        self.timer = threading.Timer(seconds, self.shut)
        self.timer.daemon = True

    def __enter__(self) -> "TimeLimit":
        self.timer.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.timer.cancel()
        for connection in self.sockets:
            connection.close()

    def remaining(self) -> float:
        """
        Return the remaining seconds.

        Raises:
            OSError: if there are none.
        """
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise OSError(f"it took more than {self.seconds:g} seconds")
        return seconds

    def watch(self, event: str, info: dict[str, Any]) -> None:
        """Keep a second handle of each new connection, as the HTTP client, which calls this, hides its own in TLS."""
        if event.endswith("connect_tcp.complete"):
            self.sockets.append(info["return_value"].get_extra_info("socket").dup())

    def shut(self) -> None:
        """Shut down all connections."""
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)


def fetch(url: str, allow_private: bool = False) -> bytes:
    """
    Return the content at a URL, at most `MAX_BYTES` within `MAX_SECONDS`.

    Args:
        url (`str`): an http or https URL.
        allow_private (`bool`, *optional*, defaults to `False`):
            Whether to accept addresses of this machine or of a private network, also of redirections. Otherwise the
            address is checked, and the connection is made to the address that was checked.

    Raises:
        OSError: if the address is private, the content is too large or too slow, or the server refuses it.
    """
    with TimeLimit(MAX_SECONDS) as limit:
        for _ in range(1 + MAX_REDIRECTS):
            try:
                content, location = request(url, limit, allow_private)
            except Exception:
                limit.remaining()  # report the time limit, whatever error the closed connection caused
                raise
            if location is None:
                return content
            url = urljoin(url, location)
    raise OSError(f"it was redirected more than {MAX_REDIRECTS} times")


def request(url: str, limit: TimeLimit, allow_private: bool) -> tuple[bytes, str | None]:
    """
    Return the content at a URL and None, or the location that it redirects to.

    Raises:
        OSError: see `fetch`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OSError(f"{url[:200]!r} is not an http or https URL with a host: only these are fetched")
    host = parts.netloc.rpartition("@")[2]
    extensions = {"trace": limit.watch}
    if not allow_private:
        address = public_address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        if not is_proxied(parts.scheme, host):  # a proxy resolves the host's name itself
            extensions["sni_hostname"] = parts.hostname.encode("idna").decode("ascii")
            netloc = parts.netloc.removesuffix(host) + (f"[{address}]" if ":" in address else address)
            url = parts._replace(netloc=netloc if parts.port is None else f"{netloc}:{parts.port}").geturl()
    # Request uncompressed content, so that the counted bytes are those kept, on a connection of its own, which the
    # time limit may shut down.
    headers = {"Host": host.encode("idna").decode("ascii"), "Accept-Encoding": "identity", "Connection": "close"}
    with get_session().stream(
        "GET", url, headers=headers, extensions=extensions, timeout=limit.remaining(), follow_redirects=False
    ) as response:
        if response.has_redirect_location:
            return b"", response.headers["location"]
        if response.status_code != 200:
            raise OSError(f"the server responded with the status {response.status_code}")
        declared = response.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > MAX_BYTES:
            raise OSError(f"it has {int(declared):,} bytes, more than {MAX_BYTES:,}")
        content = bytearray()
        for part in response.iter_raw():
            content += part
            if len(content) > MAX_BYTES:
                raise OSError(f"it has more than {MAX_BYTES:,} bytes")
    limit.remaining()  # a connection that was shut down looks like the end of content of unknown length
    return bytes(content), None


def public_address(host: str, port: int) -> str:
    """
    Resolve a host to a public address.

    Raises:
        OSError: if it has no address, or one that is not public.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    addresses = [sockaddr[0] for *_, sockaddr in found]
    for address in addresses:
        if not is_public(address):
            raise OSError(
                f"its host {host!r} is at {address}, and only public addresses are fetched: if this is intended, open "
                "it with open_image(url, allow_private=True)"
            )
    return min(addresses, key=lambda address: ":" in address)  # prefer IPv4, which every network has


def is_public(address: str) -> bool:
    """
    Return whether an IP address belongs to the public internet, not to this machine or a private network.

    Example:

    ```python
    >>> from modeling_reftr.fetching_reftr import is_public

    >>> is_public("8.8.8.8"), is_public("127.0.0.1"), is_public("::ffff:10.0.0.1")
    (True, False, False)

    ```"""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        packed = ip.ipv4_mapped or ip.sixtofour
        ip = packed or (ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip)
    return ip.is_global and not ip.is_multicast


def is_proxied(scheme: str, host: str) -> bool:
    """Return whether the environment names a proxy for a host."""
    return bool({scheme, "all"} & urllib.request.getproxies().keys()) and not urllib.request.proxy_bypass(host)
