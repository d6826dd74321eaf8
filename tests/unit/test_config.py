"""The configuration: what it says of a mistake, and what it makes of a correct file."""

from __future__ import annotations

import dataclasses
import grp
import ipaddress
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import trustme
import yaml
from hypothesis import given
from hypothesis import strategies as st

from relay.config import Config, ConfigError, as_document, default_path, load, read
from relay.config.quantities import format_duration, format_size, parse_duration, parse_size
from relay.config.shape import known_keys, section_of
from relay.policy.rules import TlsRule
from relay.receive.spec import ListenerTls
from relay.route.next_hop import NextHop, TlsMode, TokenSource

ROOT = Path(__file__).resolve().parents[2]
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaOBGJ"


def config_of(text: str, environ: dict[str, str] | None = None) -> Config:
    return read(text, environ or {}, source="relay.yaml")


def mistakes_of(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_of(text, environ)
    return str(caught.value).split("\n")


def but_hostname(config: Config) -> Config:
    """A configuration without the one value that depends on the machine."""
    return dataclasses.replace(config, hostname="relay.example.net")


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # unknown keys, with what was probably meant
        ("hostnme: a.example", 'relay.yaml:1: hostnme: unknown key; did you mean "hostname"?'),
        (
            "queue:\n  lifetme: 5d",
            'relay.yaml:2: queue.lifetme: unknown key; did you mean "lifetime"?',
        ),
        (
            "message_size: 5MiB",
            'relay.yaml:1: message_size: unknown key; it belongs at "limits.message_size"',
        ),
        (
            "log: {zzz: 1}",
            "log.zzz: unknown key; known here: delivery, keep_events, keep_statistics, level,"
            " format",
        ),
        (
            "limits: {message-size: 5MiB}",
            'limits.message-size: unknown key; did you mean "message_size"?',
        ),
        ("listeners: [{address: '127.0.0.1:25', certficate: x}]", 'did you mean "certificate"?'),
        # twice
        (
            "\nworkers: 1\nworkers: 1",
            "relay.yaml:3: workers: said twice (first on line 2); keep one of the two",
        ),
        (
            "policy:\n  domains:\n    a.example: {}\n    A.EXAMPLE.: {}",
            "relay.yaml:4: policy.domains.A.EXAMPLE.: a second rule for a.example (first on line"
            " 3); keep one",
        ),
        (
            "routes:\n  bücher.example: {host: a.example}\n"
            "  xn--bcher-kva.example: {host: b.example}",
            "relay.yaml:3: routes.xn--bcher-kva.example: a second rule for xn--bcher-kva.example"
            " (first on line 2)",
        ),
        # types
        ("workers: two", 'workers: "two" is not a whole number; write digits only'),
        ("workers: 1.5", 'workers: "1.5" is not a whole number'),
        ("limits: {recipients: 0}", "limits.recipients: 0 is out of range; write a number from 1"),
        (
            "delivery: {port: 70000}",
            "delivery.port: 70000 is out of range; write a number from 1 to 65535",
        ),
        (
            "policy: {default: {require_tls: maybe}}",
            '"maybe" is neither true nor false; write true or false',
        ),
        ("policy: {default: {require_tls: 1}}", '"1" is neither true nor false'),
        (
            "hostname: [a]",
            "hostname: a list where a single value belongs; write a value behind the colon",
        ),
        ("hostname: true", 'hostname: "true" is read as true or false; put it in quotes'),
        (
            "hostname:",
            "relay.yaml:1: hostname: no value; write a value behind the colon, or remove the key",
        ),
        (
            "policy: [a]",
            "policy: not a section; write keys below it: default, domains, destinations",
        ),
        (
            "policy: {domains: [a.example]}",
            "policy.domains: not a map of names; write one name a line",
        ),
        ("queue: {retry: 5m}", "queue.retry: not a list; write [a, b], or one value a line"),
        (
            "log: {level: verbose}",
            '"verbose" is not a choice here; write one of debug, info, warning, error',
        ),
        ("log: {level: warn}", '"warn" is not a choice here; did you mean "warning"?'),
        ("listeners: [{tls: none}]", "relay.yaml:1: listeners.0.address: is missing; add address:"),
        ("routes: {a.example: {port: 25}}", "routes.a.example.hosts: is missing; add hosts:"),
        # durations and sizes
        ("limits: {idle: 30}", 'limits.idle: "30" is not a duration; write a unit, as in 30m'),
        (
            "limits: {idle: 5 minutes}",
            '"5 minutes" is not a duration; write it as 30s, 5m, 4h, 5d or 1h30m',
        ),
        ("limits: {idle: 0s}", "limits.idle: has to be longer than nothing"),
        ("limits: {idle: never}", '"never" is not a duration'),
        ("queue: {lifetime: 9999999d}", "is longer than ten years"),
        ("limits: {message_size: 50MB}", '"50MB" is not a size; write it as 64KiB, 50MiB'),
        ("limits: {message_size: 0}", "limits.message_size: 0 is out of range"),
        # addresses, networks, domains
        (
            "listeners: [{address: 2525}]",
            '"2525" is not an address with a port; write it as 127.0.0.1:2525',
        ),
        ("listeners: [{address: '::1:25'}]", "IPv6 address without brackets"),
        (
            "listeners: [{address: 'localhost:25'}]",
            'listeners.0.address: "localhost:25" has no IP address before the port; write'
            " 127.0.0.1:25",
        ),
        (
            f"listeners: [{{address: 'unix:/{'x' * 120}'}}]",
            "at most 107 octets; choose a shorter one",
        ),
        (
            "access: {networks: [10.0.0.1/8]}",
            "bits set behind its prefix; write 10.0.0.0/8, or 10.0.0.1 alone",
        ),
        (
            "access: {networks: [10.0.0]}",
            'access.networks.0: "10.0.0" is not a network; write it as 192.0.2.0/24',
        ),
        ("policy: {domains: {'a b': {}}}", 'policy.domains.a b: "a b" is not a domain'),
        ("policy: {domains: {'*': {}}}", "put what holds for every domain under policy.default"),
        ("policy: {domains: {'*a.example': {}}}", 'only "*." in front is understood'),
        (
            "resolver: {nameservers: [dns.example]}",
            '"dns.example" is not the address of a nameserver',
        ),
        ("hostname: a..b", "hostname: "),
        # YAML itself
        ("a: b: c", "relay.yaml:1: not YAML: "),
        ("queue:\n\tpath: x", "relay.yaml:2: not YAML: "),
        ("queue:\n\tpath: x", "indent with spaces, not with tabs"),
        ("routes:\n  *: {host: a.example}", 'put a value that begins with "*" in quotes'),
        ("- a\n- b", "relay.yaml:1: not a list of keys; begin with a key"),
        ("a: &x [*x]", "an alias that contains itself"),
        ("workers: 1\n---\nworkers: 1", "keep one document"),
        ("? [a, b]\n: c", "a key that is not a word"),
        # what is wrong together
        (
            "listeners: [{address: '127.0.0.1:25', auth: required}]",
            "auth: required without a user who could log in",
        ),
        (
            "listeners: [{address: '0.0.0.0:25', tls: starttls}]",
            "listeners.0.tls: tls: starttls without a certificate",
        ),
        (
            "listeners: [{address: '0.0.0.0:25', tls: implicit, certificate: /nowhere.pem}]",
            "listeners.0.certificate: /nowhere.pem: No such file or directory; correct the path",
        ),
        (
            f"listeners: [{{address: '0.0.0.0:25', auth: optional}}]\n"
            f"access: {{users: {{a: {{password: '{HASH}'}}}}}}",
            "relay.yaml:1: listeners.0.auth: passwords would come in clear",
        ),
        (
            "listeners: [{address: '0.0.0.0:25'}]\naccess: {networks: [0.0.0.0/0]}",
            "relay.yaml:2: access.networks.0: 0.0.0.0/0 lets the whole world relay through"
            " 0.0.0.0:25: an open relay",
        ),
        (
            "listeners:\n- address: 127.0.0.1:25\n- address: 127.0.0.1:25",
            "relay.yaml:3: listeners.1.address: 127.0.0.1:25 is taken by listener 0 already",
        ),
        (
            "access: {users: {a: {password: secret}}}",
            "not an argon2 hash; make one with `relay password`",
        ),
        (
            f"access: {{users: {{a: {{password: '{HASH}', sender_domains: []}}}}}}",
            "this user could send nothing",
        ),
        (
            "tls: {min_version: TLSv1.2, opportunistic_min_version: TLSv1.3}",
            "stricter than tls.min_version",
        ),
        ("tls: {ca_file: /nowhere}", "tls.ca_file: /nowhere: No such file or directory"),
        ("tls: {ca_file: /dev/null}", "tls.ca_file: /dev/null: no certificates in it"),
        (
            "routes: {a.example: {host: b.example, username: u}}",
            "username and password_file belong together",
        ),
        (
            "routes: {a.example: {host: b, username: u, password_file: /no}}",
            "routes.a.example.password_file: /no: No",
        ),
        ("queue: {retry: []}", "queue.retry: an empty list"),
        (
            "queue:\n  lifetime: 1h\n  warn_after: 1h",
            "relay.yaml:3: queue.warn_after: not before queue.lifetime (1h)",
        ),
        (
            "workers: 21\ndelivery: {concurrency_per_destination: 20}",
            "more workers than a destination may have connections",
        ),
        (
            "queue: {url: 'mysql://db/relay'}",
            "queue.url: it cannot be used: write postgresql://USER@HOST/DATABASE",
        ),
        ("queue: {url: 'postgresql://relay@db/relay?speed=9'}", "there is no option 'speed'"),
        (
            "queue: {url: 'postgresql://relay@db/relay', path: /var/spool/relay}",
            "queue.path: the queue is at queue.url",
        ),
        ("queue: {node: mx-a}", "queue.node: the queue is in a directory of this machine"),
        (
            "queue: {url: 'postgresql://relay@db/relay', lease: 1s}",
            "queue.lease: 1s is no length for a lease",
        ),
        (
            "workers: 9\nqueue: {url: 'postgresql://relay@db/relay'}\ndelivery: {concurrency: 8}",
            "workers: more workers than there may be connections",
        ),
        ("admin: {http: '0.0.0.0:80'}", "an HTTP API open to the network without a key"),
    ],
)
def test_a_mistake_is_named_with_line_key_and_cure(text: str, said: str) -> None:
    found = mistakes_of(text)
    assert any(said in mistake for mistake in found), found
    assert all(mistake.startswith("relay.yaml:") for mistake in found)
    assert all("; " in mistake for mistake in found), "each has a cure"


