"""The words of the file that have a form of their own: addresses, networks, domains, names,
secrets. `quantities` has durations, sizes and rates.

Each function reads one as written, or raises a ValueError that says "what is wrong; the cure".
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from relay.config.mistakes import shown
from relay.config.quantities import RATE, rate
from relay.mail.address import AddressError, normalise_domain
from relay.mail.option import TextForm
from relay.queue.server_address import parse_url

# Patterns that mean the same in Python and in JSON Schema (ECMA-262).
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_HEX = r"[0-9A-Fa-f]{1,4}"
_IPV6 = "(?:{})".format(
    "|".join(
        [
            rf"(?:{_HEX}:){{7}}{_HEX}",
            rf"(?:{_HEX}:){{6}}{_IPV4}",
            *(rf"(?:{_HEX}:){{1,{n}}}(?::{_HEX}){{1,{7 - n}}}" for n in range(1, 7)),
            *(rf"(?:{_HEX}:){{1,{n}}}(?::{_HEX}){{0,{5 - n}}}:{_IPV4}" for n in range(1, 6)),
            rf"(?:{_HEX}:){{1,7}}:",
            rf":(?::{_HEX}){{1,7}}",
            rf"::(?:{_HEX}:){{0,5}}{_IPV4}",
            "::",
        ]
    )
)
_ADDRESS = rf"(?:{_IPV4}|{_IPV6})"
_PORT = (
    r"(?:6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3}|0)"
)
_HOST_AND_PORT = rf"(?:{_IPV4}|\[{_IPV6}\]):{_PORT}"
_NETWORK = rf"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?|{_IPV6}(?:/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9]))?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_PLAIN_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_MAIL_ADDRESS = rf"(?!.{{255}}){_ATOM}(?:\.{_ATOM})*@(?:{_PLAIN_LABEL}\.)*(?![0-9]+$){_PLAIN_LABEL}"
_LINE = r"[^\x00-\x20\x7f-\x9f][^\x00-\x1f\x7f-\x9f]{0,199}"
_PATH = r"[^\x00]+"
_WITH_DATABASE = r"(?=[^/?@:]+[^/?]*@|[^/?]*/[^?]|[!-~]*\?(?:[!-~]*&)?(?:dbname|user)=[^&])"
_QUEUE_URL = rf"postgres(?:ql)?://{_WITH_DATABASE}[!-~]+"
_NUMBER = r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)"
_SOCKET_PATH = r"[^\x00]{1,107}"
_FILE_MODE = r"0?[0-7]{3}"
_GROUP = r"[A-Za-z_][A-Za-z0-9_.-]{0,31}"
_SECRET = r"[!-~]{1,1000}"
_HEADER_NAME = r"[A-Za-z0-9-]{1,100}"
_SELECTOR = (
    r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_ARGON2 = (
    r"\$argon2(?:id|i|d)\$v=[0-9]+\$m=[0-9]+,t=[0-9]+,p=[0-9]+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+"
)
# Of names in other scripts a pattern knows only that they are not ASCII; the last label is no
# number.
_LABEL = r"(?!-)(?:[A-Za-z0-9_-]|[^\x00-\x7f]){1,63}(?<!-)"
_DOMAIN = (
    rf"(?:(?:{_LABEL}\.)*(?!{_NUMBER}\.?$){_LABEL}\.?"
    rf"|\[(?:{_IPV4}|[Ii][Pp][Vv]6:{_IPV6})\])"
)

_LOCAL_ATOM = rf"(?:{_ATOM[:-1]}|[^\x00-\x7f])+"
_LOCAL_PART = rf"{_LOCAL_ATOM}(?:\.{_LOCAL_ATOM})*"
_NAME = r"[A-Za-z][A-Za-z0-9_.-]{0,63}"
_SPKI_DIGEST = r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]="
_HTTPS_URL = (
    rf"https://(?:[A-Za-z0-9.-]{{1,253}}|\[{_IPV6}\])(?::{_PORT})?(?:/[!-\"$-~]{{0,2000}})?"
)

_PIN = rf"(?:\*\.)?(?:{_LABEL}\.)+(?!{_NUMBER}\.?$){_LABEL}\.?"


def host_and_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:2525`, `[::1]:2525`: host and port."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(_PORT, port):
        raise ValueError(
            f"{shown(text)} is not an address with a port; write it as 127.0.0.1:2525 or [::1]:2525"
        )
    if host in ("", "*"):
        raise ValueError(
            f"{shown(text)} names no address;"
            f" write 0.0.0.0:{port} for all of IPv4, [::]:{port} for IPv6"
        )
    if ":" in host and not host.startswith("["):
        raise ValueError(
            f"{shown(text)} is an IPv6 address without brackets; write it as [{host}]:{port}"
        )
    if not re.fullmatch(rf"{_IPV4}|\[{_IPV6}\]", host):
        local = "127.0.0.1" if host == "localhost" else "the address of this host"
        raise ValueError(f"{shown(text)} has no IP address before the port; write {local}:{port}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def network(text: str) -> str:
    """A network, or a single address. One of IPv4-mapped addresses is the network of IPv4 it stands
    for.
    """
    if not re.fullmatch(_NETWORK, text):
        cure = "write it as 192.0.2.0/24 or 2001:db8::/32"
        raise ValueError(f"{shown(text)} is not a network; {cure}")
    found = ipaddress.ip_network(text, strict=False)
    alone = text.partition("/")[0]
    if ipaddress.ip_address(alone) != found.network_address:
        raise ValueError(
            f"{shown(text)} has bits set behind its prefix; write {found}, or {alone} alone"
        )
    mapped = found.network_address.ipv4_mapped if found.version == 6 else None
    if mapped is not None and found.prefixlen >= 96:
        return f"{mapped}/{found.prefixlen - 96}"
    return str(found)


def domain(text: str) -> str:
    if text.startswith("@") and len(text) > 1:
        raise ValueError(f"{shown(text)} is not a domain; write {shown(text[1:])} without the @")
    try:
        domain = normalise_domain(text)
    except AddressError as error:
        raise ValueError(
            f"{shown(text)} is not a domain ({error}); write it as example.com"
        ) from None
    if not domain:
        raise ValueError("an empty domain; write it as example.com")
    return domain


def domain_pattern(text: str, *, alone: bool = False) -> str:
    """`example.com`, or `*.example.com` for what is below it; `*` by itself only where `alone`."""
    if text == "*" and alone:
        return text
    if text == "*":
        raise ValueError(
            '"*" is not a domain; put what holds for every domain under policy.default'
        )
    if text.startswith("*."):
        return f"*.{domain(text[2:])}"
    if "*" in text:
        raise ValueError(
            f'{shown(text)} has a "*" inside;'
            ' only "*." in front is understood, as in "*.example.com"'
        )
    return domain(text)


def sender_pattern(text: str) -> str:
    """A mail address, whose case does not count, or what `domain_pattern` takes."""
    local_part, _, after = text.rpartition("@")
    if local_part:
        if not re.fullmatch(_LOCAL_PART, local_part):
            raise ValueError(f"{shown(text)} is not a mail address; write it as bot@example.com")
        return f"{local_part.lower()}@{domain(after)}"
    if text == "*":
        raise ValueError('"*" is no sender; put the next hop of all mail under routes, at "*"')
    return domain_pattern(text)


def name(text: str) -> str:
    if not re.fullmatch(_NAME, text):
        cure = "write up to 64 letters, digits, dots, hyphens or underscores, a letter first"
        raise ValueError(f"{shown(text)} is not a name; {cure}")
    return text


def https_url(text: str) -> str:
    if not re.fullmatch(_HTTPS_URL, text):
        if "@" in text:  # what stands before it may be a password, so the value is not quoted
            raise ValueError(
                'has a "@" in it; write it without user name and password,'
                " as https://login.example.com/token"
            )
        raise ValueError(
            f"{shown(text)} is not the URL of an HTTPS server;"
            " write it as https://login.example.com/token"
        )
    return text


def spki_digest(text: str) -> str:
    if not re.fullmatch(_SPKI_DIGEST, text):
        raise ValueError(
            f"{shown(text)} is not the base64 text of a SHA-256 digest (44 characters);"
            " docs/routes.md has the command that makes it"
        )
    return text


def address(text: str) -> str:
    if not (found := _address(text)):
        raise ValueError(f"{shown(text)} is not an address; write it as 192.0.2.7 or 2001:db8::7")
    return found


def pin(text: str) -> str:
    """A mail host as an MX record names it, or `*.example.com` for the hosts one label below."""
    example = "write it as mx1.example.com or *.example.com"
    if not text:
        raise ValueError("an empty name; name a host, or remove the line")
    if text in ("*", "*."):
        raise ValueError(f"{shown(text)} would allow every host; a pin names hosts: {example}")
    if text.startswith("."):
        raise ValueError(f'{shown(text)} begins with a dot; write "*{text[:70]}"')
    if _address(text):
        raise ValueError(f"{shown(text)} is an address; a pin names a host: {example}")
    host, colon, port = text.rpartition(":")
    if colon and host and port.isdecimal():
        raise ValueError(f"{shown(text)} has a port, and a pin has none; write {shown(host)}")
    name = domain_pattern(text)
    if name.startswith(("[", "*.[")):
        raise ValueError(f"{shown(text)} is an address; a pin names a host: {example}")
    if "." not in name.removeprefix("*."):
        raise ValueError(f"{shown(text)} has no dot in its domain; {example}")
    return name


def selector(text: str) -> str:
    """The name the DNS knows a DKIM key by (RFC 6376 §3.1)."""
    if not re.fullmatch(_SELECTOR, text):
        raise ValueError(
            f"{shown(text)} is not a selector; write letters and digits, such as relay1"
        )
    return text


def header_name(text: str) -> str:
    """The name of a field that a proxy adds."""
    if not re.fullmatch(_HEADER_NAME, text):
        raise ValueError(f"{shown(text)} is no name of a header field; write X-Remote-User")
    return text


def line(text: str) -> str:
    """A text that stands on one line of a report or a mail."""
    if not re.fullmatch(_LINE, text):
        problem = "is empty" if not text.strip() else f"{shown(text)} is not one line of text"
        raise ValueError(f"{problem}; write 1 to 200 characters without a line break")
    return text


def listen_address(text: str) -> str:
    if text.startswith("unix:"):
        return f"unix:{socket_path(text.removeprefix('unix:'))}"
    host_and_port(text)
    return text


def http_address(text: str) -> str:
    """An address with a port; empty for none."""
    if text:
        host_and_port(text)
    return text


def api_key(text: str) -> str:
    """A key as it is, or an argon2 hash of one."""
    return argon2(text) if text.startswith("$argon2") else secret(text)


def secret(text: str) -> str:
    if not re.fullmatch(_SECRET, text):
        raise ValueError("not a key; write up to 1000 printable characters without a space")
    return text


def socket_path(text: str) -> str:
    if not re.fullmatch(_PATH, text):
        raise ValueError("not a path; write the path of a socket")
    if len(os.fsencode(text)) > 107:
        raise ValueError("the path of a socket has at most 107 octets; choose a shorter one")
    return text


def path(text: str) -> str:
    if not re.fullmatch(_PATH, text):
        raise ValueError("not a path; write the path of a file, or remove the key")
    return text


def _address(text: str) -> str:
    """An address, with or without brackets, in its one spelling; empty for anything else."""
    match = re.fullmatch(rf"\[?({_ADDRESS})\]?", text)
    return str(ipaddress.ip_address(match[1])) if match else ""


def mail_address(text: str) -> str:
    """An address of a role, in ASCII and without quotes."""
    if not re.fullmatch(_MAIL_ADDRESS, text):
        raise ValueError(f"{shown(text)} is not a mail address; write it as tls@example.com")
    local_part, _, after = text.rpartition("@")
    return f"{local_part}@{domain(after)}"


def mail_host(text: str) -> str:
    """The host of a route: a name, or an address with or without brackets."""
    if found := re.fullmatch(r"\[([^\[\]]+)\]:(\d+)|([^\[\]:]+):(\d+)", text):
        host, port = found[1] or found[3], found[2] or found[4]
        raise ValueError(f"{shown(text)} has a port; write host: {host}, port: {port}")
    found = re.fullmatch(r"\[([^\[\]:]+)\]", text)
    if found and not _address(text):
        raise ValueError(f"{shown(text)} has brackets, which are for an address; write {found[1]}")
    return _address(text) or domain(text)


def nameserver(text: str) -> str:
    """`9.9.9.9`, `2620:fe::fe`, `127.0.0.1:5353`, `[::1]:5353`."""
    if address := _address(text):
        return address
    try:
        host_and_port(text)
    except ValueError:
        raise ValueError(
            f"{shown(text)} is not the address of a nameserver;"
            " write it as 9.9.9.9 or 127.0.0.1:5353"
        ) from None
    return text


def file_mode(text: str) -> str:
    """Read and write for owner, group and others, as `chmod` has it."""
    if not re.fullmatch(_FILE_MODE, text):
        raise ValueError(f'{shown(text)} is not a file mode; write it as "0600", "0660" or "0666"')
    return text


def group(text: str) -> str:
    if not re.fullmatch(_GROUP, text):
        raise ValueError(f"{shown(text)} is not the name of a group; write one of /etc/group")
    return text


def argon2(text: str) -> str:
    if not re.fullmatch(_ARGON2, text):
        raise ValueError("not an argon2 hash; make one with `relay password` and put it in quotes")
    return text


def queue_url(text: str) -> str:
    try:
        parse_url(text)
    except ValueError as error:
        raise ValueError(f"it cannot be used: {error}") from None
    return text


@dataclass(frozen=True, slots=True)
class Word:
    """How a form is read, what the JSON Schema knows of it, and what it looks like."""

    read: Callable[[str], str]
    pattern: str
    example: str


WORDS = {
    TextForm.ADDRESS: Word(address, rf"\[?{_ADDRESS}\]?", "192.0.2.7"),
    TextForm.API_KEY: Word(api_key, rf"{_ARGON2}|(?!\$argon2){_SECRET}", "a-long-random-key"),
    TextForm.ARGON2: Word(argon2, _ARGON2, "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA"),
    TextForm.DOMAIN: Word(domain, _DOMAIN, "example.com"),
    TextForm.DOMAIN_PATTERN: Word(domain_pattern, rf"(?:\*\.)?{_DOMAIN}", "*.example.com"),
    TextForm.FILE_MODE: Word(file_mode, _FILE_MODE, "0660"),
    TextForm.GROUP: Word(group, _GROUP, "mail"),
    TextForm.HEADER_NAME: Word(header_name, _HEADER_NAME, "X-Remote-User"),
    TextForm.HTTPS_URL: Word(https_url, _HTTPS_URL, "https://login.example.com/token"),
    TextForm.HTTP_ADDRESS: Word(http_address, f"(?:{_HOST_AND_PORT})?", "127.0.0.1:8025"),
    TextForm.LINE: Word(line, _LINE, "Example Inc."),
    TextForm.LISTEN_ADDRESS: Word(
        listen_address, rf"{_HOST_AND_PORT}|unix:{_SOCKET_PATH}", "127.0.0.1:2525"
    ),
    TextForm.MAIL_ADDRESS: Word(mail_address, _MAIL_ADDRESS, "tls@example.com"),
    TextForm.MAIL_HOST: Word(mail_host, rf"\[?{_ADDRESS}\]?|{_DOMAIN}", "mail.example.com"),
    TextForm.NAME: Word(name, _NAME, "provider"),
    TextForm.NAMESERVER: Word(nameserver, rf"\[?{_ADDRESS}\]?|{_HOST_AND_PORT}", "9.9.9.9"),
    TextForm.NETWORK: Word(network, _NETWORK, "192.0.2.0/24"),
    TextForm.PATH: Word(path, _PATH, "/srv/relay/file"),
    TextForm.PIN: Word(pin, _PIN, "mx1.example.com"),
    TextForm.QUEUE_URL: Word(queue_url, _QUEUE_URL, "postgresql://relay@db.example.net/relay"),
    TextForm.RATE: Word(rate, RATE.pattern, "30/m"),
    TextForm.ROUTE_PATTERN: Word(
        lambda text: domain_pattern(text, alone=True), rf"\*|(?:\*\.)?{_DOMAIN}", "example.com"
    ),
    TextForm.SECRET: Word(secret, _SECRET, "a-long-random-secret"),
    TextForm.SENDER_PATTERN: Word(
        sender_pattern, rf"{_LOCAL_PART}@{_DOMAIN}|(?:\*\.)?{_DOMAIN}", "bot@example.com"
    ),
    TextForm.SELECTOR: Word(selector, _SELECTOR, "relay1"),
    TextForm.SIZE: Word(str, r"[1-9][0-9]{0,14}(?:B|KiB|MiB|GiB|TiB)?", "50MiB"),
    TextForm.SPKI_DIGEST: Word(spki_digest, _SPKI_DIGEST, "A" * 43 + "="),
    TextForm.SOCKET_PATH: Word(socket_path, _SOCKET_PATH, "/run/relay/relay.sock"),
}
