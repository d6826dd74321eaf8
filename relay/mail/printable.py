"""Text of a stranger's, fit to be shown: nothing in it moves a cursor, turns a line around or hides
one. Pure.
"""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, *, keep: str = "") -> str:
    """The text with what is no printable character escaped, but for the characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
