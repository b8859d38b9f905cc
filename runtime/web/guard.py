"""Who may come in: host and origin of a request, the token, and how often something may happen."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable

from diffusionact.errors import SettingsError

LOCAL_NAMES = frozenset({"localhost", "localhost.localdomain"})
LEAST_TOKEN = 16  # characters


class Guard:
    """The rules of one server.

    token: wanted of everyone, None for nobody; names: host names it goes by, beside localhost and
    addresses written as numbers. A page elsewhere that has its own name resolve to this machine
    (DNS rebinding) sends that name as host, and is refused; the page of another site sends its
    own origin, and is refused.
    """

    def __init__(self, token: str | None = None, names: Iterable[str] = ()) -> None:
        if token is not None and len(token) < LEAST_TOKEN:
            raise SettingsError(
                f"a token of {len(token)} characters; wanted {LEAST_TOKEN} or more, say: "
                'python -c "import secrets; print(secrets.token_urlsafe())"'
            )
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


class Bucket:
    """So many at once, and so many a second after that."""

    def __init__(
        self, burst: float, a_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._rate, self._clock = burst, a_second, clock
        self._left, self._then = burst, clock()

    def take(self) -> bool:
        """Return whether one more may happen now, and count it."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


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


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
