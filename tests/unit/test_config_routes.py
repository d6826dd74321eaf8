"""Next hops, routes and sources of tokens in the configuration: what the file may say, and what is
wrong together.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trustme
import yaml

from relay.config import as_document
from relay.config.parts import routes_of
from relay.route.next_hop import Auth, NextHop, Rate
from tests.unit.test_config import HASH, config_of, mistakes_of


def test_a_route_in_place_with_short_keys_is_a_next_hop() -> None:
    config = config_of(
        f"""
        routes:
          a.example: {{host: h.example, username: u, password_file: {__file__}}}
          b.example: {{hosts: h.example, auth: {{username: u, password_file: {__file__}}}}}
        """
    )
    login = Auth(username="u", password_file=__file__)
    assert config.routes["a.example"] == NextHop("a.example", (("h.example",),), auth=login)
    assert config.routes["b.example"] == NextHop("b.example", (("h.example",),), auth=login)


def test_route_of_a_recipient_or_a_sender_leads_to_a_name_or_to_a_next_hop_in_place() -> None:
    config = config_of(
        """
        next_hops: {a: {host: h.example}}
        routes: {x.example: a, y.example: {next_hop: a}, z.example: {host: i.example}}
        routes_by_sender: {x.example: a, b@y.example: {next_hop: a}, c@z.example: {host: j.example}}
        """
    )
    in_place = NextHop("z.example", (("i.example",),))
    assert config.routes == {"x.example": "a", "y.example": "a", "z.example": in_place}
    in_place = NextHop("c@z.example", (("j.example",),))
    routes = routes_of(config)
    assert config.routes_by_sender == {
        "x.example": "a",
        "b@y.example": "a",
        "c@z.example": in_place,
    }
    assert routes.by_sender["b@y.example"] == config.next_hops["a"]
    assert set(routes.every_next_hop()) == {"a", "z.example", "c@z.example"}


def test_next_hop_has_groups_of_hosts_a_rate_and_pins() -> None:
    pin = "x5tzvhDQ/MpGNoPNO4Q9xGQpsRAd5ndjUDS1QqHmHUk="
    config = config_of(
        f"""
        next_hops:
          a: {{hosts: [[A.example., b.example], c.example], rate: 30/m, pin_sha256: "{pin}"}}
        routes: {{"*": a}}
        routes_by_sender: {{"Bot@Example.com": a, "*.sub.example": {{next_hop: a}}}}
        """
    )
    a = NextHop("a", (("a.example", "b.example"), ("c.example",)), rate=Rate(30, 60.0))
    assert config.next_hops["a"] == replace(a, pin_sha256=(pin,))
    assert config.routes["*"] == "a"
    assert set(config.routes_by_sender) == {"bot@example.com", "*.sub.example"}
    document = as_document(config)
    assert document["next_hops"]["a"]["hosts"] == [["a.example", "b.example"], "c.example"]
    assert document["next_hops"]["a"]["rate"] == "30/m"
    assert config_of(yaml.safe_dump(document)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("routes: {'*': b}", "routes.*: next_hops has no b; add next_hops.b"),
        (
            "next_hops: {a: {host: h.example}}\nroutes_by_sender: {x.example: b}",
            "relay.yaml:2: routes_by_sender.x.example: next_hops has no b; write one of a, or add",
        ),
        (
            "next_hops: {a: {host: h.example, auth: {username: u, oauth2: t}}}",
            "next_hops.a.auth.oauth2: oauth2 has no t",
        ),
        (
            "next_hops: {a.example: {host: h.example}}\nroutes: {a.example: {host: h.example}}",
            "routes.a.example: next_hops.a.example is a next hop of this name, too; put one of",
        ),
        (
            f"access: {{users: {{u: {{password: '{HASH}', next_hop: b}}}}}}",
            "access.users.u.next_hop: next_hops has no b",
        ),
        (
            "listeners: [{address: '127.0.0.1:2525', next_hop: b}]",
            "listeners.0.next_hop: next_hops has no b; add next_hops.b",
        ),
        (
            "routes: {a.example: {host: h}}\nroutes_by_sender: {a.example: {host: i}}",
            "relay.yaml:2: routes_by_sender.a.example: routes.a.example is a next hop of this",
        ),
        (
            "routes: {a.example: mail.a.example}",
            "add next_hops.mail.a.example; a host is written as {host: mail.a.example}",
        ),
        ("routes: {a.example: [b]}", "routes.a.example: a list where one name belongs; write a"),
        ("routes: {a.example: {next_hop: b, port: 25}}", "routes.a.example.next_hop: unknown key"),
        ("next_hops: {a: {host: h, hosts: [h]}}", "next_hops.a.host: hosts is given, too; keep"),
        (
            "next_hops: {a: {host: h, username: u, auth: {}}}",
            "next_hops.a.username: auth is given, too; write all of it under auth",
        ),
        ("next_hops: {a: {hosts: []}}", "next_hops.a.hosts: an empty list"),
        ("next_hops: {a: {hosts: [[]]}}", "next_hops.a.hosts.0: an empty list"),
        ("next_hops: {a: {host: h, rate: 30}}", '"30" is not a rate; write it as 5/s, 30/m'),
        ("next_hops: {a b: {host: h}}", '"a b" is not a name; write up to 64 letters'),
        ("next_hops: {a: {host: h, pin_sha256: [x]}}", "is not the base64 text of a SHA-256"),
        ("next_hops: {a: {host: h, source_address: x}}", '"x" is not an address; write it as'),
        ("oauth2: {a: {grant: x}}", "oauth2.a.grant: "),
        ("oauth2: {a: {grant: refresh_token, token_url: 'http://x'}}", "URL of an HTTPS server"),
        ("routes_by_sender: {'*': a}", '"*" is no sender; put the next hop of all mail under'),
        ("routes_by_sender: {'a b@c.example': a}", '"a b@c.example" is not a mail address'),
    ],
)
def test_a_mistake_about_next_hops_is_named_with_its_cure(text: str, said: str) -> None:
    found = mistakes_of(text)
    assert any(said in mistake for mistake in found), found


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Files as the keys of a next hop name them."""
    authority = trustme.CA()
    for name in ("client", "other"):
        leaf = authority.issue_cert(f"{name}.example")
        leaf.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        leaf.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        (tmp_path / f"{name}.key").chmod(0o600)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name, text, mode in [
        ("secret", "secret\n", 0o600),
        ("open", "secret\n", 0o644),
        ("empty", "\nsecret\n", 0o600),
        ("json", "{}", 0o600),
    ]:
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    (tmp_path / "open.key").write_text((tmp_path / "client.key").read_text())
    (tmp_path / "open.key").chmod(0o644)
    return tmp_path