def test_all_mistakes_are_named_at_once_in_the_order_of_the_file() -> None:
    found = mistakes_of(
        "workers: x\nqueue: {lifetime: 5}\nfoo: 1\nlog:\n  level: loud\n  level: info\n"
    )
    assert [mistake.split(":")[1] for mistake in found] == ["1", "2", "3", "5", "6"]


def test_a_mistake_is_not_said_twice() -> None:
    assert len(mistakes_of("listeners: [{address: 5}]")) == 1
    assert len(mistakes_of("routes: {a.example: {host: 'x y'}}")) == 1


def test_a_secret_in_a_mistake_is_not_shown() -> None:
    assert "hunter2" not in "".join(mistakes_of("access: {users: {a: {password: hunter2}}}"))


def test_control_characters_in_a_value_are_escaped_in_the_mistake() -> None:
    found = mistakes_of('limits: {idle: "5m\\e[31m\\nfoo"}')
    assert len(found) == 1
    assert "\x1b" not in found[0]


def test_a_file_that_cannot_be_read_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere\.yaml: No such file or directory; name another file with -c"
    ):
        load(tmp_path / "nowhere.yaml", {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path, {})


def test_a_file_that_is_no_text_is_a_mistake_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "relay.yaml"
    path.write_bytes(b"workers: 1\nhostname: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"relay\.yaml:2: not UTF-8; save the file as UTF-8"):
        load(path, {})


def test_certificate_and_key_have_to_belong_together(tmp_path: Path) -> None:
    authority = trustme.CA()
    one, other = authority.issue_cert("a.example"), authority.issue_cert("b.example")
    one.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    one.private_key_pem.write_to_path(tmp_path / "key.pem")
    other.private_key_pem.write_to_path(tmp_path / "other.pem")

    def text(key: str) -> str:
        files = f"certificate: {tmp_path}/cert.pem, key: {tmp_path}/{key}"
        return f"listeners: [{{address: '127.0.0.1:25', tls: starttls, {files}}}]"

    assert config_of(text("key.pem")).listeners[0].tls is ListenerTls.STARTTLS
    assert "other.pem is another certificate's key" in mistakes_of(text("other.pem"))[0]


# --- siblings of those: texts that are no YAML of ours, and what would be an open relay ---------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 2000 + "]" * 2000, "nested more than 20 levels deep; write it flat"),
        ("a: " + "{b: " * 2000, "nested more than 20 levels deep; write it flat"),
        ("- " * 2000, "nested more than 20 levels deep; write it flat"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 1000)),
            "nested more than 20 levels deep; write it flat",
        ),
        (
            "a0: &a0 [x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 15)),
            "aliases make more than 200000 values of this file; write the values out",
        ),
        (
            "workers: 1\nhostname: a\0b",
            "relay.yaml:2: a control character ('\\x00'); save the file",
        ),
        (
            "workers: !!python/object:os.system 1",
            'the tag "tag:yaml.org,2002:python/object:os.syst',
        ),
        ("queue: !foo {path: a}", 'queue: the tag "!foo"; remove it'),
        ("x: &x {path: a}\nqueue: {<<: *x}", "queue.<<: unknown key; merge keys are not read here"),
        ("queue: {<<: {path: a}, <<: {path: b}}", "queue.<<: said twice"),
        ("workers: '2'", 'workers: "2" is a text; write 2 without quotes'),
        ("workers: -1", "workers: -1 is out of range; write a number from 1 to 64"),
        ("workers: 010", 'workers: "010" begins with 0; write 10'),
        ("workers: 1:30", 'workers: "1:30" is not a whole number; write digits only'),
        ("workers: " + "9" * 5000, "is out of range; write a number from 1 to 64"),
        ("limits: {idle: 1:30}", 'limits.idle: "1:30" is not a duration'),
        ("limits: {idle: 2030-01-31}", 'limits.idle: "2030-01-31" is not a duration'),
        ("limits: {idle: " + "9999d" * 1000 + "}", "has its units in no order"),
        ("limits: {message_size: -1}", 'limits.message_size: "-1" is not a size'),
        ("policy: {default: {require_tls: 'true'}}", '"true" is a text; write true without quotes'),
        ("policy: {domains: {a.example: true}}", "policy.domains.a.example: not a section"),
        (
            "admin: {socket_group: nosuch}",
            "admin.socket_group: no group nosuch on this machine; mak",
        ),
        ("admin: {socket_group: 100}", 'admin.socket_group: "100" is not the name of a group'),
        (
            "listeners: [{address: 'unix:/a', socket_group: nosuch}]",
            "listeners.0.socket_group: no group nosuch on this machine; make it: `groupadd nosuch`",
        ),
        ("listeners: [{address: *:2525}]", 'put a value that begins with "*" in quotes'),
        (
            "listeners: [{address: '*:2525'}]",
            'listeners.0.address: "*:2525" names no address; write 0.0.0.0:2525 for all of IPv4',
        ),
        (
            "listeners: [{address: 'localhost:2525'}]",
            '"localhost:2525" has no IP address before the port; write 127.0.0.1:2525',
        ),
        ("listeners:\n- address: :25", "write 0.0.0.0:25 for all of IPv4, [::]:25 for IPv6"),
        ("listeners: [{address: 2525}]", '"2525" is not an address with a port; write it as 127.0'),
        (
            "listeners: [{socket_mode: 0660, address: 'unix:/a'}]",
            "read as a number; put it in quotes",
        ),
        ("queue: {path: 2030-01-31}", '"2030-01-31" is read as a date; put it in quotes'),
        ("policy: {domains: {@legal.example: {}}}", "in quotes (a domain has no @)"),
        ("policy: {domains: {'@legal.example': {}}}", 'write "legal.example" without the @'),
        ("access: {networks: [::1/128]}", "put an address that begins with a colon in quotes"),
        ("access: {networks: [null]}", "access.networks.0: no value"),
        ("listeners: [null]", "listeners.0.address: is missing"),
        (
            "routes: {a.example: null}",
            "routes.a.example: no value; write a name, or keys below it:",
        ),
        (
            "listeners: [{address: '127.0.0.1:8025'}]\nadmin: {api_keys: [k]}",
            "relay.yaml:1: listeners.0.address: 127.0.0.1:8025 is taken by admin.http already",
        ),
    ],
)
def test_common_configuration_mistake_is_answered_in_a_line_with_its_cure(
    text: str, said: str
) -> None:
    began = time.process_time()
    found = mistakes_of(text)
    assert time.process_time() - began < 5
    assert any(said in mistake for mistake in found), found
    assert all(mistake.startswith("relay.yaml:") and "; " in mistake for mistake in found)
    assert all(len(mistake) < 500 for mistake in found)


