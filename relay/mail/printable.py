"""Makes text from outside safe to show. Pure.

No character of the result moves the cursor, changes the direction of a line, or hides another.
"""

from __future__ import annotations

_JOINERS = "\u200c\u200d"
"""Format characters without which some scripts cannot write their words (RFC 5892 appendix A)."""


def printable(text: str, *, keep: str = "") -> str:
    """The text with each character escaped that is neither printable nor in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def one_line(text: str) -> str:
    """The text on one line: a space for each character of white space, others escaped."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")