PIN = "x5tzvhDQ/MpGNoPNO4Q9xGQpsRAd5ndjUDS1QqHmHUk="
PINS = f'["{PIN}", "{PIN[:-2]}c="]'


@pytest.mark.parametrize(
    ("keys", "fatal", "said"),
    [
        # secrets
        ("auth: {username: u, password_file: F/secret}", None, ""),
        ("auth: {username: u, password_file: F/none}", True, "auth.password_file: F/none: No such"),
        ("auth: {username: u, password_file: F/empty}", True, "F/empty: its first line is empty"),
        ("auth: {username: u, password_file: F/open}", False, "every user of this machine may"),
        (
            "auth: {username: u, password_file: $CREDENTIALS_DIRECTORY/x}",
            False,
            "$CREDENTIALS_DIRECTORY is not set; systemd sets it for LoadCredential=; start the",
        ),
        # logins
        ("auth: {mechanism: xoauth2, username: u}", True, "auth.mechanism: xoauth2 without oauth2"),
        ("auth: {mechanism: oauthbearer, username: u}", True, "oauthbearer without oauth2"),
        ("auth: {mechanism: plain, username: u}", True, "plain without password_file"),
        ("auth: {mechanism: login, username: u, oauth2: t}", True, "login without password_file"),
        ("auth: {mechanism: external}", True, "external without a certificate"),
        ("auth: {mechanism: external}, certificate: F/client.pem, key: F/client.key", None, ""),
        ("auth: {}", True, "username and password_file belong together"),
        ("auth: {username: u}", True, "username and password_file belong together"),
        ("auth: {password_file: F/secret}", True, "username and password_file belong together"),
        ("auth: {mechanism: xoauth2, oauth2: t}", True, "auth: no username"),
        ("auth: {mechanism: xoauth2, username: u, oauth2: t}", None, ""),
        (
            "auth: {username: u, oauth2: t, password_file: F/secret}",
            True,
            "auth.password_file: no effect beside oauth2, whose token is sent; remove it; or",
        ),
        (
            "auth: {mechanism: plain, username: u, oauth2: t, password_file: F/secret}",
            True,
            "auth.oauth2: no effect with mechanism plain, which sends the password; remove it; or",
        ),
        (
            "auth: {mechanism: login, username: u, oauth2: t, password_file: F/secret}",
            True,
            "auth.oauth2: no effect with mechanism login",
        ),
        (
            "auth: {mechanism: external, username: u, oauth2: t},"
            " certificate: F/client.pem, key: F/client.key",
            True,
            "auth.oauth2: no effect with mechanism external",
        ),
        (
            "hosts: 192.0.2.1, auth: {username: u, password_file: F/secret}",
            False,
            "no certificate can be for an address",
        ),
        (
            "hosts: 192.0.2.1, verify_name: a.example,"
            " auth: {username: u, password_file: F/secret}",
            None,
            "",
        ),
        # proofs
        ("certificate: F/client.pem, key: F/client.key", None, ""),
        (
            "certificate: F/client.pem, key: F/other.key",
            True,
            "F/other.key is another certificate's key",
        ),
        ("certificate: F/client.pem", True, "certificate: F/client.pem cannot be used"),
        ("certificate: F/none.pem", True, "F/none.pem: No such file"),
        ("certificate: F/client.pem, key: F/open.key", False, "key: F/open.key: every user"),
        ("key: F/client.key", True, "key: a key without a certificate; name its certificate"),
        ("ca_file: F/ca.pem", None, ""),
        ("ca_file: F/secret", True, "ca_file: F/secret: no certificates in it"),
        ("ca_file: none", True, "ca_file: no chain and no pin: nothing would prove"),
        (f"ca_file: none, pin_sha256: {PINS}", None, ""),
        (f"ca_file: none, pin_sha256: {PINS}, verify_name: x.example", False, "verify_name: no e"),
        (f"pin_sha256: '{PIN}'", False, "one pin alone: mail waits from the day"),
        (f"pin_sha256: ['{PIN}', '{PIN}']", False, "one pin alone"),
        # connections
        ("port: 465", False, "port 465 speaks TLS from the first octet; write tls: implicit"),
        ("port: 587, tls: implicit", False, "tls: port 587 speaks STARTTLS"),
        ("port: 465, tls: implicit", None, ""),
        ("source_address: 192.0.2.7, ip_family: ipv6", True, "192.0.2.7 is no address of ip_fami"),
        ("hosts: ['[2001:db8::7]'], ip_family: ipv4", True, "hosts: 2001:db8::7 cannot be reached"),
        (
            "hosts: ['[IPv6:2001:db8::7]'], ip_family: ipv4",
            True,
            "cannot be reached with ip_family",
        ),
        ("hosts: 192.0.2.7, source_address: '2001:db8::7'", True, "reached with source_address: "),
        ("hosts: 192.0.2.7, source_address: 192.0.2.9, ip_family: ipv4", None, ""),
        ("hosts: [H.example, h.example.]", False, "h.example is there 2 times, and counts once"),
        ("hosts: [['[192.0.2.7]', 192.0.2.7]]", False, "192.0.2.7 is there 2 times"),
        ("hosts: mail", False, "mail has no dot, and names are looked up as they are written"),
        ("hosts: [localhost, '[2001:db8::7]', 192.0.2.7]", None, ""),
        # limits
        ("hosts: smtp.office365.com", False, "rate and max_connections missing, and office365.com"),
        ("hosts: smtp.gmail.com, rate: 1/s", False, ": max_connections missing, and gmail.com"),
        ("hosts: email-smtp.eu-west-1.amazonaws.com, max_connections: 3", False, ": rate missing"),
        ("hosts: smtp.office365.com, rate: 30/m, max_connections: 3", None, ""),
        ("hosts: notgmail.com", None, ""),
        ("max_connections: 201", False, "more than delivery.concurrency_per_destination (20), of"),
    ],
)
def test_next_hop_that_contradicts_itself_is_named_with_its_cure(
    secrets: Path, monkeypatch: pytest.MonkeyPatch, keys: str, fatal: bool | None, said: str
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    hosts = "" if "hosts:" in keys else "hosts: h.example, "
    source = (
        "{grant: client_credentials, token_url: https://a.example/t, client_id: i,"
        " client_secret_file: F/secret}"
    )
    is_named = "oauth2: t" in keys
    text = "\n".join(
        [
            "hostname: relay.example.net",
            f"oauth2: {{t: {source}}}" if is_named else "oauth2: {}",
            f"next_hops: {{a: {{{hosts}{keys}}}}}",
            "routes: {'*': a}",
        ]
    ).replace("F/", f"{secrets}/")
    said = said.replace("F/", f"{secrets}/")
    found = mistakes_of(text) if fatal else list(config_of(text).warnings)
    assert len(found) == (fatal is not None), found
    assert all(said in one and one.startswith("relay.yaml:3: next_hops.a") for one in found), found


def test_pem_file_of_certificate_and_key_is_enough(secrets: Path) -> None:
    both = (secrets / "client.pem").read_text() + (secrets / "client.key").read_text()
    (secrets / "both.pem").write_text(both)
    (secrets / "both.pem").chmod(0o600)
    text = f"routes: {{'*': {{host: h.example, certificate: {secrets}/both.pem}}}}"
    assert not [one for one in config_of(text).warnings if "routes" in one]


def test_secret_of_systemd_is_read_where_its_directory_is_known(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secrets))
    text = (
        "routes: {{'*': {{host: h.example, username: u,"
        " password_file: $CREDENTIALS_DIRECTORY/{}}}}}"
    )
    assert not [one for one in config_of(text.format("secret")).warnings if "routes" in one]
    assert "its first line is empty" in mistakes_of(text.format("empty"))[0]


