"""Makes text from outside safe to show. Pure.

No character of the result moves the cursor, changes the direction of a line, or hides another.
"""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, *, keep: str = "") -> str:
    """The text with each character escaped that is neither printable nor in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
