"""What strangers send to the HTTP interface, and where they have it call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from unittest.mock import patch
from urllib.parse import parse_qsl, urlsplit

from yarl import URL

from relay.api import formparser
from relay.api.formparser import parser_for
from relay.api.mailgun_form import ApiError, Form
from relay.api.origin import is_foreign
from relay.api.targets import NoTarget, Targets
from relay.api.webhooks import _is_url
from relay.route.addresses import parse_address
from relay.route.answers import AddressAnswer, AddressLookup
from tests.fuzz.pieces import cut, run_at_once

_FIELDS_OCTETS = 400
_SMALL = patch.multiple(
    formparser, FIELDS_OCTETS=_FIELDS_OCTETS, _MOST_FIELDS=6, _HEADER_OCTETS=200
)
_METHODS = ["POST", "PUT", "DELETE", "GET", "HEAD", "OPTIONS"]
_ORIGIN_FIELDS = ["Host", "Origin", "Referer", "Sec-Fetch-Site"]


def forms(octets: bytes) -> None:
    """A form is the same wherever its octets are cut, and has what its client put in."""
    if len(octets) < 2:
        return
    how, kind, rest = octets[0], octets[1] % 4, octets[2:]
    with _SMALL:
        if kind == 0:
            _urlencoded(rest, how)
        elif kind == 1:
            _put_together(rest, how)
        else:
            first, _, body = rest.partition(b"\n")
            _read(first.decode("latin-1"), body, how)


def _read(content_type: str, body: bytes, how: int) -> Form | None:
    """The form, None where it is refused; however it is cut."""
    results: list[Form | None] = []
    for pieces in ([body], cut(body, how), cut(body, 1 + how % 5)):
        try:
            parser = parser_for(content_type)
            if parser is None:
                return None
            for piece in pieces:
                parser.feed(piece)
            results.append(parser.end())
        except ApiError:
            results.append(None)
    assert results[0] == results[1] == results[2]
    return results[0]


def _urlencoded(body: bytes, how: int) -> None:
    """As the standard library reads it."""
    form = _read("application/x-www-form-urlencoded", body, how)
    if form is not None:
        text = body.decode("latin-1")
        assert form.files == ()
        assert [
            (name.encode(), value.encode()) for name, value in form.fields
        ] == [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in parse_qsl(text, keep_blank_values=True, encoding="latin-1")
        ]  # fmt: skip


def _put_together(octets: bytes, how: int) -> None:
    """Parts of any content come back as they are; text that is no UTF-8 is refused."""
    contents = [part for part in octets.split(b"\xfe")[:4] if b"\r\n--b" not in part]
    fields = [part for part in contents if part[:1] != b"F"]
    files = [part[1:] for part in contents if part[:1] == b"F"]
    body = b"".join(
        [
            *(b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\n%s\r\n' % f for f in fields),
            *(
                b'--b\r\nContent-Disposition: form-data; name="a"; filename="x"\r\n\r\n%s\r\n' % f
                for f in files
            ),
            b"--b--\r\n",
        ]
    )
    if sum(map(len, fields)) > _FIELDS_OCTETS or not contents:
        return
    form = _read("multipart/form-data; boundary=b", body, how)
    try:
        wanted = [part.decode() for part in fields]
    except UnicodeDecodeError:
        assert form is None
        return
    assert form is not None
    assert [value for _, value in form.fields] == wanted
    assert [file.content for file in form.files] == files


def origins(octets: bytes) -> None:
    """Only a page of this very site may have its reader's browser change something."""
    lines = octets.decode("latin-1").split("\n")
    method = _METHODS[ord(lines[0][0]) % len(_METHODS)] if lines[0] else "POST"
    says = {
        name: value.strip()
        for name, value in zip(_ORIGIN_FIELDS, lines[1:], strict=False)
        if value.strip() and value.isprintable()  # as a browser says it
    }
    if is_foreign(method, says) or method in ("GET", "HEAD", "OPTIONS"):
        return
    assert says.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    host = re.sub(r"(?::80|:443)$", "", says.get("Host", "").lower())
    for name in ("Origin", "Referer"):
        if name in says:
            # The authority of a URL ends at the first of these (WHATWG URL §4.4), for a browser.
            match = re.match(r"https?://([^/\\?#]*)", says[name].lower())
            assert match, says
            authority = re.sub(r"(?::80|:443)$", "", match[1].rpartition("@")[2])
            assert authority == host, says


def webhooks(octets: bytes) -> None:
    """With any URL and DNS answer, the relay connects only to public and to listed addresses."""
    flags, *lines = octets[:1], *octets[1:].split(b"\n")
    listed = [ip_network("127.0.0.0/8"), ip_network("fd00::/8")] if flags == b"L" else []
    answers = [str(address) for line in lines[1:6] if (address := _address_in(line))]

    async def look_up(name: str) -> AddressLookup:
        assert not _looks_numeric(name), name
        return AddressAnswer(tuple(answers))

    targets = Targets(look_up, lambda: listed)
    url = lines[0].decode("latin-1")
    if not _is_url(url):
        return
    objection = run_at_once(targets.objection(url))
    assert objection.isprintable()
    for host in (urlsplit(url).hostname or "", *_as_aiohttp_reads(url)):
        try:
            called: Sequence[str] = run_at_once(targets.addresses(host, 443))
        except NoTarget:
            return  # before aiohttp is asked
        for text in called:
            address = ip_address(text)
            assert _is_public(address) or any(address in network for network in listed), url
        if parse_address(host):
            assert called == [host]


def _as_aiohttp_reads(url: str) -> list[str]:
    """The host that aiohttp resolves or, where it is an address, connects to."""
    try:
        return [URL(url).raw_host or ""]
    except ValueError:
        return []


def _address_in(line: bytes) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(line if len(line) in (4, 16) else line.decode("latin-1"))
    except ValueError:
        return None


def _looks_numeric(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    """In the eyes of the standard library, with all the addresses that are inside."""
    inside: list[IPv4Address | None] = []
    if isinstance(address, IPv6Address):
        nat64 = IPv4Address(int(address) & 0xFFFFFFFF)
        inside = [address.sixtofour, address.ipv4_mapped, *(address.teredo or ())]
        inside += [nat64] if address in ip_network("64:ff9b::/96") else []
    is_global = address.is_global and not address.is_multicast
    return is_global and all(_is_public(one) for one in inside if one is not None)