@pytest.mark.parametrize(
    ("keys", "fatal", "said"),
    [
        (
            "grant: client_credentials, client_id: i, client_secret_file: F/secret",
            True,
            ".token_url",
        ),
        (
            f"grant: client_credentials, {'token_url: https://a.example/'}, client_id: i",
            True,
            "_file",
        ),
        ("grant: service_account, scope: s", True, "key_file: is missing: the grant service"),
        ("grant: service_account, scope: s, key_file: F/json", True, "F/json: it has no client_em"),
        (
            "grant: refresh_token, token_url: https://a.example/, client_id: i,"
            " refresh_token_file: F/secret, subject: x",
            False,
            "subject: no effect with the grant refresh_token; remove it",
        ),
        (
            "grant: refresh_token, token_url: https://a.example/, client_id: i,"
            " refresh_token_file: F/none",
            False,
            "refresh_token_file: F/none: there is no token yet, and mail waits for it; `relay",
        ),
        (
            "grant: refresh_token, token_url: https://a.example/, client_id: i,"
            " refresh_token_file: F/secret, device_url: https://a.example/d",
            None,
            "",
        ),
        (
            "grant: refresh_token, token_url: https://a.example/, client_id: i,"
            " refresh_token_file: F/secret, device_url: https://oauth2.googleapis.com/device/code",
            False,
            "device_url: Google gives no scope for Gmail by device code; see docs/routes.md",
        ),
    ],
)
def test_source_of_tokens_has_what_its_grant_needs(
    secrets: Path, keys: str, fatal: bool | None, said: str
) -> None:
    text = (
        "hostname: relay.example.net\n"
        f"oauth2: {{t: {{{keys}}}}}\n"
        "routes: {'*': {host: h.example, auth: {mechanism: xoauth2, username: u, oauth2: t}}}"
    ).replace("F/", f"{secrets}/")
    said = said.replace("F/", f"{secrets}/")
    found = mistakes_of(text) if fatal else list(config_of(text).warnings)
    assert len(found) == (fatal is not None), found
    assert all(said in one and one.startswith("relay.yaml:2: oauth2.t.") for one in found), found


