"""The header fields by which a message speaks about its own security.

`X-Require-TLS` and `X-Skip-Verification`, each with an alias. Values, in any case and with
white space and folding around them: true yes 1 on, false no 0 off. Anything else, and two
fields that contradict each other, is a `BadField`: a sender who asks for protection in words
we do not understand is told so, and never served without it. Only the header section counts
(`relay.mail.section`), and all four fields are taken out before the message goes on: the next hop
need not know what we think of its certificate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from relay.mail.header import unfold
from relay.mail.section import Found, HeaderSection, look_behind

__all__ = [
    "NO_WISHES",
    "BadField",
    "Wishes",
    "asks_for_no_tls",
    "read_wishes",
    "refuse_displaced",
    "truth_of",
]

_REQUIRE_TLS = frozenset({b"X-Require-TLS", b"X-Mailgun-Require-TLS"})
_SKIP_VERIFICATION = frozenset({b"X-Skip-Verification", b"X-Mailgun-Skip-Verification"})

_VALUES = dict.fromkeys((b"true", b"yes", b"1", b"on"), True) | dict.fromkeys(
    (b"false", b"no", b"0", b"off"), False
)
_WEAKENED_BY = {True: _SKIP_VERIFICATION, False: _REQUIRE_TLS, None: frozenset[bytes]()}
"""By the value of a field, the settings that it makes less secure."""

_SHOWN_OCTETS = 60


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a message asks for, by its header fields or by options beside it; None where it is
    silent.
    """

    require_tls: bool | None = None
    skip_verification: bool | None = None


NO_WISHES = Wishes()
_REQUIRETLS = Wishes(require_tls=True, skip_verification=False)


class BadField(ValueError):
    """A field we cannot obey. Its text, `field`, `value`: printable ASCII, cut, fit for a reply."""

    def __init__(self, name: bytes, value: bytes, complaint: str) -> None:
        self.field = _printable(name)
        self.value = _printable(unfold(value).strip(b" \t"))
        super().__init__(f'{self.field}: "{self.value}" {complaint}')


def read_wishes(section: HeaderSection) -> Wishes:
    """What the fields of a header section ask for. `BadField` where they cannot be understood.

    A name that only nearly is that of a field the relay obeys (a space before the colon, `_` for
    `-`) is a `BadField` too: its sender means the field, and would be served without it in silence.
    """
    if not section.asking:
        return NO_WISHES
    for found in section.asking:
        if not found.is_exact:
            right = found.meant.decode()
            raise BadField(
                found.name,
                found.value,
                f"is nearly a field that this relay obeys; write its name {right}, and the colon next",
            )
    return Wishes(
        require_tls=_agreed([each for each in section.asking if each.meant in _REQUIRE_TLS]),
        skip_verification=_agreed(
            [each for each in section.asking if each.meant in _SKIP_VERIFICATION]
        ),
    )


def asks_for_no_tls(section: HeaderSection) -> bool:
    """Whether a message says TLS-Required: No (RFC 8689 §3). More than one such field, and any other
    value, says nothing.
    """
    name = b"tls-required"
    return section.count(name) == 1 and unfold(section.first(name)).strip().lower() == b"no"


def tls_wishes(wishes: Wishes, *, requiretls: bool, says_no: bool) -> tuple[Wishes, bool]:
    """What a message asks for with REQUIRETLS, or with TLS-Required: No (`says_no`), beside its own
    fields; and whether the latter has any effect (RFC 8689 §2, §3).
    """
    if requiretls:
        return _REQUIRETLS, False
    if not says_no or wishes.require_tls is True:
        return wishes, False
    return replace(wishes, require_tls=False), True


def refuse_displaced(lines: bytes) -> None:
    """`BadField` where lines behind the end of the header section ask for something.

    Those lines follow one that is no field, so they are body for every reader, and a wish among
    them is not obeyed. So is a line whose name only looks like a field that the relay obeys. One that would make
    the message less secure may be text that somebody typed, and stays text; one that asks for
    more, or that cannot be understood, is refused.
    """
    for seen in look_behind(lines):
        if seen.value is None or seen.meant not in _WEAKENED_BY[truth_of(seen.value)]:
            line = lines.split(b"\r\n", seen.number + 1)[seen.number]
            name, _, value = line.partition(b":")
            raise BadField(
                name,
                value,
                "stands behind a line that is no header field, or is none itself; write"
                f" {seen.meant.decode()} in ASCII, the colon next, among the header fields",
            )


def truth_of(word: bytes) -> bool | None:
    """What a value says: true or false, None where it is neither."""
    return _VALUES.get(word.strip(b" \t").lower())


def _agreed(fields: list[Found]) -> bool | None:
    """The one value that all the fields give; None without any."""
    agreed: bool | None = None
    for field in fields:
        value = truth_of(unfold(field.value))
        if value is None:
            raise BadField(field.name, field.value, "is neither yes nor no")
        if agreed not in (None, value):
            raise BadField(field.name, field.value, "contradicts an earlier field")
        agreed = value
    return agreed


def _printable(text: bytes) -> str:
    """Text of a stranger's, on one line of ASCII."""
    cut = text[:_SHOWN_OCTETS].decode("latin-1").encode("unicode_escape").decode("ascii")
    return cut.replace('"', "'") + ("..." if len(text) > _SHOWN_OCTETS else "")
