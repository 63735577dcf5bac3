"""Fetching an image by its URL: limited in time and size, and from public addresses only."""

import contextlib
import ipaddress
import socket
import threading
import time
import urllib.request
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_session


MAX_BYTES = 64 * 1024**2
MAX_SECONDS = 20
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in IPv6, as networks without IPv4 write it


class TimeLimit:
    """
    Ends connections when their time is up. The time limits of HTTP clients are of each read, so that a server which
    sends a byte now and then would keep its caller for hours.

    Args:
        seconds (`float`): from now on, for all connections together.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.sockets = []
        self.timer = threading.Timer(seconds, self.shut)
        self.timer.daemon = True

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        for connection in self.sockets:
            connection.close()

    def remaining(self) -> float:
        """
        Return the seconds that are left.

        Raises:
            OSError: if none are.
        """
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise OSError(f"it took more than {self.seconds:g} seconds")
        return seconds

    def watch(self, event: str, info: dict):
        """Keep a second handle of each new connection; called by the HTTP client, which hides its own behind TLS."""
        if event.endswith("connect_tcp.complete"):
            self.sockets.append(info["return_value"].get_extra_info("socket").dup())

    def shut(self):
        """End all connections."""
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)


def fetch(url: str, allow_private: bool = False) -> bytes:
    """
    Return the content at a URL, at most `MAX_BYTES` within `MAX_SECONDS`.

    Args:
        url (`str`): of http or https.
        allow_private (`bool`, *optional*, defaults to `False`):
            Whether it, or what it redirects to, may be at an address of this machine or of a private network. Without
            that, the address is checked and the connection is made to the one that was checked.

    Raises:
        OSError: if it is at such an address, too large or too slow, or the server does not give it.
    """
    with TimeLimit(MAX_SECONDS) as limit:
        for _ in range(1 + MAX_REDIRECTS):
            try:
                content, location = request(url, limit, allow_private)
            except Exception:
                limit.remaining()  # whatever it raises where its connection was ended
                raise
            if location is None:
                return content
            url = urljoin(url, location)
    raise OSError(f"it was redirected more than {MAX_REDIRECTS} times")


def request(url: str, limit: TimeLimit, allow_private: bool) -> tuple[bytes, str | None]:
    """
    Return the content at a URL and, instead, where it redirects to.

    Raises:
        OSError: see `fetch`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OSError(f"{url[:200]!r} is not a URL of http or https with a host, and nothing else is fetched")
    host = parts.netloc.rpartition("@")[2]
    extensions = {"trace": limit.watch}
    if not allow_private:
        address = public_address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        if not is_proxied(parts.scheme, host):  # a proxy connects by itself, by the host's name
            extensions["sni_hostname"] = parts.hostname.encode("idna").decode("ascii")
            netloc = parts.netloc.removesuffix(host) + (f"[{address}]" if ":" in address else address)
            url = parts._replace(netloc=netloc if parts.port is None else f"{netloc}:{parts.port}").geturl()
    # uncompressed, so that what is counted is what is kept; a connection for this request alone, which may be ended
    headers = {"Host": host.encode("idna").decode("ascii"), "Accept-Encoding": "identity", "Connection": "close"}
    with get_session().stream(
        "GET", url, headers=headers, extensions=extensions, timeout=limit.remaining(), follow_redirects=False
    ) as answer:
        if answer.has_redirect_location:
            return b"", answer.headers["location"]
        if answer.status_code != 200:
            raise OSError(f"the server answers with the status {answer.status_code}")
        declared = answer.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > MAX_BYTES:
            raise OSError(f"it has {int(declared):,} bytes, more than {MAX_BYTES:,}")
        content = bytearray()
        for part in answer.iter_raw():
            content += part
            if len(content) > MAX_BYTES:
                raise OSError(f"it has more than {MAX_BYTES:,} bytes")
    limit.remaining()  # a connection that was ended looks like the end of a content of unknown length
    return bytes(content), None


def public_address(host: str, port: int) -> str:
    """
    Return an address of a host.

    Raises:
        OSError: if it has none, or one of them is not public.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    addresses = [sockaddr[0] for *_, sockaddr in found]
    for address in addresses:
        if not is_public(address):
            raise OSError(
                f"its host {host!r} is at {address}, and only public addresses are fetched: if it is meant, open it "
                "by open_image(url, allow_private=True)"
            )
    return min(addresses, key=lambda address: ":" in address)  # IPv4, where it has one, is there on every network


def is_public(address: str) -> bool:
    """
    Return whether an IP address is one of the public internet, and none of this machine or of a private network.

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