@pytest.mark.parametrize("octets", ["hostname: é\n".encode("utf-16"), b"\x89PNG\r\n\x1a\n\0\0\xff"])
def test_a_file_that_is_no_utf_8_is_answered_in_a_line(tmp_path: Path, octets: bytes) -> None:
    (tmp_path / "relay.yaml").write_bytes(octets)
    with pytest.raises(ConfigError, match=r"relay.yaml:1: not UTF-8; save the file as UTF-8 text"):
        load(tmp_path / "relay.yaml", {})


def test_a_file_of_100_mib_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "relay.yaml").open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    with pytest.raises(ConfigError, match=r"relay.yaml: longer than 4 MiB; is this the right file"):
        load(tmp_path / "relay.yaml", {})


def _halves(networks: list[str], times: int) -> list[str]:
    """The same addresses in more and smaller pieces."""
    for _ in range(times):
        networks = [str(half) for one in networks for half in ipaddress.ip_network(one).subnets()]
    return networks


@pytest.mark.parametrize(
    "networks",
    [
        ["0.0.0.0/1", "128.0.0.0/1"],
        _halves(["0.0.0.0/0"], 8),
        _halves(["128.0.0.0/2"], 6),
        ["0.0.0.0/0", "10.0.0.0/8"],
        ["64.0.0.0/4"],
        ["::/0"],
        ["::/1", "8000::/1"],
        ["::ffff:0.0.0.0/96"],
        ["::ffff:0.0.0.0/97", "::ffff:128.0.0.0/97"],
        _halves(["2000::/3"], 4),
        ["2000::/4"],
    ],
)
@pytest.mark.parametrize(
    "listener",
    [
        "{address: '0.0.0.0:25'}",
        "{address: '[::]:25'}",
        "{address: '127.0.0.1:25', proxy_protocol: true}",
        "{address: 'unix:/run/smtp', proxy_protocol: true}",
    ],
)
def test_networks_that_are_most_of_the_internet_in_pieces_are_an_open_relay(
    networks: list[str], listener: str
) -> None:
    [mistake] = mistakes_of(f"listeners: [{listener}]\naccess: {{networks: {networks}}}")
    assert mistake.startswith("relay.yaml:2: access.networks")
    assert ": an open relay; name your own networks" in mistake
    config_of(f"listeners: [{{address: '127.0.0.1:25'}}]\naccess: {{networks: {networks}}}")


