"""Who may speak to this server: by which name it is reached, from which page, from which address.

A browser carries out what any page on the web tells it, also towards a server on the same machine. So a request has to
name this server as its host (a page cannot make a name of its own point here: DNS rebinding), and must not come from
another site's page. Both are told by headers that pages cannot forge: ``Host``, ``Origin`` (RFC 6454) and
``Sec-Fetch-*`` (W3C Fetch Metadata). Programs that send neither of the last two are no browsers and are let through.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from sumuk.base.errors import BadInput
from sumuk.serve.config import ServeConfig
from sumuk.serve.trouble import Refused, refused

Heads = Mapping[str, Sequence[str]]
"""Header names in lower case -> their values."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""
PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]?#]+)(?::(\d{1,5}))?", re.IGNORECASE)
_ORIGIN = re.compile(r"(https?)://([^/?#]+)", re.IGNORECASE)


class Sites:
    """The names, pages and addresses that one server believes.

    Raises:
        BadInput: a host, origin or proxy of the configuration is none.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.names = {config.host.lower(): None}
        self.public: dict[str, int | None] = {}
        for each in config.hosts:
            name, port = _place(each, f"host {each!r}: a name as in 'draw.example' or 'draw.example:8443'")
            self.public[name] = port
        self.everywhere = _address(config.host) in {
            ipaddress.ip_address("0.0.0.0"),
            ipaddress.ip_address("::"),
        }
        site = "a site as in 'https://sso.example'"
        self.origins = {_origin(each, f"origin {each!r}: {site}") for each in config.origins}
        self.proxies = [_network(each) for each in config.proxies]

    def check_host(self, heads: Heads, own_address: str | None) -> None:
        """Whether the request is meant for this server.

        Args:
            heads: its headers.
            own_address: on which it came in; where the server listens on all, that is a name too.

        Raises:
            Refused: ``foreign-host``.
        """
        said = heads.get("host", ())
        try:
            (host,) = said
            name, _ = _place(host, "")
        except (ValueError, BadInput):
            raise refused("foreign-host", f"{_shown(said)} is not one name of a host") from None
        address = _address(name)
        if address is None:
            known = name == "localhost" or name in self.names or name in self.public
        else:
            known = address.is_loopback or str(address) in (*self.names, *self.public)
            known = known or (self.everywhere and address == _address(own_address or ""))
        if not known:
            raise refused(
                "foreign-host",
                f"this server is not known as {_shown(said)}; if it is meant to be, start it with that among its hosts",
            )

    def check_origin(self, method: str, scheme: str, heads: Heads) -> str | None:
        """Whether the request comes from no other site's page.

        Args:
            method: of HTTP.
            scheme: by which it came; behind a proxy that ends TLS it is http.
            heads: its headers; the host has been checked.

        Returns:
            The origin, if it is another site's that is allowed, to be named in the answer.

        Raises:
            Refused: ``foreign-origin``.
        """
        said = heads.get("origin", ())
        site = _one(heads, "sec-fetch-site")
        if said:
            try:
                origin = _origin(said[0] if len(said) == 1 else "", "")
            except BadInput:
                origin = None
            if origin is not None and origin in self.origins:
                return said[0]
            own = origin is not None and self._own(origin, scheme, heads["host"][0])
            if not own and method not in SAFE:
                raise _foreign(f"a page of {_shown(said)}")
            if own and site in ("", "same-origin", "same-site", "cross-site", "none"):
                return None
        if site in ("", "same-origin", "none"):
            return None
        top_level = (
            _one(heads, "sec-fetch-mode") == "navigate" and _one(heads, "sec-fetch-dest") == "document"
        )
        if method not in SAFE or not top_level:
            raise _foreign(f"a {site[:20]} page")
        return None

    def _own(self, origin: tuple[str, str, int], scheme: str, host: str) -> bool:
        """Whether an origin is this server as the request names it, or under one of its public names."""
        by, name, port = origin
        if scheme == "https" and by == "http":
            return False
        host_name, host_port = _place(host, "")
        if name == host_name and port == (host_port or PORTS[by]):
            return True
        return name in self.public and port == (self.public[name] or PORTS[by])

    def address(self, peer: str | None, heads: Heads) -> str:
        """Where a request comes from: its peer, or what a proxy of ours says of it.

        The last entry of ``X-Forwarded-For`` that is no proxy of ours is the one that ours have seen; those before it
        are only what that one said.
        """
        found = peer or "unknown"
        said = ",".join(heads.get("x-forwarded-for", ())).split(",")
        while self._is_proxy(found) and said:
            before = _address(said.pop().strip())
            if before is None:
                break
            found = str(before)
        return found

    def _is_proxy(self, text: str) -> bool:
        address = _address(text)
        return address is not None and any(address in network for network in self.proxies)


def _place(text: str, what: str) -> tuple[str, int | None]:
    """Name and port of an authority; addresses in their usual spelling."""
    found = _AUTHORITY.fullmatch(text)
    if found is None or int(found[2] or 0) > 65535:
        raise BadInput(f"{what} is wanted")
    name = found[1].lower().strip("[]").rstrip(".")
    address = _address(name)
    return name if address is None else str(address), int(found[2]) if found[2] else None


def _origin(text: str, what: str) -> tuple[str, str, int]:
    found = _ORIGIN.fullmatch(text.strip())
    if found is None:
        raise BadInput(f"{what} is wanted")
    scheme = found[1].lower()
    name, port = _place(found[2], what)
    return scheme, name, port or PORTS[scheme]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped or found


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise BadInput(
            f"proxy {text!r}: an address as 10.0.0.2 or a network as 10.0.0.0/8 is wanted"
        ) from None


def _one(heads: Heads, name: str) -> str:
    """A header that browsers send once; said otherwise, it is taken for the worst."""
    said = heads.get(name, ())
    return "" if not said else said[0].strip().lower() if len(said) == 1 else "cross-site"


def _shown(said: Iterable[str]) -> str:
    return repr(", ".join(said))[:120]


def _foreign(whose: str) -> Refused:
    return refused(
        "foreign-origin",
        f"the request comes from {whose}; if that is meant to call, start the server with it among its origins",
    )
