"""The header fields by which a message asks for a level of security.

They are `X-Require-TLS` and `X-Skip-Verification`, each with an alias. The values are true yes 1
on, false no 0 off, in any case and with white space and folding around them. Any other value, and
two fields that contradict each other, raise `BadField`: the relay refuses a message whose wish for
protection it does not understand, and never sends it without protection. Only the header section
counts (`relay.mail.section`). All four fields are removed before the message goes on: the next
hop does not need to know whether the relay checks its certificate.
"""

from __future__ import annotations

import re
from dataclasses import replace

from relay.mail.header import unfold
from relay.mail.record import record
from relay.mail.section import FoundField, HeaderSection, lines_like_fields

_REQUIRE_TLS = frozenset({b"X-Require-TLS", b"X-Mailgun-Require-TLS"})
_SKIP_VERIFICATION = frozenset({b"X-Skip-Verification", b"X-Mailgun-Skip-Verification"})

_VALUES = dict.fromkeys((b"true", b"yes", b"1", b"on"), True) | dict.fromkeys(
    (b"false", b"no", b"0", b"off"), False
)
_WEAKENED_BY = {True: _SKIP_VERIFICATION, False: _REQUIRE_TLS, None: frozenset[bytes]()}
"""The fields that make a message less secure, for each value."""

_FOLDED_NAMES = {
    name.lower(): name for name in (*_REQUIRE_TLS, *_SKIP_VERIFICATION, b"X-Mailgun-Drop-Message")
}
_FOLDED = re.compile(
    rb"\r\n[ \t]++(" + b"|".join(_FOLDED_NAMES) + rb")[ \t]*+:([^\r\n]*+)", re.IGNORECASE
).finditer

_SHOWN_OCTETS = 60


@record(frozen=True, slots=True)
class Wishes:
    """What a message asks for, in header fields or in options of the HTTP interface.

    None: the message does not ask.
    """

    require_tls: bool | None = None
    skip_verification: bool | None = None


NO_WISHES = Wishes()
_REQUIRETLS = Wishes(require_tls=True, skip_verification=False)


class BadField(ValueError):
    """The relay cannot obey a field. The text, `field` and `value` are short printable ASCII."""

    def __init__(self, name: bytes, value: bytes, complaint: str) -> None:
        self.field = _printable(name)
        self.value = _printable(unfold(value).strip(b" \t"))
        super().__init__(f'{self.field}: "{self.value}" {complaint}')


def read_wishes(section: HeaderSection) -> Wishes:
    """What the fields of a header section ask for. `BadField` where a field is not understood.

    A name that is nearly the name of a field that the relay obeys (a space before the colon, `_`
    for `-`) is a `BadField` too: the sender means the field, and without an error the message would
    go out unprotected.
    """
    if not section.asking:
        return NO_WISHES
    for found in section.asking:
        if not found.is_exact:
            right = found.meant.decode()
            raise BadField(
                found.name,
                found.value,
                f"is nearly a field that this relay obeys; write its name {right},"
                " and the colon next",
            )
    return Wishes(
        require_tls=_agreed([each for each in section.asking if each.meant in _REQUIRE_TLS]),
        skip_verification=_agreed(
            [each for each in section.asking if each.meant in _SKIP_VERIFICATION]
        ),
    )


def asks_for_no_tls(section: HeaderSection) -> bool:
    """Whether a message says TLS-Required: No (RFC 8689 §3).

    More than one such field has no effect; nor has any other value.
    """
    name = b"tls-required"
    return section.count(name) == 1 and unfold(section.first(name)).strip().lower() == b"no"


def tls_wishes(wishes: Wishes, *, requiretls: bool, says_no: bool) -> tuple[Wishes, bool]:
    """The wishes of a message after REQUIRETLS or TLS-Required: No (`says_no`) is applied to them.

    The second value says whether TLS-Required: No has an effect (RFC 8689 §3, §4.1).
    """
    if requiretls:
        return _REQUIRETLS, False
    if not says_no or wishes.require_tls is True:
        return wishes, False
    return replace(wishes, require_tls=False), True


def refuse_fields_in_body(lines: bytes) -> None:
    """`BadField` where a line after the end of the header section asks for more security.

    Such lines follow a line that is no field, so every mail host takes them for body, and the relay
    does not obey them. The same holds for a line whose name only looks like a field that the relay
    obeys. A line that would make the message less secure may be text that a person typed: it stays
    text. A line that asks for more security, or that is not understood, makes the relay refuse the
    message.
    """
    if not lines:
        return
    for seen in lines_like_fields(lines):
        if seen.value is None or seen.meant not in _WEAKENED_BY[yes_or_no(seen.value)]:
            line = lines.split(b"\r\n", seen.number + 1)[seen.number]
            name, _, value = line.partition(b":")
            raise BadField(
                name,
                value,
                "stands behind a line that is no header field, or is none itself; write"
                f" {seen.meant.decode()} in ASCII, the colon next, among the header fields",
            )


def refuse_folded(header: bytes) -> None:
    """`BadField` where a line that begins with white space asks for something.

    Such a line belongs to the field above it, for every reader. One that asks for more security, or
    for no delivery, was meant as a field of its own; one that asks for less stays what it is.
    """
    for seen in _FOLDED(header):
        name, value = seen[1], seen[2]
        meant = _FOLDED_NAMES[name.lower()]
        if yes_or_no(value) is not None and meant not in _WEAKENED_BY[yes_or_no(value)]:
            raise BadField(
                name,
                value,
                "is a part of the field above it; write it without white space before its name",
            )


def yes_or_no(word: bytes) -> bool | None:
    """The truth value of a word such as yes, on, 0; None for any other word."""
    return _VALUES.get(word.strip(b" \t").lower())


def _agreed(fields: list[FoundField]) -> bool | None:
    """The value that all the fields give; None without a field."""
    agreed: bool | None = None
    for field in fields:
        value = yes_or_no(unfold(field.value))
        if value is None:
            raise BadField(field.name, field.value, "is neither yes nor no")
        if agreed not in (None, value):
            raise BadField(field.name, field.value, "contradicts an earlier field")
        agreed = value
    return agreed


def _printable(text: bytes) -> str:
    """Text from outside, cut, on one line of ASCII."""
    cut = text[:_SHOWN_OCTETS].decode("latin-1").encode("unicode_escape").decode("ascii")
    return cut.replace('"', "'") + ("..." if len(text) > _SHOWN_OCTETS else "")