def test_networks_of_an_operator_are_no_open_relay() -> None:
    own = [
        "10.0.0.0/8",
        "172.16.0.0/12",
        "100.64.0.0/10",
        "203.0.113.0/24",
        "fc00::/7",
        "2001:db8::/32",
    ]
    config_of(f"listeners: [{{address: '0.0.0.0:25'}}]\naccess: {{networks: {own}}}")


def test_a_network_of_mapped_addresses_is_the_network_of_ipv4_that_it_stands_for() -> None:
    config = config_of("access: {networks: ['::ffff:10.0.0.0/104', '::ffff:192.0.2.1']}")
    assert list(map(str, config.access.networks)) == ["10.0.0.0/8", "192.0.2.1/32"]


def test_a_listener_for_ipv6_alone_is_a_warning() -> None:
    alone = config_of("listeners: [{address: '[::]:25'}]")
    assert "[::]:25 takes clients over IPv6 only; add a listener on 0.0.0.0:25" in str(
        alone.warnings
    )
    both = config_of("listeners: [{address: '[::]:25'}, {address: '0.0.0.0:25'}]")
    assert "IPv6 only" not in str(both.warnings)


@pytest.mark.parametrize("auth", ["optional", "required"])
def test_login_that_a_listener_on_loopback_never_offers_is_a_warning(auth: str) -> None:
    users = f"access: {{users: {{a: {{password: '{HASH}'}}}}}}"
    in_clear = config_of(f"listeners: [{{address: '127.0.0.1:25', auth: {auth}}}]\n{users}")
    assert "listeners.0.auth: passwords would come in clear, so AUTH would never be offered" in str(
        in_clear.warnings
    )


