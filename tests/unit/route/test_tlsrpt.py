"""The record that says where reports on TLS are sent (RFC 8460 §3)."""

from __future__ import annotations

import pytest

from relay.route.tlsrpt import MOST_TARGETS, ReportTarget, report_targets, tlsrpt_name

MAIL = ReportTarget("mailto:tls@b.example", "tls@b.example")
WEB = ReportTarget("https://b.example/tls")


def test_the_record_is_below_the_domain() -> None:
    assert tlsrpt_name("b.example") == "_smtp._tls.b.example"


@pytest.mark.parametrize(
    ("texts", "targets"),
    [
        ([b"v=TLSRPTv1; rua=mailto:tls@b.example"], (MAIL,)),
        ([b"v=TLSRPTv1;rua=mailto:tls@b.example;"], (MAIL,)),
        ([b"v=TLSRPTv1; rua=mailto:tls@b.example,https://b.example/tls"], (MAIL, WEB)),
        ([b"v=TLSRPTv1; rua=https://b.example/tls \t, mailto:tls@b.example"], (WEB, MAIL)),
        ([b"v=TLSRPTv1; x=1; rua=mailto:tls@b.example; y=2"], (MAIL,)),
        # Records of others are passed over; of this kind there has to be exactly one.
        ([b"v=spf1 -all", b"v=TLSRPTv1; rua=mailto:tls@b.example"], (MAIL,)),
        ([b"v=TLSRPTv1; rua=mailto:tls@b.example"] * 2, ()),
        ([b"v=TLSRPTv1; rua=mailto:tls@b.example", b"v=TLSRPTv1;"], ()),
        ([], ()),
        ([b"v=TLSRPTv2; rua=mailto:tls@b.example"], ()),
        ([b"v=TLSRPTv1 ; rua=mailto:tls@b.example"], ()),
        ([b"V=TLSRPTv1; rua=mailto:tls@b.example"], ()),
        ([b" v=TLSRPTv1; rua=mailto:tls@b.example"], ()),
        ([b"v=TLSRPTv1;"], ()),
        ([b"v=TLSRPTv1; rua="], ()),
        # Of a field that is there twice, the first counts.
        ([b"v=TLSRPTv1; rua=mailto:tls@b.example; rua=https://b.example/tls"], (MAIL,)),
        # Each target once.
        ([b"v=TLSRPTv1; rua=mailto:tls@b.example,mailto:tls@b.example"], (MAIL,)),
    ],
)
def test_a_record_names_targets(texts: list[bytes], targets: tuple[ReportTarget, ...]) -> None:
    assert report_targets(texts) == targets


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("mailto:tls@b.example", "tls@b.example"),
        ("MAILTO:tls@b.example", "tls@b.example"),
        ("mailto:tls%2Bx@b.example", "tls+x@b.example"),
        ("mailto:tls@b.example?subject=hello", "tls@b.example"),
        ("https://b.example/", ""),
        ("https://b.example:443/a?b=c", ""),
        ("HTTPS://b.example/", ""),
    ],
)
def test_a_place_is_written_to(uri: str, address: str) -> None:
    assert report_targets([f"v=TLSRPTv1; rua={uri}".encode()]) == (ReportTarget(uri, address),)


@pytest.mark.parametrize(
    "uri",
    [
        "http://b.example/",
        "ftp://b.example/",
        "tls@b.example",
        "mailto:",
        "mailto:tls",
        "mailto:tls@[192.0.2.1]",
        "mailto:a%0d%0aBcc:x@b.example",
        "mailto:a%20b@b.example",
        "mailto:a@b.example%0d%0a",
        "mailto:%ff@b.example",
        "mailto:tls%C3%BC@b.example",
        "mailto:<a@b.example>",
        "https://",
        "https:///path",
        "https://b.example:8443/",
        "https://b.example:x/",
        "https://user@b.example/",
        "https://[::1]/",
        "https://192.0.2.1/",
        "https://b .example/",
        "https://b.example/\x01",
        "https://b.example/ü",
    ],
)
def test_a_place_that_is_not_written_to_is_passed_over(uri: str) -> None:
    assert report_targets([f"v=TLSRPTv1; rua={uri},{MAIL.uri}".encode()]) == (MAIL,)


def test_a_domain_cannot_have_many_strangers_written_to() -> None:
    uris = ",".join(f"mailto:tls@{n}.example" for n in range(100))
    assert len(report_targets([f"v=TLSRPTv1; rua={uris}".encode()])) == MOST_TARGETS
