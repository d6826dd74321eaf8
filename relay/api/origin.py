"""Whether a request is one that a page of another site makes with its reader's browser. Pure.

A browser that once was given the key sends it along with whatever any page asks for: with forms,
too, which need nobody's leave (no preflight, Fetch §3.2). Such a request must change nothing. Of
browsers, those since 2023 say where a request comes from (`Sec-Fetch-Site`), those since 2019 from
which origin (RFC 6454 §7), and nearly all from which page (RFC 9110 §10.1.3); each that is there
has to name this site. A client that is no browser says nothing of this and is not held up.

The site is host and port. The scheme is left out, since a proxy may make TLS of its own before us.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

__all__ = ["is_foreign"]

_OURS = ("same-origin", "none")
"""`none`: typed, or a bookmark."""


def is_foreign(method: str, headers: Mapping[str, str]) -> bool:
    """Whether another site asks for something that only this one's pages may ask for."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return False  # changes nothing, and the page that asked cannot read the answer
    if headers.get("Sec-Fetch-Site", "none") not in _OURS:
        return True
    host = headers.get("Host", "").lower()
    return any(
        _site(headers[name]) != _without_default_port(host)
        for name in ("Origin", "Referer")
        if name in headers
    )


def _site(url: str) -> str | None:
    """Host and port of an origin or a page; None where it has none (`null`)."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc or "\\" in parts.netloc:
        return None  # to a browser a backslash ends the host (WHATWG URL §4.4)
    return _without_default_port(parts.netloc.rpartition("@")[2].lower())


def _without_default_port(host: str) -> str:
    return host.removesuffix(":443").removesuffix(":80")
