"""Decides whether a page of another site makes a browser send a request. Pure.

A browser that knows the key sends it with the requests of every page, also with forms, for which it
asks nobody (no preflight, Fetch §3.2). Such a request must not change anything. Browsers since 2023
send `Sec-Fetch-Site`, those since 2019 the origin (RFC 6454 §7), and nearly all the page (RFC 9110
§10.1.3). Each of these fields that is there has to name this site. A client that is no browser
sends none of them, and is not affected.

A site is host and port. The scheme does not count, because a proxy in front may add TLS.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

_OURS = ("same-origin", "none")
"""`none`: the user typed the URL, or used a bookmark."""


def is_foreign(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a page of another site sends a request that only this site may send."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return False  # changes nothing, and the other page cannot read the answer
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
