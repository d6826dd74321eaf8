"""An SMTP reply: three digits, an enhanced status code where there is one, and text.

Source: RFC 5321 §4.2 (replies), RFC 2034 §4 and RFC 3463 §2 (enhanced codes). The relay
ignores an enhanced code whose class contradicts the reply code.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.mail.record import record

_ENHANCED = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})(?:[ \t]+|$)")


@record(frozen=True, slots=True)
class Reply:
    """`code` 200…599; `status` as in RFC 3463, "" without one; `text` without both.

    The lines of a multi-line text are separated by LF.
    """

    code: int
    status: str
    text: str

    def __str__(self) -> str:
        return " ".join(part for part in (str(self.code), self.status, self.text) if part)

    def encode(self) -> bytes:
        """The octets of the reply: every line has the code and the status (RFC 2034 §4)."""
        prefix = f" {self.status} " if self.status else " "
        lines = self.text.split("\n") or [""]
        parts = [f"{self.code}-{prefix[1:]}{line}\r\n" for line in lines[:-1]]
        parts.append(f"{self.code}{prefix}{lines[-1]}\r\n")
        return "".join(parts).encode("utf-8", "replace")


@lru_cache(maxsize=256)  # a host says the same of most messages
def parse_reply(code: int, text: str) -> Reply:
    """A peer's reply, with its enhanced status taken out of the text.

    RFC 2034 §4: the class of the enhanced code has to be the first digit of the reply
    code. An enhanced code of another class stays in the text, and `status` is "".
    """
    match = _ENHANCED.match(text)
    if match is None or match[1] != str(code)[:1]:
        return Reply(code, "", text)
    status = match[0].rstrip()
    lines = text.split("\n")
    stripped = [line[len(status) :].lstrip() if line.startswith(status) else line for line in lines]
    return Reply(code, status, "\n".join(stripped))