def test_a_hostname_that_is_not_set_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "short")
    monkeypatch.setattr(socket, "gethostname", lambda: "short")
    assert (
        config_of("\n\nworkers: 1")
        .warnings[-1]
        .startswith("relay.yaml: hostname: short is no full")
    )


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("queue: {lifetime: 2h}", "queue.warn_after", "1h"),
        ("queue: {lifetime: 1m, retry: [1d]}", "queue.warn_after", "30s"),
        ("queue: {lifetime: 10d}", "queue.warn_after", "4h"),
        ("delivery: {concurrency: 5}", "delivery.concurrency_per_destination", 5),
        ("delivery: {concurrency_per_destination: 500}", "delivery.concurrency", 500),
        ("workers: 21", "delivery.concurrency_per_destination", 21),
        ("limits: {connections: 50}", "limits.connections_per_client", 50),
        ("limits: {connections_per_client: 5000}", "limits.connections", 5000),
        ("limits: {transaction: 1m}", "limits.idle", "1m"),
        ("limits: {idle: 2h}", "limits.transaction", "2h"),
        ("tls: {opportunistic_min_version: TLSv1.3}", "tls.min_version", "TLSv1.3"),
        ("tls: {min_version: TLSv1}", "tls.opportunistic_min_version", "TLSv1"),
    ],
)
def test_a_default_gives_way_to_a_key_that_is_given(text: str, key: str, value: object) -> None:
    config = config_of(f"hostname: relay.example.net\n{text}")
    section, _, name = key.partition(".")
    assert as_document(config)[section][name] == value
    assert config.warnings == ()


def test_every_secret_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    (tmp_path / "hash").write_text(f"{HASH}\n")
    config = config_of(
        f"hostname: relay.example.net\n"
        f"admin: {{api_keys_file: {tmp_path}/keys}}\n"
        f"access: {{users: {{app1: {{password_file: {tmp_path}/hash}}}}}}",
        {"RELAY__ADMIN__WEBHOOK_SIGNING_KEY_FILE": str(tmp_path / "hash")},
    )
    assert config.admin.api_keys == ("one", "two")
    assert config.admin.webhook_signing_key == HASH
    assert config.access.users["app1"].password == HASH


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("admin: {api_keys_file: /nowhere}", "admin.api_keys_file: /nowhere: No such file"),
        (
            "admin: {api_keys: [a], api_keys_file: /x}",
            "admin.api_keys_file: api_keys is given, too",
        ),
        ("admin: {domains_file: /x}", "admin.domains_file: unknown key"),
        (
            "access: {users: {app1: {password_file: /nowhere}}}",
            "access.users.app1.password_file: /nowhere: No such file",
        ),
    ],
)
def test_a_mistake_with_the_file_of_a_secret_is_named(text: str, said: str) -> None:
    [found] = mistakes_of(text)
    assert said in found
    assert "; " in found


def test_a_group_that_a_socket_is_given_to_may_use_it() -> None:
    ours = grp.getgrgid(os.getgid()).gr_name
    listeners = f"[{{address: 'unix:/a', socket_group: {ours}}}, {{address: 'unix:/b'}}, "
    listeners += f"{{address: 'unix:/c', socket_group: {ours}, socket_mode: '0600'}}]"
    config = config_of(f"hostname: relay.example.net\nlisteners: {listeners}")
    assert [one.socket_mode for one in config.listeners] == ["0660", "0600", "0600"]


# --- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "key", "expected"),
    [
        ("RELAY__QUEUE__PATH", "/srv/spool", "queue.path", "/srv/spool"),
        ("RELAY__HOSTNAME", "MX.Example.NET.", "hostname", "mx.example.net"),
        ("RELAY__LIMITS__MESSAGE_SIZE", "64KiB", "limits.message_size", "64KiB"),
        ("RELAY__QUEUE__RETRY", "[1m, 2m]", "queue.retry", ["1m", "2m"]),
        ("RELAY__QUEUE", "{lifetime: 2d}", "queue.lifetime", "2d"),
        ("RELAY__DELIVERY__TIMEOUTS__CONNECT", "9s", "delivery.timeouts.connect", "9s"),
        (
            "RELAY__LISTENERS",
            '[{address: "0.0.0.0:2525"}]',
            "listeners",
            [{"address": "0.0.0.0:2525"}],
        ),
        ("RELAY__ACCESS__NETWORKS", "[10.0.0.0/8]", "access.networks", ["10.0.0.0/8"]),
    ],
)
def test_the_environment_wins_over_the_file(
    variable: str, value: str, key: str, expected: object
) -> None:
    document = as_document(
        config_of("queue: {path: a, retry: [9m]}\nhostname: b.example", {variable: value})
    )
    for step in key.split("."):
        document = document[step]
    if isinstance(expected, list) and isinstance(expected[0], dict):
        assert document[0]["address"] == expected[0]["address"]  # type: ignore[index]
    else:
        assert document == expected


