"""Takes secrets out of a text that came from outside. Pure.

A mail host or a token server may repeat in an error text what it was sent: a password, a token, or
a part of one, as it was, in base64, percent-encoding or hex, or as JSON or HTML escape it. Such a
text goes to the log, to the sender's report and to the page, so each part of it that is also a part
of a secret, in upper or lower case, becomes `***`.

A user name is no secret, also where a password begins with it. Their common parts are shown, unless
the password has no other parts.
"""

from __future__ import annotations

import html
import json
import re
import string
from base64 import b64encode
from collections.abc import Iterable
from urllib.parse import quote

MASK = "***"
_LEAST = 8
"""So many characters in common with a secret are hidden. Of a shorter secret, all of it is."""
_SHORTEST = 3
"""A shorter secret is not looked for: every text would contain it."""

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class SecretMask:
    """What must not be shown. `blobs`: octets that contain a secret and are sent in base64.
    `public`: the user name.
    """

    __slots__ = ("_parts", "_short")

    def __init__(
        self, secrets: Iterable[str], blobs: Iterable[bytes] = (), *, public: str = ""
    ) -> None:
        forms = {form for secret in secrets if secret for form in _forms(secret)}
        forms.update(b64encode(blob).decode() for blob in blobs)
        known = _parts(public)
        # A set, since every reply of a host is looked through: that takes microseconds.
        self._parts = frozenset[str]().union(
            *(parts - known or parts for parts in map(_parts, forms))
        )
        short = [form for form in forms if _SHORTEST <= len(form) < _LEAST]
        short.sort(key=len, reverse=True)
        pattern = "|".join(map(re.escape, short))
        self._short = re.compile(pattern, re.IGNORECASE) if short else None

    def __repr__(self) -> str:
        return "SecretMask(…)"

    def masked(self, text: str) -> str:
        """The text without what it has in common with a secret."""
        if self._short is not None:
            text = self._short.sub(MASK, text)
        return self._without_parts(text) if self._parts else text

    def _without_parts(self, text: str) -> str:
        kept: list[str] = []
        lower = _lower(text)
        at = shown = 0
        while at <= len(text) - _LEAST:
            if lower[at : at + _LEAST] not in self._parts:
                at += 1
                continue
            kept += text[shown:at], MASK
            shown = at + _LEAST
            while lower[shown - _LEAST + 1 : shown + 1] in self._parts:
                shown += 1
            at = shown
        return "".join(kept) + text[shown:]


def _lower(text: str) -> str:
    """In lower case, and as long as before: `str.lower` makes some characters longer."""
    return text.lower() if text.isascii() else text.translate(_LOWER)


def _parts(form: str) -> frozenset[str]:
    lower = _lower(form)
    return frozenset(lower[at : at + _LEAST] for at in range(len(lower) - _LEAST + 1))


def _forms(secret: str) -> list[str]:
    """How a secret may be written by who repeats it. In base64 it depends on what stands before."""
    octets = secret.encode("utf-8", "surrogateescape")
    encoded = [b64encode(b"\0" * shift + octets).decode() for shift in range(3)]
    as_json = [json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)]
    as_json += [form.replace("/", r"\/") for form in as_json]  # as PHP does
    as_html = html.escape(secret)
    quoted = [quote(octets, safe=""), quote(octets)]
    return [secret, *quoted, octets.hex(), *as_json, as_html, *encoded]
