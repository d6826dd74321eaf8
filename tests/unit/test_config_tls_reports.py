"""Who may send reports on TLS: `tls_reports`, and the key that signs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.config import ConfigError, read
from relay.report.tls_report import Submitter
from relay.sign.keys import new_key


def config_of(directory: Path, options: str, *, domain: str = "us.example") -> object:
    key = directory / "key.pem"
    if not key.exists():
        new_key(key, kind="ed25519")
    text = (
        "hostname: relay.us.example\n"
        f"dkim: {{domains: {{{domain}: {{selector: s, key_file: {key}}}}}}}\n"
        f"tls_reports: {{{options}}}\n"
    )
    return read(text, {}, source="relay.yaml")


def submitter_of(directory: Path, options: str, **how: str) -> Submitter:
    config = config_of(directory, options, **how)
    return config.tls_reports.submitter(config.hostname)  # type: ignore[attr-defined, no-any-return]


def test_reports_come_from_the_address_that_is_written(tmp_path: Path) -> None:
    options = "send: true, from: tls@US.example, organization: Us, contact: ask@us.example"
    assert submitter_of(tmp_path, options) == Submitter("Us", "ask@us.example", "tls@us.example")


def test_reports_come_from_the_postmaster_of_the_host_by_default(tmp_path: Path) -> None:
    address = "postmaster@relay.us.example"
    found = submitter_of(tmp_path, "send: true", domain="relay.us.example")
    assert found == Submitter("relay.us.example", address, address)
    assert found.domain == "relay.us.example"


def test_reports_come_from_the_machine_itself_where_no_hostname_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "mail.us.example")
    with pytest.raises(ConfigError, match=r"postmaster@mail\.us\.example, and mail\.us\."):
        read("tls_reports: {send: true}\n", {}, source="relay.yaml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "send: true",
            "tls_reports.send: reports come from postmaster@relay.us.example, and"
            " relay.us.example has no key under dkim.domains; make one with `relay dkim-key`, or"
            " name another address under tls_reports.from",
        ),
        ('organization: ""', "tls_reports.organization: is empty; write 1 to 200 characters"),
        (r'organization: "a\r\nb"', "is not one line of text; write 1 to 200 characters"),
        ("send: true, from: tls@sub.us.example", "sub.us.example has no key under dkim.domains"),
        ("from: tls", "is not a mail address; write it as tls@example.com"),
        ("contact: 'a b@us.example'", "is not a mail address; write it as tls@example.com"),
        ("contact: tls@", "is not a mail address; write it as tls@example.com"),
        ("contact: 'tls@[192.0.2.1]'", "is not a mail address; write it as tls@example.com"),
        ("sender: tls@us.example", "tls_reports.sender: unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_cure(tmp_path: Path, options: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("send: true, from: tls@us.example", ["organization", "contact"]),
        ("send: true, from: tls@us.example, contact: tls@us.example", ["organization"]),
        ("send: true, from: tls@us.example, organization: Us", ["contact"]),
        ("send: true, from: tls@us.example, organization: Us, contact: tls@us.example", []),
        ("from: tls@us.example", []),
    ],
)
def test_defaults_that_strangers_read_are_worth_a_word(
    tmp_path: Path, options: str, said: list[str]
) -> None:
    config = config_of(tmp_path, options)
    found = [one for one in config.warnings if "tls_reports" in one]  # type: ignore[attr-defined]
    assert len(found) == bool(said)
    assert all(f"tls_reports.{key}" in found[0] for key in said)