def test_a_key_of_the_environment_wins_over_a_section_of_it() -> None:
    environ = {"RELAY__QUEUE__PATH": "/b", "RELAY__QUEUE": "{path: /a, lifetime: 2d}"}
    queue = config_of("", environ).queue
    assert (queue.path, queue.lifetime) == ("/b", timedelta(days=2))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "RELAY__QUEUE__PTH",
            "/x",
            'RELAY__QUEUE__PTH: queue.pth: unknown key; did you mean "path"?',
        ),
        (
            "RELAY__QUEUE__LIFETIME",
            "soon",
            'RELAY__QUEUE__LIFETIME: queue.lifetime: "soon" is not a duration',
        ),
        ("RELAY__QUEUE__LIFETIME", "", "RELAY__QUEUE__LIFETIME: queue.lifetime: no value"),
        ("RELAY__LIMITS", "{idle: 1m", "RELAY__LIMITS: not YAML"),
        ("RELAY__LISTENERS__0__ADDRESS", "x", "a list is given whole; write RELAY__LISTENERS=[…]"),
        ("RELAY__QUEUE____PATH", "x", "not the name of a key; write it as in RELAY__QUEUE__PATH"),
        ("RELAY__WORKERS", "0", "RELAY__WORKERS: workers: 0 is out of range"),
        ("RELAY__WORKERS", "[" * 99, "RELAY__WORKERS: not YAML: nested more than 20 levels"),
        ("RELAY__WORKERS", "\x07", "RELAY__WORKERS: a control character ('\\x07')"),
        (
            "RELAY_QUEUE__PATH",
            "/x",
            "RELAY_QUEUE__PATH: a variable that is not read; write RELAY__QUEUE__PATH",
        ),
        (
            "RELAY_QUEUE_PATH",
            "/x",
            "RELAY_QUEUE_PATH: a variable that is not read; write RELAY__QUEUE__PATH",
        ),
        (
            "RELAY_ADMIN__API_KEYS_FILE",
            "/x",
            "RELAY_ADMIN__API_KEYS_FILE: a variable that is not read; write"
            " RELAY__ADMIN__API_KEYS_FILE",
        ),
        ("RELAY_HOSTNAME", "x", "RELAY_HOSTNAME: a variable that is not read"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    variable: str, value: str, said: str
) -> None:
    found = mistakes_of("listeners: [{address: '127.0.0.1:25'}]", {variable: value})
    assert len(found) == 1
    assert found[0].startswith(said) or said in found[0]


def test_other_environment_variables_are_ignored() -> None:
    environ = {"RELAY_CONFIG": "x", "PATH": "y", "RELAY_PORT_2525_TCP": "tcp://10.0.0.1:2525"}
    assert but_hostname(config_of("", environ)) == but_hostname(config_of(""))


def test_the_file_is_found_where_the_interface_says(tmp_path: Path) -> None:
    assert default_path({"RELAY_CONFIG": "/a/b.yaml"}) == Path("/a/b.yaml")
    assert default_path({}) in (Path("conf/relay.yaml"), Path("/etc/relay/relay.yaml"))


# --- what a correct file becomes --------------------------------------------------------------


def test_an_empty_file_is_all_defaults() -> None:
    assert but_hostname(config_of("")) == Config(hostname="relay.example.net")
    assert but_hostname(config_of("# nothing\n")) == but_hostname(
        config_of("queue:\npolicy:\n  domains:\n")
    )


def test_values_get_the_types_of_the_modules() -> None:
    config = config_of(
        f"""
        access:
          networks: [10.0.0.0/8, 192.0.2.1]
          users: {{a.b: {{password: "{HASH}", sender_domains: [Example.COM, "*.Example.org"]}}}}
        policy:
          default: {{require_tls: yes}}
          domains:
            no: {{skip_verification: true}}
            "*.Bücher.example": {{allow_override: false}}
        routes: {{"*": {{host: "[2001:db8::1]", tls: implicit}}, a.example: {{host: MX.example.}}}}
        limits: {{idle: 1h30m, message_size: 64KiB}}
        queue: {{warn_after: never}}
        resolver: {{nameservers: [9.9.9.9, "127.0.0.1:5353", "[::1]:53"]}}
        """
    )
    assert config.access.networks[1] == ipaddress.ip_network("192.0.2.1/32")
    user = config.access.users["a.b"]
    assert (user.name, user.sender_domains) == ("a.b", ("example.com", "*.example.org"))
    assert config.policy.default == TlsRule(require_tls=True)
    assert set(config.policy.domains) == {"no", "*.xn--bcher-kva.example"}
    assert config.routes["*"] == NextHop("*", (("2001:db8::1",),), tls=TlsMode.IMPLICIT)
    assert config.routes["a.example"] == NextHop("a.example", (("mx.example",),))
    assert config.limits.idle == timedelta(minutes=90)
    assert config.limits.message_size_bytes == 65536
    assert config.queue.schedule.warn_after is None


def test_legal_but_unwise_value_is_a_warning() -> None:
    config = config_of(
        """
        hostname: short
        listeners: [{address: "0.0.0.0:25"}]
        access: {networks: [11.0.0.0/8]}
        delivery: {concurrency: 5, concurrency_per_destination: 6}
        """
    )
    text = "\n".join(config.warnings)
    assert "access.networks.0: 11.0.0.0/8 is a large part of the public Internet" in text
    assert "delivery.concurrency_per_destination: more than delivery.concurrency (5)" in text
    assert "\nrelay.yaml:2: hostname: short is no full domain name" in f"\n{text}"


