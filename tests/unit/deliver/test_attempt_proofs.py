"""What the host of a next hop has to prove: roots, name and pins of the next hop's own; and what
the relay proves to the host, by a certificate.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from relay.deliver.tls import TlsSessions
from relay.mail.outcome import Deferred, Delivered, VerifiedBy
from relay.route.next_hop import Auth, Credentials, NextHop
from relay.route.security import OnTlsUnmet
from relay.sandbox.certificates import Authority, Certificate, Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, StartTls
from tests.fakes.mail import entry
from tests.unit.deliver.conftest import Rig

WAYS = [(False, False), (False, True), (True, False), (True, True)]
NAME = "mx.partner.example"
WRONG_PIN = b64encode(bytes(32)).decode()


def pin(server: MxServer, kind: Kind = Kind.GOOD) -> str:
    """As `openssl x509 -pubkey | openssl pkey -outform DER | openssl dgst -sha256` has it."""
    leaf = server.authority.leaf(server.name, kind, address=server.address)
    key = x509.load_pem_x509_certificate(leaf.chain_pem).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(sha256(spki).digest()).decode()


def use(rig: Rig, **keys: Any) -> NextHop:
    """Make all hosts of the rig those of one next hop."""
    hop = NextHop(**({"name": "partner", "hosts": ((NAME,),)} | keys))
    rig.hosts[:] = [replace(host, hop=hop) for host in rig.hosts]
    return hop


def written(directory: Path, name: str, content: bytes) -> str:
    path = directory / name
    path.write_bytes(content)
    return str(path)


def shown(directory: Path, certificate: Certificate, name: str = "client") -> dict[str, str]:
    return {
        "certificate": written(directory, f"{name}.pem", certificate.chain_pem),
        "key": written(directory, f"{name}.key", certificate.key_pem),
    }


def nothing_but_tls(server: MxServer) -> bool:
    """Whether the host heard of no message."""
    verbs = {verb for connection in server.connections for verb in connection.verbs}
    return server.messages == [] and verbs <= {"EHLO", "STARTTLS", "QUIT"}


# --- pins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("require", "skip"), WAYS)
@pytest.mark.parametrize(
    ("kind", "roots", "pinned", "by"),
    [
        (Kind.GOOD, None, ["right"], VerifiedBy.PKIX),
        (Kind.GOOD, None, ["wrong", "right"], VerifiedBy.PKIX),
        (Kind.GOOD, None, ["wrong"], None),
        (Kind.EXPIRED, None, ["right"], None),
        (Kind.WRONG_NAME, None, ["right"], None),
        (Kind.GOOD, "none", ["right"], VerifiedBy.PIN),
        (Kind.SELF_SIGNED, "none", ["wrong", "right"], VerifiedBy.PIN),
        (Kind.EXPIRED, "none", ["right"], VerifiedBy.PIN),
        (Kind.WRONG_NAME, "none", ["right"], VerifiedBy.PIN),
        (Kind.GOOD, "none", ["wrong"], None),
    ],
)
async def test_pin_is_checked_besides_the_chain_or_instead_of_it(
    rig, require, skip, kind, roots, pinned, by
):
    mx = await rig.mx(Script(certificate=kind), name=NAME)
    pins = tuple({"right": pin(mx, kind), "wrong": WRONG_PIN}[each] for each in pinned)
    use(rig, pin_sha256=pins, ca_file=roots)
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    outcome = await rig.send(entry(require=require, skip=skip))
    assert outcome.session is not None
    assert outcome.session.verified_by is by
    assert outcome.session.downgrade is None
    if by is None:
        assert isinstance(outcome, Deferred)
        assert outcome.status == "4.7.5"
        assert nothing_but_tls(mx)
        assert outcome.session.pin is None
    else:
        assert isinstance(outcome, Delivered)
        assert outcome.session.certificate_verified
        assert outcome.session.pin == pins[-1]
        assert mx.messages[0].in_tls


async def test_wrong_pin_is_named_with_the_one_that_the_host_has(rig):
    mx = await rig.mx(name=NAME)
    use(rig, pin_sha256=(WRONG_PIN,))
    outcome = await rig.send(entry())
    assert f"is not pinned; its pin is {pin(mx)}" in outcome.description


@pytest.mark.parametrize("starttls", [StartTls.ABSENT, StartTls.REFUSED_454])
async def test_next_hop_with_a_pin_gets_nothing_in_clear(rig, starttls):
    mx = await rig.mx(Script(starttls=starttls), name=NAME)
    use(rig, pin_sha256=(pin(mx),), ca_file="none")
    outcome = await rig.send(entry())
    assert outcome.status == "4.7.4"
    assert nothing_but_tls(mx)


async def test_pin_alone_is_enough_for_a_host_without_a_name(rig):
    mx = await rig.mx(name=NAME)
    rig.hosts[:] = [replace(rig.hosts[0], name=mx.address)]
    use(rig, pin_sha256=(pin(mx),), ca_file="none")
    assert isinstance(await rig.send(entry(require=True)), Delivered)
    assert mx.messages[0].sni is None


# --- roots and names ----------------------------------------------------------------------------


async def test_roots_of_a_next_hop_replace_all_others(rig, tmp_path):
    own = Authority("An authority of our own")
    mx = await rig.mx(name=NAME)  # of the authority that the relay trusts
    use(rig, ca_file=written(tmp_path, "ca.pem", own.ca_pem))
    outcome = await rig.send(entry(require=True))
    assert (outcome.status, mx.messages) == ("4.7.5", [])
    mx.authority = own
    rig.attempt._destinations.hosts.retry()
    assert isinstance(await rig.send(entry(require=True)), Delivered)
    rig.hosts[:] = [replace(host, hop=None) for host in rig.hosts]
    outcome = await rig.send(entry(require=True))
    assert outcome.status == "4.7.5"  # for other next hops these roots are not trusted


@pytest.mark.parametrize(("verify_name", "status"), [(NAME, "2.0.0"), ("other.example", "4.7.5")])
async def test_name_to_verify_replaces_that_of_the_host_and_is_its_sni(rig, verify_name, status):
    mx = await rig.mx(name=NAME)
    rig.hosts[:] = [replace(rig.hosts[0], name="gateway.internal.example")]
    use(rig, verify_name=verify_name)
    outcome = await rig.send(entry(require=True))
    assert outcome.status == status
    assert mx.connections[0].sni == verify_name
    assert outcome.session is not None
    assert outcome.session.mx_host == "gateway.internal.example"


async def test_address_with_a_name_to_verify_can_be_verified(rig):
    mx = await rig.mx(name=NAME)
    rig.hosts[:] = [replace(rig.hosts[0], name=mx.address)]
    use(rig, verify_name=NAME)
    assert isinstance(await rig.send(entry(require=True)), Delivered)


@pytest.mark.parametrize("require", [False, True])
async def test_roots_and_name_alone_demand_no_tls_of_a_message(rig, require, tmp_path):
    mx = await rig.mx(Script(starttls=StartTls.ABSENT), name=NAME)
    use(rig, verify_name=NAME, ca_file=written(tmp_path, "ca.pem", rig.authority.ca_pem))
    outcome = await rig.send(entry(require=require))
    assert isinstance(outcome, Delivered) is not require
    assert len(mx.messages) == (not require)


# --- a certificate of the relay -----------------------------------------------------------------

OURS = Authority("Clients of the partner")


@pytest.mark.parametrize(("require", "skip"), WAYS)
async def test_client_certificate_is_shown_to_the_host(rig, tmp_path, require, skip):
    mx = await rig.mx(Script(client_ca=OURS.ca_pem), name=NAME)
    use(rig, **shown(tmp_path, OURS.client("relay.example.com")))
    outcome = await rig.send(entry(require=require, skip=skip))
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.verified_by is VerifiedBy.PKIX
    assert mx.connections[0].client_name == "relay.example.com"


async def test_client_certificate_demands_a_verified_host(rig, tmp_path):
    mx = await rig.mx(Script(certificate=Kind.EXPIRED), name=NAME)
    use(rig, **shown(tmp_path, OURS.client("relay.example.com")))
    outcome = await rig.send(entry(skip=True))
    assert outcome.status == "4.7.5"
    assert nothing_but_tls(mx)


async def test_host_that_does_not_take_the_certificate_is_dead_as_one_that_refuses_a_login(
    rig, tmp_path
):
    mx = await rig.mx(Script(client_ca=Authority("Others").ca_pem), name=NAME)
    second = await rig.mx(Script(client_ca=OURS.ca_pem), name="mx2.partner.example", preference=1)
    use(rig, **shown(tmp_path, OURS.client("relay.example.com")))
    for _ in range(2):
        assert isinstance(await rig.send(entry()), Delivered)
    assert (len(mx.connections), len(second.messages)) == (1, 2)


async def test_client_certificate_is_read_again_when_its_files_change(rig, tmp_path, caplog):
    rig.limits = replace(rig.limits, messages=1)
    mx = await rig.mx(Script(client_ca=OURS.ca_pem, resumes_tls=True), name=NAME)
    files = shown(tmp_path, OURS.client("first.example.com"))
    use(rig, **files)
    await rig.send(entry())
    second = OURS.client("second.example.com")
    Path(files["certificate"]).write_bytes(second.chain_pem)
    await rig.send(entry())  # the key is still the old one
    assert "cannot be used: [X509: KEY_VALUES_MISMATCH] key values mismatch" in caplog.text
    assert "what was read before stays in use" in caplog.text
    Path(files["key"]).write_bytes(second.key_pem)
    assert isinstance(await rig.send(entry()), Delivered)
    assert [connection.client_name for connection in mx.connections] == [
        "first.example.com",
        "first.example.com",
        "second.example.com",
    ]


async def test_client_certificate_may_be_one_that_systemd_gives_to_the_service(
    rig, tmp_path, monkeypatch
):
    mx = await rig.mx(Script(client_ca=OURS.ca_pem), name=NAME)
    files = shown(tmp_path, OURS.client("first.example.com"))
    given = {key: f"$CREDENTIALS_DIRECTORY/{Path(path).name}" for key, path in files.items()}
    use(rig, **given)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    outcome = await rig.send(entry())
    assert outcome.status == "4.3.0"
    assert "$CREDENTIALS_DIRECTORY is not set" in outcome.description
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert isinstance(await rig.send(entry()), Delivered)
    assert mx.connections[-1].client_name == "first.example.com"


@pytest.mark.parametrize("key", ["certificate", "ca_file"])
async def test_mail_waits_where_a_file_cannot_be_read_and_the_host_is_not_asked(rig, key):
    mx = await rig.mx(name=NAME)
    use(rig, **{key: "/nowhere/file.pem"})
    for _ in range(2):
        outcome = await rig.send(entry())
        assert isinstance(outcome, Deferred)
        assert outcome.status == "4.3.0"
        assert "next hop partner: " in outcome.description
        assert "/nowhere/file.pem" in outcome.description
        assert "No such file" in outcome.description
    assert mx.connections == []


# --- what is shared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "is_shared"),
    [
        ({}, True),
        ({"name": "another"}, False),
        ({"verify_name": NAME}, False),
        ({"hello": "another.example"}, False),
    ],
)
async def test_connections_and_sessions_are_shared_within_one_next_hop_alone(rig, other, is_shared):
    mx = await rig.mx(Script(resumes_tls=True), name=NAME)
    rig.contexts.sessions = TlsSessions()
    use(rig)
    await rig.send(entry(require=True))
    use(rig, **other)
    await rig.send(entry(require=True))
    assert len(mx.connections) == (1 if is_shared else 2)
    assert not any(connection.resumed for connection in mx.connections)
    for _ in range(2):  # no connection is kept any more
        await rig.attempt._pool.close()
        await rig.send(entry(require=True))
    assert [connection.resumed for connection in mx.connections][-2:] == [True, True]


async def test_login_of_another_next_hop_at_the_same_host_resumes_no_session(rig):
    rig.limits = replace(rig.limits, messages=1)
    rig.contexts.sessions = TlsSessions()
    mx = await rig.mx(Script(offers=("AUTH PLAIN",), resumes_tls=True), name=NAME)
    for user in ("one", "one", "two", "two"):
        use(rig, auth=Auth(username=user))
        login = Credentials(user, "secret")
        rig.hosts[:] = [replace(host, credentials=login) for host in rig.hosts]
        assert isinstance(await rig.send(entry()), Delivered)
    assert [connection.resumed for connection in mx.connections] == [False, True, False, True]


# --- how the relay connects ---------------------------------------------------------------------


async def test_next_hop_says_its_own_name_in_ehlo_from_its_own_address(rig):
    mx = await rig.mx(name=NAME)
    use(rig, hello="mail.example.com", source_address="127.0.7.7")
    await rig.send(entry())
    (connection,) = mx.connections
    assert connection.peer[0] == "127.0.7.7"
    assert [line for _, line in connection.commands if "EHLO" in line] == [
        "EHLO mail.example.com"
    ] * 2


async def test_source_address_that_the_machine_does_not_have_is_no_death_of_the_host(rig):
    mx = await rig.mx(name=NAME)
    use(rig, source_address="192.0.2.99")
    for _ in range(2):
        outcome = await rig.send(entry())
        assert outcome.status == "4.3.0"
        assert "source_address 192.0.2.99 cannot be used: Cannot assign" in outcome.description
    assert mx.connections == []