@pytest.mark.parametrize("pasted", ["hunter2-hunter2", "BOc4/k3/secret+in+base64"])
def test_secret_pasted_in_place_of_its_file_is_not_shown(pasted: str) -> None:
    text = (
        "hostname: relay.example.net\n"
        f"routes: {{'*': {{host: h.example, username: u, password_file: '{pasted}'}}}}\n"
        "oauth2: {t: {grant: refresh_token, token_url: https://a.example/, client_id: i,"
        f" client_secret_file: '{pasted}', refresh_token_file: '{pasted}'}}}}"
    )
    found = mistakes_of(text)
    assert len(found) == 2, found
    assert "routes.*.password_file: the file (its name" in found[0]
    assert "; write the secret into a file, and the whole path of that file here" in found[0]
    assert "client_secret_file: the file (its name" in found[1]
    assert not any(pasted in mistake for mistake in found)


def test_password_in_a_token_url_is_not_shown() -> None:
    text = "oauth2: {a: {grant: refresh_token, token_url: 'https://app:hunter2@login.example/t'}}"
    found = [one for one in mistakes_of(text) if "token_url" in one]
    assert any('oauth2.a.token_url: has a "@" in it; write it without' in one for one in found)
    assert not any("hunter2" in one for one in found)


def test_name_that_nothing_uses_is_a_warning_and_a_recipient_route_is_none() -> None:
    config = config_of(
        """
        hostname: relay.example.net
        next_hops: {a: {host: h.example}, b: {host: i.example}, c: {host: j.example}}
        routes: {x.example: a, y.example: {host: k.example}, "*": b}
        routes_by_sender: {s.example: {next_hop: a}}
        """
    )
    assert [one.partition(": ")[2] for one in config.warnings] == [
        "next_hops.c: nothing leads to it; name it where it is meant, or remove it"
    ]