@pytest.mark.parametrize(
    ("rule", "more", "warned"),
    [
        ("require_tls: true, allow_override: false", "", False),
        ("allow_override: false", "", True),
        ("require_tls: true, skip_verification: true, allow_override: false", "", True),
        ("require_tls: true", "", True),
        ("require_tls: true", "  default: {allow_override: false}", False),
        ("require_tls: true, allow_override: false", "routes: {p.example: {host: h}}", True),
        ("require_tls: true, allow_override: false", "routes: {'*': {host: h}}", True),
        ("require_tls: true, allow_override: false", "routes: {'*.example': {host: h}}", True),
        ("require_tls: true, allow_override: false", "routes: {'*.p.example': {host: h}}", False),
    ],
)
def test_pinned_hosts_that_protect_nothing_are_a_warning(
    rule: str, more: str, warned: bool
) -> None:
    rule = f"{{{rule}, mx: [mx.p.example]}}"
    config = config_of(f"policy:\n  destinations: {{p.example: {rule}}}\n{more}")
    found = [w for w in config.warnings if "policy.destinations.p.example.mx" in w]
    assert bool(found) is warned


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "mx: no value; write a value behind the colon, or remove the key"),
        ("[]", "mx: no host is named; name one, or remove the key"),
        ("['*']", '"*" would allow every host; a pin names hosts'),
        ("[192.0.2.1]", "is an address; a pin names a host"),
        ("['[192.0.2.1]']", "is an address; a pin names a host"),
        ("[localhost]", '"localhost" has no dot in its domain; write it as mx1.example.com'),
        ("['*.com']", '"*.com" has no dot in its domain'),
        ("[.p.example]", '".p.example" begins with a dot; write "*.p.example"'),
        ("['mx1.p.example:25']", 'has a port, and a pin has none; write "mx1.p.example"'),
        ("['']", "an empty name; name a host"),
    ],
)
def test_pin_that_names_no_host_is_a_mistake_with_its_cure(written: str, said: str) -> None:
    [mistake] = mistakes_of(f"policy: {{destinations: {{p.example: {{mx: {written}}}}}}}")
    assert said in mistake


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        (
            "policy: {domains: {p.example: {mta_sts: ignore}}}",
            'by recipient domain it belongs at "policy.destinations.p.example.mta_sts"',
        ),
        (
            "policy: {domains: {p.example: {mx: [mx.p.example]}}}",
            'by recipient domain it belongs at "policy.destinations.p.example.mx"',
        ),
        (
            "policy: {default: {mx: [mx.p.example]}}",
            'by recipient domain it belongs at "policy.destinations.DOMAIN.mx"',
        ),
        ("policy: {default: {mta_sts: ignore}}", 'it belongs at "policy.mta_sts"'),
    ],
)
def test_key_of_a_recipient_domain_is_sent_to_the_recipient_domains(text: str, cure: str) -> None:
    [mistake] = mistakes_of(text)
    assert mistake.endswith(f"unknown key; {cure}")


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("downgrade_memory: {keep: 90}", "as in 90d"),
        ("downgrade_memory: {defer_for: 24}", "as in 24h"),
        ("queue: {lifetime: 5}", "as in 5d"),
        ("queue: {retry: [1, 5m]}", "as in 1m"),
        ("limits: {idle: 0}", "as in 0s"),
    ],
)
def test_cure_of_a_bare_number_has_the_unit_that_fits_the_default(text: str, cure: str) -> None:
    [mistake] = mistakes_of(text)
    assert mistake.endswith(f"write a unit, {cure}")


@pytest.mark.parametrize(
    ("keys", "warned"),
    [("keep: 6d", True), ("keep: 7d", False), ("keep: 6d, action: ignore", False)],
)
def test_memory_of_less_than_a_week_is_a_warning(keys: str, warned: bool) -> None:
    config = config_of(f"downgrade_memory: {{{keys}}}")
    assert any("downgrade_memory.keep: shorter than 7d" in w for w in config.warnings) is warned


def test_printed_configuration_of_a_rule_without_a_pin_is_read_again() -> None:
    config = config_of("policy: {destinations: {p.example: {require_tls: true, mta_sts: ignore}}}")
    assert config_of(yaml.safe_dump(as_document(config))).policy == config.policy


def test_pinned_hosts_are_compared_as_names_are() -> None:
    config = config_of(
        "policy: {destinations: {p.example: {mx: [MX1.P.example, '*.Bücher.example']}}}"
    )
    pins = config.policy.destinations["p.example"].mx
    assert pins == ("mx1.p.example", "*.xn--bcher-kva.example")


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("downgrade_memory: {action: defer, defer_for: 6d}", ["queue.lifetime (5d)"]),
        ("downgrade_memory: {action: defer, defer_for: 5d}", ["queue.lifetime (5d)"]),
        (
            "downgrade_memory: {action: defer, defer_for: 9d, keep: 9d}\nqueue: {lifetime: 10d}",
            ["downgrade_memory.keep (9d)"],
        ),
        ("downgrade_memory: {action: log, defer_for: 6d}", []),
        ("downgrade_memory: {action: defer}", []),
        (
            "downgrade_memory: {defer_for: 6d}\n"
            "policy: {destinations: {p.example: {downgrade_memory: defer}}}",
            ["queue.lifetime (5d)"],
        ),
    ],
)
def test_wait_that_never_ends_with_mail_that_goes_is_a_warning(
    text: str, warned: list[str]
) -> None:
    found = [one for one in config_of(text).warnings if "downgrade_memory.defer_for" in one]
    assert len(found) == len(warned)
    assert all(words in one for words, one in zip(warned, found, strict=True))


