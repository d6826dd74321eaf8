"""Paths and domains: the one place where an address is parsed.

Source: RFC 5321 §4.1.2 (the grammar), §4.5.3.1 (the limits), RFC 6531 §3.3 (addresses in
UTF-8), RFC 5890 and UTS #46 (domains in other scripts). `parse_path` reads the bytes of a
command and refuses whatever it does not know. The relay stores, compares and sends the address
that it returns without a change; no later part parses an address again.

The next hop may read an address in another way than the relay does. So the relay refuses these
addresses, although their characters are legal:

    =?                  an encoded word (RFC 2047), which a parser may decode into another address
    % ! and a quoted @  the old form of routing, user%other@here: a host that still obeys it would
                        send the mail on, in the relay's name, to a domain that nobody authorised
    a number as the last label
                        `a@127.0.0.1`: a resolver takes it for an IP address without brackets
    characters that become one of these under NFKC, control characters, and marks that change
    the direction of text

The relay accepts some addresses that are not in the grammar, as Postfix does, because mailboxes
and mailing lists have them: dots at any place of a local part (`a..b@`, `.a@`, `a.@`), and a
local part of more than 64 octets (SRS, VERP; §4.5.3.1 asks for techniques without limits).

A source route is stripped (RFC 5321 §4.1.1.3, appendix C). A final dot of the domain is removed:
RFC 5321 has none, and the next hop may refuse it. Quoting and case of a local part stay exactly
as given (§2.4).
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from functools import lru_cache

import idna

_PATH_OCTETS = 900
"""More than RFC 5321 §4.5.3.1.3 asks for; it still fits a line of a Received field or a DSN."""
_DOMAIN_OCTETS = 253
"""The 255 of RFC 5321 §4.5.3.1.2 without the two octets that only the DNS has (RFC 1035 §3.1)."""

_BLANKS = b" \t"

# No input makes these expressions backtrack: quantifiers of single characters are possessive, and
# a group begins with another character than the text that follows it. Groups themselves are not
# possessive, because Python before 3.11.5 (Debian 12 has 3.11.2) fails where the last round of a
# possessive group matches in part.
_SAFE_ATEXT = r"A-Za-z0-9#$&'*+/=^_`{|}~\-"
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}+(?<!-)"

_COMMON_PATH = re.compile(
    rf"<([{_SAFE_ATEXT}.]++@((?:{_LABEL}\.)*[A-Za-z][A-Za-z0-9-]{{0,62}}+(?<!-)))>"
    r"(?:[ \t](.*+))?".encode(),
    re.DOTALL,
)
"""The form of nearly all addresses, read by one expression for speed.

