"""Who may come in, and how often: host and origin of a request, the token, the rate."""

from __future__ import annotations

import hmac
import ipaddress
import math
import re
import time
from collections.abc import Callable, Iterable

from diffusionact.errors import SettingsError

LOCAL_NAMES = frozenset({"localhost", "localhost.localdomain"})
# Of what both a WebSocket's subprotocol and a page's address take as it is: `+`, `/` and `=` of
# base64 are no part of the one, and `+` is a space in the other.
TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,}")


class Guard:
    """The rules of one server.

    token: wanted of everyone, None for nobody; names: host names it goes by, beside localhost and
    addresses written as numbers. A page elsewhere that has its own name resolve to this machine
    (DNS rebinding) sends that name as host, and is refused; the page of another site sends its
    own origin, and is refused.
    """

    def __init__(self, token: str | None = None, names: Iterable[str] = ()) -> None:
        check_token(token)
        self._token = token
        self._names = LOCAL_NAMES | {name.lower().rstrip(".") for name in names}

    def knows_host(self, host: str | None) -> bool:
        """Return whether a request's Host header is this server."""
        name = host_name(host)
        return name is not None and (name in self._names or _is_address(name))

    def knows_origin(self, origin: str | None, host: str | None) -> bool:
        """Return whether a request comes from this server's own page, or from no page at all."""
        if origin is None:
            return True
        scheme, _, place = origin.partition("://")
        return scheme in ("http", "https") and host is not None and place.lower() == host.lower()

    def admits(self, token: str | None) -> bool:
        """Return whether this is the token; takes as long for any wrong one."""
        if self._token is None:
            return True
        given, own = ((text or "").encode("utf-8", "replace") for text in (token, self._token))
        return hmac.compare_digest(given, own)


def check_token(token: str | None) -> None:
    """Return nothing. Raises: SettingsError for a token that a page could not send."""
    if token is not None and not TOKEN.fullmatch(token):
        raise SettingsError(
            f"a token of {len(token)} characters; wanted 16 or more, all of them of "
            "A-Z a-z 0-9 . _ ~ -; --token new makes one"
        )


class Bucket:
    """So many at once, and so many a second after that."""

    def __init__(
        self, burst: float, a_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._rate, self._clock = burst, a_second, clock
        self._left, self._then = burst, clock()

    def take(self) -> bool:
        """Return whether one more may happen now, and count it."""
        self._fill()
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    @property
    def is_full(self) -> bool:
        """Whether nothing is remembered of what was taken."""
        self._fill()
        return self._left >= self._burst

    @property
    def wait_s(self) -> float:
        """Until one more may happen."""
        self._fill()
        return max(1.0 - self._left, 0.0) / self._rate

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now


class Arrivals:
    """New connections of every address: so many at once, and so many a second after that.

    What a connection counts begins anew with the next one, and a wrong token costs nothing but a
    connection: so connections are counted too.
    """

    def __init__(
        self, burst: float, a_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._rate, self._clock = burst, a_second, clock
        self._known: dict[str, Bucket] = {}

    def wait_s(self, address: str | None) -> int:
        """Return 0 where one more may come from this address, and count it; else when, s."""
        place = _place(address)
        # A full bucket is as good as none: what is kept is of the last burst / a_second seconds.
        self._known = {k: b for k, b in self._known.items() if k == place or not b.is_full}
        if place not in self._known:
            self._known[place] = Bucket(self._burst, self._rate, self._clock)
        bucket = self._known[place]
        return 0 if bucket.take() else max(math.ceil(bucket.wait_s), 1)


def host_name(host: str | None) -> str | None:
    """Return the name or address in a Host header, without port and brackets; None for none."""
    if not host:
        return None
    if host.startswith("["):
        inside, bracket, port = host[1:].partition("]")
        return inside if bracket and (not port or port.startswith(":")) else None
    name, _, port = host.partition(":")
    return name.lower().rstrip(".") if not port or port.isdigit() else None


def is_local(host: str) -> bool:
    """Return whether a server that binds to this host can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOCAL_NAMES


def _place(address: str | None) -> str:
    """One user's share of the addresses: of IPv6 that is a network, of 64 bits."""
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return address or ""
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