@pytest.mark.parametrize("word", ["on", "enforce", "'defer '"])
def test_action_of_the_memory_is_one_of_three_words(word: str) -> None:
    [mistake] = mistakes_of(f"downgrade_memory: {{action: {word}}}")
    assert mistake.startswith("relay.yaml:1: downgrade_memory.action: ")


def test_the_document_in_effect_reads_back_as_the_same_configuration() -> None:
    config = config_of(
        f"access: {{users: {{a: {{password: '{HASH}'}}}}}}\n"
        f"queue: {{warn_after: never, lifetime: 36h}}"
    )
    text = yaml.safe_dump(as_document(config, with_secrets=True))
    # A key whose value is null in the document is one that says nothing; it is allowed to.
    assert config_of(text) == config


def test_secrets_are_masked_in_the_document() -> None:
    config = config_of(
        f"access: {{users: {{a: {{password: '{HASH}'}}}}}}\nadmin: {{api_keys: [topsecret]}}"
    )
    text = yaml.safe_dump(as_document(config))
    assert HASH not in text
    assert "topsecret" not in text
    assert HASH not in repr(config)
    assert "topsecret" not in repr(config)


# --- durations and sizes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30s", timedelta(seconds=30)),
        ("5m", timedelta(minutes=5)),
        ("1h30m", timedelta(minutes=90)),
        ("5d", timedelta(days=5)),
        ("2w", timedelta(days=14)),
        ("250ms", timedelta(milliseconds=250)),
    ],
)
def test_a_duration_is_read_as_people_write_it(text: str, value: timedelta) -> None:
    assert parse_duration(text) == value


@given(st.timedeltas(timedelta(milliseconds=1), timedelta(days=3000)))
def test_a_duration_survives_being_written_and_read(value: timedelta) -> None:
    whole = timedelta(milliseconds=value // timedelta(milliseconds=1))
    assert parse_duration(format_duration(whole)) == whole


@given(st.integers(0, 10**14))
def test_a_size_survives_being_written_and_read(octets: int) -> None:
    assert parse_size(format_size(octets)) == octets


# --- the reference ----------------------------------------------------------------------------


def uncommented(text: str) -> str:
    """The reference with every commented key ("#key: …", and "#  …" lines below it) in force."""
    lines, in_example = [], False
    for line in text.split("\n"):
        bare = line.lstrip()
        begins = bare.startswith("#") and len(bare) > 1 and not bare[1].isspace()
        in_example = begins or (in_example and bare.startswith("#  "))
        lines.append(line.replace("#", "", 1) if in_example else line)
    return "\n".join(lines)


def dotted_keys(document: object, key: str = "") -> set[str]:
    if isinstance(document, list):
        return set().union(*(dotted_keys(item, f"{key}.*") for item in document))
    if not isinstance(document, dict):
        return set()
    below = [dotted_keys(value, f"{key}.{name}") for name, value in document.items()]
    return {f"{key}.{name}" for name in document}.union(*below)


def test_the_reference_says_the_defaults() -> None:
    assert but_hostname(load(ROOT / "conf/relay.yaml", {})) == Config(hostname="relay.example.net")


def test_the_reference_has_every_key() -> None:
    said = dotted_keys(yaml.safe_load(uncommented((ROOT / "conf/relay.yaml").read_text())))
    examples = {
        "listeners": "listeners.*",
        "access.users": "access.users.app1",
        "policy.domains": "policy.domains.legacy.example",
        "policy.destinations": "policy.destinations.partner.example",
        "next_hops": "next_hops.provider",
        "dkim.domains": "dkim.domains.example.com",
        "admin.web.users": "admin.web.users.alice",
    }
    missing = []
    for key, _ in known_keys(section_of(Config)):
        for section, example in examples.items():
            if key.startswith(f"{section}.*."):
                key = key.replace(f"{section}.*", example)
        if f".{key}" not in said:
            missing.append(key)
    # `allow_override` and the settings are shown in `policy.default`, and need not be in each
    # example; the keys of a next hop are shown in `next_hops`, its short keys in comments; those of
    # `oauth2` in one example for each grant.
    elsewhere = (
        "policy.domains.",
        "policy.destinations.",
        "routes.*.",
        "routes_by_sender.*.",
        "oauth2.*.",
    )
    short = [f"next_hops.provider.{name}" for name in section_of(NextHop).short]
    assert [key for key in missing if not key.startswith(elsewhere) and key not in short] == []
    for key in section_of(TokenSource).keys:
        assert any(said_key.endswith(f".{key}") for said_key in said if ".oauth2." in said_key), key


def test_the_reference_has_no_key_too_many() -> None:
    text = uncommented((ROOT / "conf/relay.yaml").read_text())
    found = mistakes_of(text)
    assert not [mistake for mistake in found if "unknown key" in mistake]
    # What is left are files and a group that are not there, a group that only root may give files
    # to, a proxy without its networks, and a login with both of its proofs.
    other = (
        *("No such file", "no group relay", "is not in the group"),
        *("admin.web.proxy_networks is empty", "beside oauth2"),
    )
    assert all(any(words in mistake for words in other) for mistake in found), found