`_split_path` and `_read_address` accept every address that this expression accepts.
"""

_QUOTED = rb'"[^"\\]*+(?:\\.[^"\\]*+)*"'
_PARAMETERS = rb"(?:[ \t](.*+))?"
_ANGLE_PATH = re.compile(rb'<([^">]*+(?:%b[^">]*+)*)>%b' % (_QUOTED, _PARAMETERS), re.DOTALL)
_DOUBLE_PATH = re.compile(rb'<<([^"<>]*+(?:%b[^"<>]*+)*)>>%b' % (_QUOTED, _PARAMETERS), re.DOTALL)
_BARE_PATH = re.compile(
    rb'(?=[^ \t<>])([^" \t<>]*+(?:%b[^" \t<>]*+)*)%b' % (_QUOTED, _PARAMETERS), re.DOTALL
)
_SOURCE_ROUTE = re.compile(r"@[A-Za-z0-9._-]++(?:,@[A-Za-z0-9._-]++)*:")
_QUOTED_STRING = re.compile(r'"([^"\\]*+(?:\\.[^"\\]*+)*)"', re.DOTALL)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
# All but controls, the blank, and the specials of RFC 5322 §3.2.3 (the dot is allowed). Written as
# what is allowed, a million characters, it takes 6 ms to compile.
_ATOMS_AND_DOTS = re.compile(r'[^\x00-\x20"(),:;<>@\[\\\]\x7f]++')
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]++|0[xX][0-9A-Fa-f]*+")
_ROUTING = re.compile(r"[@%!]|=\?")
_LITERAL = re.compile(r"\[(IPv6:)?([0-9A-Fa-f:.]++)\]", re.IGNORECASE)

_JOINERS = frozenset("\u200c\u200d")
"""Format characters without which some scripts cannot write their words (RFC 5892 appendix A)."""


class AddressError(ValueError):
    """An address is wrong. The text can go into a reply, with `status` (RFC 3463 §3.2)."""

    def __init__(self, reason: str, status: str = "5.1.3") -> None:
        super().__init__(reason)
        self.status = status


def parse_path(
    arg: bytes, *, smtputf8: bool, allow_postmaster: bool = False, lenient: bool = False
) -> tuple[str, bytes]:
    """The address of a reverse-path or forward-path, and the parameters behind it, stripped.

    `arg` is the text after "FROM:" or "TO:". The null reverse-path `<>` gives "", which the caller
    has to refuse as a forward-path. With `allow_postmaster`, `<postmaster>` needs no domain (RFC
    5321 §4.1.1.3). `lenient` is for old clients that break the grammar: it allows white space (also
    tabs) around the path and inside its brackets, a path without brackets, or with two pairs.
    """
    match = _COMMON_PATH.fullmatch(arg)
    if match is not None and match.end(1) < _PATH_OCTETS and len(match[2]) <= _DOMAIN_OCTETS:
        return match[1].decode("ascii"), (match[3] or b"").strip(_BLANKS)
    path, rest = _split_path(arg, lenient=lenient)
    return _read_address(path, smtputf8=smtputf8, allow_postmaster=allow_postmaster), rest


@lru_cache(maxsize=2048)
def domain_of(address: str) -> str:
    """The normalised domain of an address that `parse_path` returned; "" for the null reverse-path.

    An address literal gives the literal in its one spelling: `[192.0.2.1]`, `[IPv6:2001:db8::1]`.
    """
    if not address:
        return ""
    _, at, domain = address.rpartition("@")
    if not at:
        raise AddressError("the address has no domain")
    return normalise_domain(domain)


def normalise_domain(text: str) -> str:
    """A domain in the spelling that the relay compares: lower case, A-labels, no final dot."""
    if len(text) > 4 * _DOMAIN_OCTETS:
        raise AddressError("the domain is too long")
    return _normalise(text)


def typed_address(text: str) -> str:
    """The address that a person typed, with or without angle brackets; "" for none, and for `<>`.

    `AddressError` where it is none that MAIL or RCPT would take.
    """
    bare = text.strip().removeprefix("<").removesuffix(">")
    try:
        return parse_path(f"<{bare}>".encode(), smtputf8=True)[0]
    except UnicodeEncodeError:  # octets of a command line, or half of a surrogate pair
        raise AddressError("the address is not UTF-8") from None


def spellings(address: str) -> tuple[str, ...]:
    """The spellings in which the queue may hold the address that an operator wrote.

    All are in lower case, to be compared with a stored address in lower case (of ASCII): a search
    ignores case in both parts, as a look-up of Postfix does. `<>` is the null reverse-path, which
    is stored as "". Angle brackets and the final dot of the domain are left out. A domain in
    another script is stored as the client wrote it, in A-labels or in U-labels (RFC 5890 §2.3.2.1),
    so both spellings are returned.
    """
    bare = address.strip()
    if bare.startswith("<") and bare.endswith(">"):
        bare = bare[1:-1]
    local_part, at, domain = bare.rpartition("@")
    if not at:
        return (bare.lower(),)
    return tuple(f"{local_part.lower()}@{spelling}" for spelling in domain_spellings(domain))


def domain_spellings(text: str) -> tuple[str, ...]:
    """A domain in lower case: in A-labels and, where that differs, in U-labels.

    A text that is no domain is returned in lower case.
    """
    try:
        domain = normalise_domain(text)
    except AddressError:
        return (text.lower(),)
    shown = ".".join(_u_label(label) for label in domain.split("."))
    return (domain,) if shown == domain else (domain, shown)


def in_header(address: str) -> str:
    """An address as the relay writes it in a header field.

    A local part whose dots are not allowed outside quotes (RFC 5322 §3.4.1) is quoted.
    """
    local_part, _, domain = address.rpartition("@")
    if local_part.startswith('"') or all(local_part.split(".")):
        return address
    return f'"{local_part}"@{domain}'


def _u_label(label: str) -> str:
    if not label.startswith("xn--"):
        return label
    try:
        return idna.ulabel(label)
    except UnicodeError:  # the label begins with xn--, but is no A-label
        return label


def _split_path(arg: bytes, *, lenient: bool) -> tuple[bytes, bytes]:
    """The path without its brackets, and the parameters."""
    text = arg.lstrip(_BLANKS) if lenient else arg
    match = _ANGLE_PATH.fullmatch(text)
    if match is None and lenient:
        match = _DOUBLE_PATH.fullmatch(text) or _BARE_PATH.fullmatch(text)
    if match is None:
        raise AddressError("the path is not an address in angle brackets")
    path, rest = match[1], (match[2] or b"").strip(_BLANKS)
    return (path.strip(_BLANKS) if lenient else path), rest


def _read_address(path: bytes, *, smtputf8: bool, allow_postmaster: bool) -> str:
    if not path:
        return ""
    address = _without_source_route(_decode(path, smtputf8=smtputf8))
    if len(address.encode()) > _PATH_OCTETS - 2:  # the angle brackets count (RFC 5321 §4.5.3.1.3)
        raise AddressError("the path is too long")
    if allow_postmaster and address.lower() == "postmaster":
        return "postmaster"
    local_part, domain = _split_address(address)
    _check_local_part(local_part)
    normalise_domain(domain)
    return f"{local_part}@{domain.removesuffix('.')}"


def _decode(path: bytes, *, smtputf8: bool) -> str:
    if path.isascii():
        text = path.decode("ascii")
    elif not smtputf8:
        raise AddressError(
            "the address is not ASCII, and SMTPUTF8 was not asked for", "5.6.7"
        )  # RFC 6531 §3.5
    else:
        try:
            text = path.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise AddressError("the address is not UTF-8") from exc
    if not text.isprintable() and any(_is_hidden(character) for character in text):
        raise AddressError("the address has control characters")
    return text


def _is_hidden(character: str) -> bool:
    """Whether a reader would not see this character, or would see other characters differently.

    Such are control characters, format characters (an attacker uses the bidirectional ones),
    separators, and code points without a meaning or with a private one.
    """
    if character == " " or character in _JOINERS:
        return False
    return unicodedata.category(character)[0] in "CZ"


def _without_source_route(address: str) -> str:
    """RFC 5321 §4.1.1.3: a server strips the route and uses the mailbox."""
    match = _SOURCE_ROUTE.match(address)
    return address[match.end() :] if match else address


def _split_address(address: str) -> tuple[str, str]:
    """Local part and domain, divided at the one @ that is not quoted."""
    quoted = _QUOTED_STRING.match(address)
    at = address.find("@", quoted.end() if quoted else 0)
    if at < 0:
        raise AddressError("the address has no domain")
    return address[:at], address[at + 1 :]


def _check_local_part(local_part: str) -> None:
    quoted = _QUOTED_STRING.fullmatch(local_part)
    content = _QUOTED_PAIR.sub(r"\1", quoted[1]) if quoted else local_part
    if not quoted and not _ATOMS_AND_DOTS.fullmatch(local_part):
        raise AddressError("the local part has a character that has to be quoted")
    if _ROUTING.search(content) or (not content.isascii() and _disguises(content)):
        raise AddressError("the local part could be read as another address")


def _disguises(content: str) -> bool:
    """Whether normalisation (NFKC) would turn a character outside ASCII into ASCII punctuation."""
    others = "".join(character for character in content if not character.isascii())
    return any(c.isascii() and not c.isalnum() for c in unicodedata.normalize("NFKC", others))


@lru_cache(maxsize=16384)
def _normalise(text: str) -> str:
    if text.startswith("["):
        return _normalise_literal(text)
    name = text if text.isascii() else _to_a_labels(text)
    name = name.removesuffix(".").lower()
    if len(name) > _DOMAIN_OCTETS:
        raise AddressError("the domain is too long")
    if not _DOMAIN.fullmatch(name):
        raise AddressError("the domain is not a domain name")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise AddressError("the domain is a number; an address literal needs brackets")
    return name


def _to_a_labels(text: str) -> str:
    """Convert label by label: an underscore in one label, which IDNA forbids, affects no other."""
    try:
        labels = idna.uts46_remap(text, std3_rules=False, transitional=False).split(".")
        return ".".join(
            label if label.isascii() else idna.alabel(label).decode("ascii") for label in labels
        )
    except UnicodeError as exc:  # idna.IDNAError is one
        raise AddressError("the domain is not an internationalised domain name") from exc


def _normalise_literal(text: str) -> str:
    """An IPv4 or IPv6 address in brackets (RFC 5321 §4.1.3). No other family is accepted."""
    match = _LITERAL.fullmatch(text)
    if match is None:
        raise AddressError("the address literal is malformed")
    try:
        if match[1]:
            return f"[IPv6:{ipaddress.IPv6Address(match[2]).compressed}]"
        return f"[{ipaddress.IPv4Address(match[2])}]"
    except ValueError as exc:
        raise AddressError("the address literal is not an IP address") from exc
