"""The words of the file that have a form of their own: durations, sizes, addresses, networks, domains.

Each function reads one as written, or raises a ValueError that says "what is wrong; the cure".
"""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import timedelta

from relay.config.mistakes import shown, split
from relay.mail.address import AddressError, normalise_domain

_DURATION = re.compile(r"(?:[0-9]{1,9}(?:ms|s|m|h|d|w))+")
_DURATION_PART = re.compile(r"([0-9]+)(ms|[smhdw])")
_UNITS = {
    "w": timedelta(weeks=1),
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}
_LONGEST = timedelta(days=3650)

_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB)?")
_SIZE_UNITS = {"TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024, "B": 1}


def parse_duration(text: str) -> timedelta:
    """`30s`, `5m`, `1h30m`, `5d`. A bare number is refused: nobody could tell what it counts."""
    if not _DURATION.fullmatch(text):
        cure = (
            f"write a unit, as in {text}s"
            if text.isdigit()
            else "write it as 30s, 5m, 4h, 5d or 1h30m"
        )
        raise ValueError(f"{shown(text)} is not a duration; {cure}")
    total = sum((int(n) * _UNITS[unit] for n, unit in _DURATION_PART.findall(text)), timedelta())
    if total > _LONGEST:
        raise ValueError(f"{shown(text)} is longer than ten years; write a shorter duration")
    return total


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads as `value`."""
    text, rest = "", value
    for unit, length in _UNITS.items():
        if unit == "w":
            continue
        count, rest = divmod(rest, length)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_size(text: str) -> int:
    """`64KiB`, `50MiB`, or a plain number of octets."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{shown(text)} is not a size; write it as 64KiB, 50MiB, 2GiB or a number of octets"
        )
    return int(match[1]) * _SIZE_UNITS[match[2] or "B"]


def format_size(octets: int) -> str:
    """The shortest text that `parse_size` reads as `octets`."""
    for unit, count in _SIZE_UNITS.items():
        if octets and octets % count == 0 and unit != "B":
            return f"{octets // count}{unit}"
    return str(octets)


def host_and_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:2525`, `[::1]:2525`: host and port."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(
            f"{shown(text)} is not an address with a port; write it as 127.0.0.1:2525 or [::1]:2525"
        )
    if host.startswith("[") and host.endswith("]"):
        ipaddress.IPv6Address(host[1:-1])
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(
            f"{shown(text)} is an IPv6 address without brackets; write it as [{host}]:{port}"
        )
    ipaddress.IPv4Address(host)
    return host, int(port)


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        cure = "write it as 192.0.2.0/24 or 2001:db8::/32"
        raise ValueError(f"{shown(text)} is not a network; {cure}") from None
    raise ValueError(
        f"{shown(text)} has bits set behind its prefix; write {meant}, or {text.partition('/')[0]} alone"
    )


def domain(text: str) -> str:
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
            f'{shown(text)} has a "*" inside; only "*." in front is understood, as in "*.example.com"'
        )
    return domain(text)


def selector(text: str) -> str:
    """The name the DNS knows a DKIM key by (RFC 6376 §3.1)."""
    if not re.fullmatch(
        r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*", text
    ):
        raise ValueError(
            f"{shown(text)} is not a selector; write letters and digits, such as relay1"
        )
    return text


def listen_address(text: str) -> str:
    if text.startswith("unix:"):
        return f"unix:{socket_path(text.removeprefix('unix:'))}"
    try:
        host_and_port(text)
    except ValueError as error:
        raise ValueError(
            f"{split(error)[0]}; write it as 127.0.0.1:2525, [::1]:2525 or unix:/path"
        ) from None
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
    if not re.fullmatch(r"[!-~]{1,1000}", text):
        raise ValueError("not a key; write up to 1000 printable characters without a space")
    return text


def socket_path(text: str) -> str:
    if not text:
        raise ValueError("an empty path; write the path of a socket")
    if len(os.fsencode(text)) > 107:
        raise ValueError("the path of a socket has at most 107 octets; choose a shorter one")
    return text


def path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("not a path; write the path of a file, or remove the key")
    return text


def mail_host(text: str) -> str:
    """The host of a route: a name, or an address with or without brackets."""
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return domain(text)


def nameserver(text: str) -> str:
    """`9.9.9.9`, `2620:fe::fe`, `127.0.0.1:5353`, `[::1]:5353`."""
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    try:
        host_and_port(text)
    except ValueError:
        raise ValueError(
            f"{shown(text)} is not the address of a nameserver; write it as 9.9.9.9 or 127.0.0.1:5353"
        ) from None
    return text


def file_mode(text: str) -> str:
    """Read and write for owner, group and others, as `chmod` has it."""
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError(f'{shown(text)} is not a file mode; write it as "0600", "0660" or "0666"')
    return text


def argon2(text: str) -> str:
    if not re.fullmatch(
        r"\$argon2(?:id|i|d)\$v=\d+\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+", text
    ):
        raise ValueError("not an argon2 hash; make one with `relay password` and put it in quotes")
    return text
