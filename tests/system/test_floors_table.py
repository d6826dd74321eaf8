"""What the recipient's domain publishes, through the real relay: floors against mail hosts.

    4 settings × what DANE, MTA-STS and the operator's pins say of a host × 8 kinds of host

As in `test_tls_table`, each case has a domain and a mail host of its own, all are played at once,
and what came of each is compared with what had to come of it: what was said in clear, how many
copies arrived, the line of the log, and that `relay explain` had told so. `expected` is the rule as
its description has it: the settings choose a row, a floor raises it, nothing lowers a floor.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from relay.deliver import https
from relay.sandbox.certificates import Authority, Kind
from relay.sandbox.dns import Fault
from relay.sandbox.mx import MxServer
from relay.sandbox.policy_host import policy
from relay.sandbox.recording import RecordedConnection
from relay.sandbox.script import TLS_1_0_ONLY, Script, StartTls
from tests.rigs.dane import associated
from tests.rigs.policies import World, open_world
from tests.rigs.relay import Relay, asked
from tests.rigs.sandbox import Event, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Settings = tuple[bool, bool]
"""require_tls, skip_verification."""

ALL_SETTINGS: tuple[Settings, ...] = ((False, False), (False, True), (True, False), (True, True))


class Met(StrEnum):
    """What becomes of TLS at a host."""

    HANDSHAKE = "the handshake is done"
    NOT_OFFERED = "STARTTLS not offered"
    REFUSED = "STARTTLS refused"
    FAILED = "the handshake fails"
    OLD = "TLS 1.0 and no later"


@dataclass(frozen=True)
class Host:
    """A kind of mail host. `fault`: what is wrong with its certificate, for who looks at it."""

    script: Script
    met: Met = Met.HANDSHAKE
    fault: str = ""


def _shows(kind: Kind, fault: str = "") -> Host:
    return Host(Script(certificate=kind), fault=fault)


HOSTS = {
    "valid": _shows(Kind.GOOD),
    "wrong-name": _shows(Kind.WRONG_NAME, "certificate-host-mismatch"),
    "expired": _shows(Kind.EXPIRED, "certificate-expired"),
    "untrusted": _shows(Kind.UNKNOWN_CA, "certificate-not-trusted"),
    "no-starttls": Host(Script(starttls=StartTls.ABSENT), Met.NOT_OFFERED),
    "starttls-454": Host(Script(starttls=StartTls.REFUSED_454), Met.REFUSED),
    "handshake": Host(Script(starttls=StartTls.CLOSE_IN_HANDSHAKE), Met.FAILED),
    "old-tls": Host(TLS_1_0_ONLY, Met.OLD),
}


@dataclass(frozen=True)
class Floor:
    """What is published of a domain, and what the operator says of it.

    `tlsa`: ee (its host's key), ta (the trusted root, whole), other, unusable, failed.
    `sts`: the mode of its policy, `names`: whether that names its host. `pin`: in or out.
    `dane`, `mta_sts`: the rule for this destination.
    """

    tlsa: str = ""
    sts: str = ""
    names: bool = True
    pin: str = ""
    dane: str = "enforce"
    mta_sts: str = "enforce"

    @property
    def is_signed(self) -> bool:
        return bool(self.tlsa) or not self.sts


FLOORS = {
    "none": Floor(),
    "dane-ee": Floor("ee"),
    "dane-ta": Floor("ta"),
    "dane-other": Floor("other"),
    "dane-unusable": Floor("unusable"),
    "dane-failed": Floor("failed"),
    "dane-other-testing": Floor("other", dane="testing"),
    "dane-unusable-testing": Floor("unusable", dane="testing"),
    "dane-failed-testing": Floor("failed", dane="testing"),
    "dane-other-ignored": Floor("other", dane="ignore"),
    "sts": Floor(sts="enforce"),
    "sts-not-named": Floor(sts="enforce", names=False),
    "sts-testing": Floor(sts="testing"),
    "sts-testing-not-named": Floor(sts="testing", names=False),
    "sts-none": Floor(sts="none"),
    "sts-for-testing": Floor(sts="enforce", mta_sts="testing"),
    "sts-ignored": Floor(sts="enforce", names=False, mta_sts="ignore"),
    "pinned": Floor(pin="in"),
    "pinned-out": Floor(pin="out"),
    "dane-ee-and-sts": Floor("ee", sts="enforce"),
    "dane-other-and-sts": Floor("other", sts="enforce"),
    "dane-unusable-and-sts": Floor("unusable", sts="enforce"),
    "dane-failed-and-sts": Floor("failed", sts="enforce"),
    "dane-ee-and-sts-not-named": Floor("ee", sts="enforce", names=False),
    "dane-other-and-sts-testing": Floor("other", sts="testing"),
    "dane-other-testing-and-sts": Floor("other", dane="testing", sts="enforce"),
    "dane-ee-and-pinned-out": Floor("ee", pin="out"),
}


@dataclass(frozen=True)
class Case:
    settings: Settings
    floor_name: str
    host_name: str

    @property
    def id(self) -> str:
        require, skip = self.settings
        return f"{self.floor_name}-{self.host_name}-{_word(require)}-{_word(skip)}"

    @property
    def floor(self) -> Floor:
        return FLOORS[self.floor_name]

    @property
    def host(self) -> Host:
        return HOSTS[self.host_name]

    @property
    def domain(self) -> str:
        return f"{self.id}.{'signed' if self.floor.is_signed else 'plain'}.test"

    @property
    def recipient(self) -> str:
        return f"bob@{self.domain}"

    @property
    def fields(self) -> dict[str, str]:
        require, skip = self.settings
        return {"X-Require-TLS": _word(require), "X-Skip-Verification": _word(skip)}

    @property
    def rule(self) -> dict[str, Any]:
        """What the configuration says of the destination."""
        floor, rule = self.floor, {}
        if floor.dane != "enforce":
            rule["dane"] = floor.dane
        if floor.mta_sts != "enforce":
            rule["mta_sts"] = floor.mta_sts
        pins = {"in": [f"mx.{self.domain}", "*.else.test"], "out": ["*.else.test"]}
        return rule | ({"mx": pins[floor.pin]} if floor.pin else {})


def _word(value: bool) -> str:
    return "yes" if value else "no"


NOT_CONNECTED_TO = frozenset(
    {
        "dane-failed",
        "sts-not-named",
        "pinned-out",
        "dane-failed-and-sts",
        "dane-ee-and-sts-not-named",
        "dane-ee-and-pinned-out",
    }
)
"""Floors under which all hosts are alike, so that two kinds are enough."""

CASES = [
    Case(settings, floor, host)
    for floor in FLOORS
    for host in HOSTS
    for settings in ALL_SETTINGS
    if floor not in NOT_CONNECTED_TO or host in ("valid", "no-starttls")
]

EXPLAINED = [case for case in CASES if case.host_name == "valid"]
"""It knows nothing of what a host shows, so that one kind of host is enough."""

PROBED = [
    case
    for case in CASES
    if case.floor_name in ("dane-ta", "dane-unusable", "sts", "sts-testing")
    or (case.floor_name in NOT_CONNECTED_TO and case.host_name == "valid")
]


# --- the rule -------------------------------------------------------------------------------------


class What(StrEnum):
    """What becomes of a message."""

    VERIFIED = "delivered in TLS, verified"
    ENCRYPTED = "delivered in TLS, unverified"
    CLEAR_SAME = "delivered in clear, on the same connection"
    CLEAR_ANEW = "delivered in clear, on a new connection to the same host"
    UNMET = "deferred"
    NOT_USED = "deferred, the host not connected to"


IN_TLS = (What.VERIFIED, What.ENCRYPTED)
IN_CLEAR = (What.CLEAR_SAME, What.CLEAR_ANEW)
DELIVERED = (*IN_TLS, *IN_CLEAR)


@dataclass(frozen=True)
class Expected:
    """What has to come of a case, and what the log has to say of it."""

    what: What
    status: str = ""
    verified_by: str | None = None
    policy_type: str = "no-policy-found"
    mode: str | None = None
    result: str | None = None
    must_prove: str = "nothing"


Words = dict[str, Any]
"""Fields of `Expected`."""


def expected(case: Case) -> Expected:
    """The rule, put together as its description is."""
    floor = case.floor
    words: Words = dict(zip(("policy_type", "mode", "result"), _policy(case), strict=True))
    if _is_not_used(floor):
        return Expected(What.NOT_USED, "4.7.5", must_prove="not-used", **words)
    asks = _asked(floor)
    if asks == "nothing":
        return _row(case, words)
    if asks == "encrypted":
        return _encrypted(case, words)
    if not _fault_of_tls(case.host):
        met = _matches(case) if asks == "dane" else not case.host.fault
        if not met:
            return Expected(What.UNMET, "4.7.5", must_prove=asks, **words)
        by = f"dane-{floor.tlsa}" if asks == "dane" else "pkix"
        return Expected(What.VERIFIED, verified_by=by, must_prove=asks, **words)
    return Expected(What.UNMET, _fault_of_tls(case.host), must_prove=asks, **words)


def _is_not_used(floor: Floor) -> bool:
    """Whether the host is not even connected to."""
    holds_dane, holds_sts = floor.dane == "enforce", _holds_sts(floor)
    return (
        floor.pin == "out"
        or (holds_sts and not floor.names)
        or (holds_dane and floor.tlsa == "failed")
    )


def _holds_sts(floor: Floor) -> bool:
    return floor.sts == "enforce" and floor.mta_sts == "enforce"


def _asked(floor: Floor) -> str:
    """What the floor asks for: usable records decide alone; else MTA-STS; else TLS."""
    dane = floor.tlsa if floor.dane == "enforce" else ""
    if dane in ("ee", "ta", "other"):
        return "dane"
    if _holds_sts(floor):
        return "pkix"
    return "encrypted" if dane == "unusable" else "nothing"


def _fault_of_tls(host: Host) -> str:
    """The status of a host without TLS worth its name."""
    return {
        Met.NOT_OFFERED: "4.7.4",
        Met.REFUSED: "4.7.4",
        Met.FAILED: "4.7.5",
        Met.OLD: "4.7.5",
    }.get(host.met, "")


def _matches(case: Case) -> bool:
    """Whether the certificate meets the TLSA records."""
    return case.floor.tlsa == "ee" or (case.floor.tlsa == "ta" and not case.host.fault)


def _encrypted(case: Case, words: Words) -> Expected:
    """TLS whatever the certificate, but for who requires a verified one."""
    require, skip = case.settings
    must_prove = "pkix" if require and not skip else "encrypted"
    if status := _fault_of_tls(case.host):
        return Expected(What.UNMET, status, must_prove=must_prove, **words)
    if skip:
        return Expected(What.ENCRYPTED, must_prove=must_prove, **words)
    if not case.host.fault:
        return Expected(What.VERIFIED, verified_by="pkix", must_prove=must_prove, **words)
    if require:
        return Expected(What.UNMET, "4.7.5", must_prove=must_prove, **words)
    return Expected(What.ENCRYPTED, must_prove=must_prove, **words)


def _row(case: Case, words: Words) -> Expected:
    """What the two settings alone come to."""
    require, skip = case.settings
    must_prove = {(True, False): "pkix", (True, True): "encrypted"}.get(case.settings, "nothing")
    words = words | {"must_prove": must_prove}
    met = case.host.met
    if met is Met.OLD:  # old TLS beats none, where neither TLS nor a certificate is asked for
        met = Met.HANDSHAKE if case.settings == (False, True) else Met.FAILED
    if met is Met.HANDSHAKE:
        if skip:
            return Expected(What.ENCRYPTED, **words)
        if not case.host.fault:
            return Expected(What.VERIFIED, verified_by="pkix", **words)
        return (
            Expected(What.UNMET, "4.7.5", **words)
            if require
            else Expected(What.CLEAR_ANEW, **words)
        )
    if require:
        return Expected(What.UNMET, "4.7.5" if met is Met.FAILED else "4.7.4", **words)
    return Expected(What.CLEAR_ANEW if met is Met.FAILED else What.CLEAR_SAME, **words)


def _policy(case: Case) -> tuple[str, str | None, str | None]:
    """policy-type, policy-mode and policy-result: what judged the host, and held against it."""
    floor = case.floor
    if floor.pin == "out":
        return "no-policy-found", None, None
    sts = floor.sts if floor.mta_sts == "enforce" else {"testing": "testing"}.get(floor.mta_sts, "")
    if sts == "enforce" and not floor.names:
        return "sts", "enforce", "validation-failure"
    decides = floor.tlsa in ("ee", "ta", "other", "failed") and floor.dane == "enforce"
    if floor.tlsa and floor.dane != "ignore" and (decides or sts != "enforce"):
        mode = "enforce" if floor.dane == "enforce" else "testing"
        if floor.tlsa == "failed":
            return "tlsa", mode, "dnssec-invalid"
        return "tlsa", mode, _held_by_dane(case)
    if not floor.sts or floor.mta_sts == "ignore":
        return "no-policy-found", None, None
    if floor.sts == "none":
        return "no-policy-found", "none", None
    return "sts", sts, _held(case, case.host.fault) if floor.names else "validation-failure"


def _held_by_dane(case: Case) -> str | None:
    if case.floor.tlsa == "unusable":
        return _held(case, "tlsa-invalid")
    return _held(case, "" if _matches(case) else "validation-failure")


def _held(case: Case, fault: str) -> str | None:
    """RFC 8460 §4.3."""
    if case.host.met in (Met.NOT_OFFERED, Met.REFUSED):
        return "starttls-not-supported"
    if case.host.met in (Met.FAILED, Met.OLD):
        return "validation-failure"
    return fault or None


# --- the play -------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came of a case."""

    token: str
    mx: MxServer
    connections: list[RecordedConnection]
    events: list[Event]
    explained: dict[str, Any]
    """What `relay explain` had said before, where it was asked (`EXPLAINED`)."""
    probed: dict[str, Any]
    """What `relay probe` says of a domain with such a host, where it was asked (`PROBED`)."""

    @property
    def event(self) -> Event:
        assert len(self.events) == 1, [shown(event) for event in self.events]
        return self.events[0]

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.event["delivery-status"]
        return status


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Result]]:
    """The whole table, played once."""
    with (
        tempfile.TemporaryDirectory(prefix="floors-table-") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        yield asyncio.run(_play(Path(directory), patch))


async def _play(directory: Path, patch: pytest.MonkeyPatch) -> dict[str, Result]:
    async with open_world(directory) as world:
        patch.setattr(https, "HTTPS_PORT", world.port)  # for the commands
        world.sandbox.dns.sign("signed.test")
        hosts = {case.id: await _publish(world, case) for case in CASES}
        await world.start(
            policy={"destinations": {case.domain: case.rule for case in CASES if case.rule}},
            delivery={"timeouts": {"tls_handshake": "10s", "command": "10s"}},
            resolver={"trust_ad": "auto"},
            queue={"retry": ["1h"]},
            limits={"connections_per_client": 1000},
        )
        relay = world.sandbox.relay
        assert relay is not None
        explained = await asyncio.to_thread(_explain_all, relay)
        assert not any(mx.connections for mx in hosts.values())
        tokens = await _submit_all(world)
        attempts = await world.sandbox.all_attempted(
            {case.recipient for case in CASES}, seconds=150
        )
        await asyncio.sleep(1.0)  # for a second copy, or a connection too many, to show itself
        connections = {case.id: list(hosts[case.id].connections) for case in CASES}
        probed = await asyncio.to_thread(_probe_all, relay)
        return {
            case.id: Result(
                tokens[case.id],
                hosts[case.id],
                connections[case.id],
                attempts[case.recipient],
                explained.get(case.id, {}),
                probed.get((case.floor_name, case.host_name), {}),
            )
            for case in CASES
        }


async def _publish(world: World, case: Case) -> MxServer:
    """The domain, its host, and what is said of both."""
    mx = await world.sandbox.domain(case.domain, case.host.script)
    dns, port, floor = world.sandbox.dns, world.sandbox.delivery_port, case.floor
    if floor.tlsa == "failed":
        dns.fail(f"_{port}._tcp.{mx.name}", "TLSA", Fault.SERVFAIL)
    elif floor.tlsa:
        dns.tlsa(mx.name, _record(mx, case), port=port)
    if floor.sts:
        name = mx.name if floor.names else "mx.else.test"
        await world.publish(case.domain, policy(name, mode=floor.sts))
    return mx


def _record(mx: MxServer, case: Case) -> str:
    leaf = _der(
        mx.authority.leaf(mx.name, case.host.script.certificate, address=mx.address).chain_pem
    )
    match case.floor.tlsa:
        case "ee":
            return f"3 1 1 {associated(leaf, 1, 1).hex()}"
        case "ta":
            return f"2 0 0 {_der(mx.authority.ca_pem).hex()}"
        case "unusable":
            return f"1 1 1 {associated(leaf, 1, 1).hex()}"
        case _:
            return f"3 1 1 {associated(_der(Authority('Other').ca_pem), 1, 1).hex()}"


def _der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def _explain_all(relay: Relay) -> dict[str, dict[str, Any]]:
    with _leaving_open_what_a_process_closes():
        return {case.id: _explain(relay, case) for case in EXPLAINED}


def _probe_all(relay: Relay) -> dict[tuple[str, str], dict[str, Any]]:
    with _leaving_open_what_a_process_closes():
        return {
            (case.floor_name, case.host_name): asked(
                relay, "probe", case.domain, "--timeout", "10s", may_fail=True
            )
            for case in PROBED
            if case.settings == (False, False)
        }


@contextlib.contextmanager
def _leaving_open_what_a_process_closes() -> Iterator[None]:
    """A command that has its answer does not wait until its peers have closed their connections;
    the end of its process closes them, which here is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def _explain(relay: Relay, case: Case) -> dict[str, Any]:
    require, skip = case.settings
    words = ["--from", "alice@from.test", "--to", case.recipient]
    words += ["--require-tls", _word(require), "--skip-verification", _word(skip)]
    return asked(relay, "explain", *words, may_fail=True)


async def _submit_all(world: World) -> dict[str, str]:
    async with world.sandbox.client() as client:
        return {
            case.id: await world.sandbox.submit(
                "alice@from.test", case.recipient, fields=case.fields, client=client
            )
            for case in CASES
        }


def each_case(*whats: What) -> pytest.MarkDecorator:
    """The cases that have to come to one of these."""
    cases = [case for case in CASES if not whats or expected(case).what in whats]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture
def result(case: Case, results: dict[str, Result]) -> Result:
    return results[case.id]


# --- what the host saw ----------------------------------------------------------------------------


@each_case(*IN_TLS)
def test_one_copy_arrives_in_tls_and_no_part_of_it_in_clear(case: Case, result: Result) -> None:
    (message,) = result.mx.messages
    assert message.in_tls
    # A session whose certificate did not verify cannot be kept: there is a second one.
    looked_in_vain = case.settings == (False, False) and expected(case).what is What.ENCRYPTED
    assert len(result.connections) == (2 if looked_in_vain else 1)
    for connection in result.connections:
        assert connection.clear_verbs == ["EHLO", "STARTTLS"]


@each_case(*IN_CLEAR)
def test_one_copy_arrives_in_clear_where_nothing_forbids_it(case: Case, result: Result) -> None:
    (message,) = result.mx.messages
    assert not message.in_tls
    anew = expected(case).what is What.CLEAR_ANEW
    assert len(result.connections) == (2 if anew else 1)


@each_case(What.UNMET)
def test_host_that_does_not_prove_enough_gets_no_part_of_the_message(
    case: Case, result: Result
) -> None:
    assert result.mx.messages == []
    (connection,) = result.connections
    assert set(connection.verbs) <= {"EHLO", "STARTTLS", "QUIT"}
    said = connection.clear + connection.in_handshake + connection.in_tls
    for word in (b"MAIL", b"RCPT", b"alice", b"bob", result.token.encode()):
        assert word not in said


@each_case(What.NOT_USED)
def test_a_host_that_may_not_be_used_is_not_connected_to(case: Case, result: Result) -> None:
    assert result.connections == []


# --- the line in the log --------------------------------------------------------------------------


@each_case()
def test_the_log_says_what_the_recipients_domain_asked_for_and_what_came_of_it(
    case: Case, result: Result
) -> None:
    want, status = expected(case), result.status
    said = (status["policy-type"], status["policy-mode"], status["policy-result"])
    assert said == (want.policy_type, want.mode, want.result)
    assert status["mx-secure"] is case.floor.is_signed
    ignored = "ignore" in (case.floor.dane, case.floor.mta_sts)
    assert status["waived"] == ("destination" if ignored else None)


@each_case(*DELIVERED)
def test_the_log_says_delivered_and_by_what_the_host_was_verified(
    case: Case, result: Result
) -> None:
    want, status = expected(case), result.status
    assert result.event["event"] == "delivered"
    assert status["verified-by"] == want.verified_by
    assert status["certificate-verified"] is (want.verified_by is not None)
    assert status["tls"] is (want.what in IN_TLS)
    assert (status["downgrade"] is not None) is (want.what in IN_CLEAR)


@each_case(What.UNMET, What.NOT_USED)
def test_the_log_says_deferred_and_what_was_not_met_at_which_host(
    case: Case, result: Result
) -> None:
    want, status = expected(case), result.status
    assert (result.event["event"], result.event["severity"]) == ("failed", "temporary")
    assert status["enhanced-code"] == want.status
    assert status["code"] == (
        454 if case.host.met is Met.REFUSED and want.what is What.UNMET else 0
    )
    for name in ("certificate-verified", "verified-by", "downgrade"):
        assert not status.get(name)
    assert result.mx.name in status["description"] + status["message"]


# --- what was foretold ----------------------------------------------------------------------------


explained = pytest.mark.parametrize("case", EXPLAINED, ids=lambda case: case.id)
probed = pytest.mark.parametrize("case", PROBED, ids=lambda case: case.id)


@explained
def test_explain_predicted_what_the_host_must_prove(case: Case, result: Result) -> None:
    (host,) = result.explained["hosts"]
    assert host["host"] == result.mx.name
    assert host["must-prove"] == expected(case).must_prove


@each_case(*DELIVERED, What.UNMET)
def test_explain_predicted_the_outcome_of_the_message(
    case: Case, result: Result, results: dict[str, Result]
) -> None:
    like = Case(case.settings, case.floor_name, "valid")
    (host,) = results[like.id].explained["hosts"]
    (step,) = [step for step in host["steps"] if step["situation"] == _situation(case)]
    want = expected(case)
    assert step["unmet"] == want.status
    if want.what in DELIVERED:
        assert step["tls"] is (want.what in IN_TLS)
        assert step["certificate-verified"] is (want.verified_by is not None)
        reason = (result.status["downgrade"] or {}).get("reason")
        assert step["downgrade"] == reason


def _situation(case: Case) -> str:
    """What was met at the host, in the words of `relay explain`."""
    met = {
        Met.NOT_OFFERED: "not-offered",
        Met.REFUSED: "refused",
        Met.FAILED: "handshake-failed",
    }.get(case.host.met)
    if met is not None:
        return met
    what = expected(case).what
    if what is What.VERIFIED:
        return "secured"
    if case.host.met is Met.OLD:
        return "secured" if what is What.ENCRYPTED else "handshake-failed"
    looked = not case.settings[1] or _asked(case.floor) in ("dane", "pkix")
    return "unverified" if looked else "secured"


@explained
def test_explain_predicted_the_policy_of_the_domain(case: Case, result: Result) -> None:
    floor, told = case.floor, result.explained["mta-sts"]
    if not floor.sts or floor.mta_sts == "ignore":
        assert told is None
        return
    name = result.mx.name if floor.names else "mx.else.test"
    assert (told["id"], told["mx"], told["error"]) == ("1", [name], None)
    assert told["source"] in ("fetched", "cache")


@explained
def test_explain_predicted_the_records_pins_and_names_of_the_host(
    case: Case, result: Result
) -> None:
    (host,) = result.explained["hosts"]
    floor = case.floor
    if floor.pin != "out":  # what is pinned out need not be asked for
        states = {"": "none", "unusable": "unusable", "failed": "failed"}
        state = states.get(floor.tlsa, "usable") if floor.is_signed else "insecure"
        assert host["dane"]["state"] == ("ignored" if floor.dane == "ignore" else state)
    if host["dane"]["state"] in ("usable", "unusable"):
        assert host["dane"]["records"]
    is_looked_at = floor.sts in ("enforce", "testing") and floor.mta_sts != "ignore"
    assert host["sts-match"] is (floor.names if is_looked_at else None)
    assert host["pinned"] is ({"in": True, "out": False}.get(floor.pin))


@probed
def test_probe_tells_of_each_setting_whether_the_message_would_be_sent(
    case: Case, result: Result
) -> None:
    (host,) = result.probed["hosts"]
    (rule,) = [
        rule
        for rule in host["rules"]
        if (rule["require-tls"], rule["skip-verification"]) == case.settings
    ]
    want = expected(case)
    assert rule["would-send"] is (want.what in DELIVERED)
    if want.what in DELIVERED:
        assert rule["tls"] is (want.what in IN_TLS)
        assert rule["certificate-verified"] is (want.verified_by is not None)
    assert rule["unmet"] == want.status


def test_list_of_floors_without_a_connection_is_complete() -> None:
    for case in CASES:
        is_named = case.floor_name in NOT_CONNECTED_TO
        assert (expected(case).what is What.NOT_USED) is is_named
