"""Takes secrets out of a text that came from outside. Pure.

A mail host or a token server may repeat in an error text what it was sent: a password, a token, or
a part of one, as it was or in base64 or percent-encoding. Such a text goes to the log, to the
sender's report and to the page, so each part of it that is also a part of a secret becomes `***`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from urllib.parse import quote

__all__ = ["MASK", "Secrets"]

MASK = "***"
_LEAST = 8
"""So many characters in common with a secret are hidden. Of a shorter secret, all of it is."""
_SHORTEST = 3
"""A shorter secret is not looked for: every text would contain it."""


class Secrets:
    """What must not be shown. `blobs`: octets that contain a secret and are sent in base64."""

    __slots__ = ("_parts", "_short")

    def __init__(self, secrets: Iterable[str], blobs: Iterable[bytes] = ()) -> None:
        forms = {form for secret in secrets if secret for form in _forms(secret)}
        forms.update(b64encode(blob).decode() for blob in blobs)
        # A set, since every reply of a host is looked through: that takes microseconds.
        self._parts = frozenset(
            form[at : at + _LEAST] for form in forms for at in range(len(form) - _LEAST + 1)
        )
        self._short = sorted(
            (form for form in forms if _SHORTEST <= len(form) < _LEAST), key=len, reverse=True
        )

    def __repr__(self) -> str:
        return "Secrets(…)"

    def masked(self, text: str) -> str:
        """The text without what it has in common with a secret."""
        for form in self._short:
            text = text.replace(form, MASK)
        return self._without_parts(text) if self._parts else text

    def _without_parts(self, text: str) -> str:
        kept: list[str] = []
        at = shown = 0
        while at <= len(text) - _LEAST:
            if text[at : at + _LEAST] not in self._parts:
                at += 1
                continue
            kept += text[shown:at], MASK
            shown = at + _LEAST
            while text[shown - _LEAST + 1 : shown + 1] in self._parts:
                shown += 1
            at = shown
        return "".join(kept) + text[shown:]


def _forms(secret: str) -> list[str]:
    """How a secret may be written by who repeats it. In base64 it depends on what stands before."""
    octets = secret.encode("utf-8", "surrogateescape")
    encoded = [b64encode(b"\0" * shift + octets).decode() for shift in range(3)]
    return [secret, quote(octets, safe=""), quote(octets), *encoded]