@pytest.mark.parametrize(
    ("others", "admin", "warns"),
    [
        ("", "{}", True),
        (", {address: 127.0.0.1:2527}", "{}", False),
        ("", "{api_keys: [key-3ax6xnjp29jd6fds4gc373sgvjxteol0]}", False),
    ],
    ids=["listeners-with-a-next-hop", "listener-without", "mail-over-http"],
)
def test_senders_routes_that_no_mail_can_take_are_one_warning(
    others: str, admin: str, warns: bool
) -> None:
    config = config_of(
        f"""
        hostname: relay.example.net
        next_hops: {{a: {{host: h.example}}}}
        routes_by_sender: {{s.example: a, t.example: a}}
        listeners: [{{address: 127.0.0.1:2525, next_hop: a}}{others}]
        admin: {admin}
        """
    )
    said = [one for one in config.warnings if "routes_by_sender" in one]
    assert len(said) == warns, config.warnings
    assert not warns or "every listener has a next_hop, which comes first; remove" in said[0]


@pytest.mark.parametrize(
    ("delivery", "most", "said"),
    [
        ("{concurrency_per_destination: 20}", 20, None),
        ("{concurrency_per_destination: 20}", 21, "delivery.concurrency_per_destination (20)"),
        ("{concurrency_per_destination: 9, concurrency: 9}", 10, "delivery.concurrency (9)"),
    ],
)
def test_max_connections_above_what_another_key_allows_is_a_warning(
    delivery: str, most: int, said: str | None
) -> None:
    config = config_of(
        f"""
        hostname: relay.example.net
        workers: 2
        delivery: {delivery}
        next_hops: {{a: {{host: h.example, max_connections: {most}}}}}
        routes: {{"*": a}}
        """
    )
    found = [one for one in config.warnings if "max_connections" in one]
    assert len(found) == (said is not None), config.warnings
    if said is not None:
        key = said.partition(" ")[0]
        assert f"next_hops.a.max_connections: more than {said}" in found[0]
        assert f"lower it, or raise {key}" in found[0]


@pytest.mark.parametrize("auth", ["none", "optional", "required"])
def test_next_hop_of_a_user_who_cannot_log_in_anywhere_is_warned_of(auth: str) -> None:
    text = (
        f"listeners: [{{address: '127.0.0.1:2525', auth: {auth}, auth_without_tls: true}}]\n"
        "next_hops: {a: {host: h.example}}\n"
        f"access: {{users: {{u: {{password: '{HASH}', next_hop: a}}}}}}"
    )
    found = [one for one in config_of(text).warnings if "access.users.u.next_hop" in one]
    assert [("no listener lets users log in" in one) for one in found] == [True] * (auth == "none")


@pytest.mark.parametrize(
    ("host", "cure"),
    [
        ("[smtp.p.example]:587", "write host: smtp.p.example, port: 587"),
        ("smtp.p.example:587", "write host: smtp.p.example, port: 587"),
        ("[192.0.2.1]:587", "write host: 192.0.2.1, port: 587"),
        ("[smtp.p.example]", "write smtp.p.example"),
    ],
)
def test_host_written_as_postfix_writes_it_is_told_how_it_is_written_here(
    host: str, cure: str
) -> None:
    [mistake] = mistakes_of(f'routes: {{"*": {{host: "{host}"}}}}')
    assert mistake.endswith(cure)
