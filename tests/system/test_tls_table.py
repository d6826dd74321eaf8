"""The table of TLS, through the real relay: four settings against every kind of mail host.

The rules stand here as data, written from their description and not from the code. Each
case has a domain and a mail host of its own; one relay serves all of them at once. Then each
case is judged by what its host saw and by what the delivery log says:

    what was said in clear, how many copies arrived, over what, and the line about it

Beforehand `relay explain` was asked about each case, and `relay probe` about each kind of host:
what they had foretold is held against what happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from ssl import TLSVersion
from typing import Any

import pytest

from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.recording import RecordedConnection
from relay.sandbox.script import TLS_1_0_ONLY, Script, StartTls
from tests.rigs.relay import Relay, asked
from tests.rigs.sandbox import Event, Sandbox, open_sandbox, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Column(StrEnum):
    """What a host's TLS comes to, for a relay that would verify it."""

    FINE = "STARTTLS offered, handshake fine, certificate verified"
    UNVERIFIED = "certificate not verified"
    NOT_OFFERED = "starttls-not-offered"
    REFUSED = "starttls-refused"
    HANDSHAKE = "handshake-failed"


class What(Enum):
    """What becomes of the message."""

    VERIFIED = "delivered in TLS, verified"
    ENCRYPTED = "delivered in TLS, unverified"
    CLEAR_SAME = "delivered in clear, on the same connection"
    CLEAR_ANEW = "delivered in clear, on a new connection to the same host"
    UNMET_474 = "deferred 4.7.4"
    UNMET_475 = "deferred 4.7.5"


V, E, SAME, ANEW, U4, U5 = What

# (require_tls, skip_verification): one cell a column
TABLE: dict[tuple[bool, bool], dict[Column, What]] = {
    (require, skip): dict(zip(Column, cells, strict=True))
    for (require, skip), cells in {
        #                fine  unverified  not offered  refused  handshake fails
        (False, False): (V, ANEW, SAME, SAME, ANEW),
        (False, True): (E, E, SAME, SAME, ANEW),
        (True, False): (V, U5, U4, U4, U5),
        (True, True): (E, E, U4, U4, U5),
    }.items()
}

# Where a host's column is another one for some settings: old TLS beats none where nobody looks.
OLD_TLS = {(False, True): Column.FINE}


@dataclass(frozen=True)
class HostKind:
    """A kind of mail host: the column it belongs in, and the reply that decides where one does."""

    column: Column
    script: Script
    reply: int = 0
    elsewhere: dict[tuple[bool, bool], Column] = dataclasses.field(default_factory=dict)

    def column_for(self, settings: tuple[bool, bool]) -> Column:
        return self.elsewhere.get(settings, self.column)

    def what(self, settings: tuple[bool, bool]) -> What:
        return TABLE[settings][self.column_for(settings)]


def _certificate(kind: Kind) -> HostKind:
    return HostKind(Column.UNVERIFIED, Script(certificate=kind))


def _starttls(column: Column, mode: StartTls, reply: int = 0) -> HostKind:
    return HostKind(column, Script(starttls=mode), reply)


HOSTS: dict[str, HostKind] = {
    "good": HostKind(Column.FINE, Script()),
    "wildcard": HostKind(Column.FINE, Script(certificate=Kind.WILDCARD)),
    "tls-1-2-only": HostKind(Column.FINE, Script(maximum_tls=TLSVersion.TLSv1_2)),
    "injects": HostKind(
        Column.FINE, Script(inject=b"250-mx.evil.test\r\n250 8BITMIME\r\n250 2.1.0 injected\r\n")
    ),
    "fewer-offers-in-tls": HostKind(Column.FINE, Script(offers_in_tls=("8BITMIME",))),
    "wrong-name": _certificate(Kind.WRONG_NAME),
    "expired": _certificate(Kind.EXPIRED),
    "not-yet-valid": _certificate(Kind.NOT_YET_VALID),
    "self-signed": _certificate(Kind.SELF_SIGNED),
    "unknown-ca": _certificate(Kind.UNKNOWN_CA),
    "missing-intermediate": _certificate(Kind.MISSING_INTERMEDIATE),
    "cn-only": _certificate(Kind.CN_ONLY),
    "wildcard-two-labels": _certificate(Kind.WILDCARD_TWO_LABELS),
    "ip-san": _certificate(Kind.IP_SAN),
    "short-key": _certificate(Kind.SHORT_KEY),
    "no-starttls": _starttls(Column.NOT_OFFERED, StartTls.ABSENT),
    "helo-only": HostKind(Column.NOT_OFFERED, Script(no_ehlo=True)),
    "starttls-454": _starttls(Column.REFUSED, StartTls.REFUSED_454, 454),
    "starttls-502": _starttls(Column.REFUSED, StartTls.REFUSED_502, 502),
    "starttls-354": _starttls(Column.REFUSED, StartTls.REPLY_354, 354),
    "closes-at-starttls": _starttls(Column.HANDSHAKE, StartTls.CLOSE),
    "silent-at-starttls": _starttls(Column.HANDSHAKE, StartTls.SILENCE),
    "garbage": _starttls(Column.HANDSHAKE, StartTls.GARBAGE),
    "hangs": _starttls(Column.HANDSHAKE, StartTls.HANG),
    "resets": _starttls(Column.HANDSHAKE, StartTls.RESET),
    "closes-in-handshake": _starttls(Column.HANDSHAKE, StartTls.CLOSE_IN_HANDSHAKE),
    "tls-1-0-only": HostKind(Column.HANDSHAKE, TLS_1_0_ONLY, elsewhere=OLD_TLS),
}


class Way(StrEnum):
    """By whom the settings are spoken, as the log names it."""

    DOMAIN = "domain"
    MESSAGE = "message"
    DESTINATION = "destination"


@dataclass(frozen=True)
class Case:
    settings: tuple[bool, bool]
    host: str
    way: Way

    @property
    def id(self) -> str:
        require, skip = self.settings
        return f"require-{_word(require)}-skip-{_word(skip)}-{self.host}-by-{self.way}"

    @property
    def domain(self) -> str:
        return f"{self.id}.tls.test"

    @property
    def recipient(self) -> str:
        return f"bob@{self.domain}"

    @property
    def sender(self) -> str:
        """By domain rule, the sender's domain decides; otherwise it says the opposite, and is
        overruled.
        """
        settings = self.settings if self.way is Way.DOMAIN else _opposite(self.settings)
        return f"alice@{_sender_domain(settings)}"

    @property
    def fields(self) -> dict[str, str]:
        if self.way is not Way.MESSAGE:
            return {}
        require, skip = self.settings
        return {"X-Require-TLS": _word(require), "X-Skip-Verification": _word(skip)}

    @property
    def options(self) -> tuple[str, ...]:
        """What `relay explain` is told of the message."""
        if self.way is not Way.MESSAGE:
            return ()
        require, skip = self.settings
        return "--require-tls", _word(require), "--skip-verification", _word(skip)

    @property
    def what(self) -> What:
        return HOSTS[self.host].what(self.settings)

    @property
    def column(self) -> Column:
        return HOSTS[self.host].column_for(self.settings)


CASES = [Case(settings, host, way) for way in Way for host in HOSTS for settings in TABLE]


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _opposite(settings: tuple[bool, bool]) -> tuple[bool, bool]:
    return not settings[0], not settings[1]


def _sender_domain(settings: tuple[bool, bool]) -> str:
    return f"require-{_word(settings[0])}-skip-{_word(settings[1])}.test"


def _rule(settings: tuple[bool, bool]) -> dict[str, bool]:
    return {"require_tls": settings[0], "skip_verification": settings[1]}


@dataclass
class Result:
    """What came of a case."""

    token: str
    mx: MxServer
    events: list[Event]
    explained: dict[str, Any]
    """What `relay explain` had said of the case."""
    probed: dict[str, Any]
    """What `relay probe` had said of another host of this kind."""
    looked_at: MxServer
    """That other host."""

    @property
    def connections(self) -> list[RecordedConnection]:
        return self.mx.connections


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Result]]:
    """The whole table, played once."""
    with tempfile.TemporaryDirectory(prefix="tls-table-") as directory:
        yield asyncio.run(_play(Path(directory)))


async def _play(directory: Path) -> dict[str, Result]:
    async with open_sandbox(directory, addresses="127.11") as sandbox:
        hosts = {
            case.id: await sandbox.domain(case.domain, HOSTS[case.host].script) for case in CASES
        }
        looked_at = {
            kind: await sandbox.domain(f"{kind}.probe.test", HOSTS[kind].script) for kind in HOSTS
        }
        relay = await sandbox.start(
            policy={
                "domains": {_sender_domain(settings): _rule(settings) for settings in TABLE},
                "destinations": {
                    c.domain: _rule(c.settings) for c in CASES if c.way is Way.DESTINATION
                },
            },
            delivery=_patience(tls_handshake="5s", command="6s"),
            queue={"retry": ["1h"]},
            limits={"connections_per_client": 1000},
        )
        explained = await asyncio.to_thread(_explain_all, relay)
        assert not any(mx.connections for mx in hosts.values())  # to explain is to ask the DNS only
        tokens = await _submit_all(sandbox)
        probed = await asyncio.to_thread(_probe_all, relay)
        attempts = await sandbox.all_attempted({case.recipient for case in CASES}, seconds=60)
        await asyncio.sleep(1.0)  # for a second copy, or a connection too many, to show itself
        return {
            case.id: Result(
                tokens[case.id],
                hosts[case.id],
                attempts[case.recipient],
                explained[case.id],
                probed[case.host],
                looked_at[case.host],
            )
            for case in CASES
        }


def _explain_all(relay: Relay) -> dict[str, dict[str, Any]]:
    return {
        case.id: asked(
            relay, "explain", "--from", case.sender, "--to", case.recipient, *case.options
        )
        for case in CASES
    }


def _probe_all(relay: Relay) -> dict[str, dict[str, Any]]:
    return {kind: asked(relay, "probe", f"{kind}.probe.test", "--timeout", "10s") for kind in HOSTS}


def _patience(**timeouts: str) -> dict[str, Any]:
    return {"timeouts": timeouts}


async def _submit_all(sandbox: Sandbox) -> dict[str, str]:
    tokens = {}
    async with sandbox.client() as client:
        for case in CASES:
            tokens[case.id] = await sandbox.submit(
                case.sender, case.recipient, fields=case.fields, client=client
            )
    return tokens


def each_case(*whats: What) -> pytest.MarkDecorator:
    """The cases that come to one of these."""
    cases = [case for case in CASES if not whats or case.what in whats]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture
def result(case: Case, results: dict[str, Result]) -> Result:
    return results[case.id]


def _only_event(result: Result) -> Event:
    assert len(result.events) == 1, [shown(event) for event in result.events]
    return result.events[0]


# --- what holds in every cell -------------------------------------------------------------------


@each_case()
def test_log_has_the_settings_and_their_sources(case: Case, result: Result) -> None:
    require, skip = case.settings
    policy = _only_event(result)["policy"]
    assert policy["require-tls"] is require
    assert policy["skip-verification"] is skip
    assert policy["require-tls-source"] == case.way
    assert policy["skip-verification-source"] == case.way


@each_case()
def test_the_name_of_the_host_is_sent_as_sni_whenever_tls_begins(
    case: Case, result: Result
) -> None:
    for connection in result.connections:
        assert connection.sni == result.mx.name or not connection.in_tls


@each_case()
def test_connection_whose_handshake_began_carries_no_clear_text(case: Case, result: Result) -> None:
    for connection in result.connections:
        began = connection.in_tls or connection.tls_error or connection.in_handshake
        if began:
            assert set(connection.clear_verbs) <= {"EHLO", "STARTTLS"}
            for word in (b"EHLO", b"MAIL", b"QUIT", result.token.encode()):
                assert word not in connection.in_handshake


@each_case(V, E, SAME, ANEW)
def test_exactly_one_copy_arrives_as_it_was_given_but_for_the_fields_of_policy(
    case: Case, result: Result
) -> None:
    (message,) = result.mx.messages
    assert message.reverse_path == case.sender
    assert message.forward_paths == (case.recipient,)
    assert message.content.endswith(
        f"Subject: {result.token}\r\n\r\nBody of {result.token}.\r\n\r\n".encode()
    )
    assert b"x-require-tls" not in message.content.lower()
    assert b"x-skip-verification" not in message.content.lower()


# --- what was foretold --------------------------------------------------------------------------

SITUATIONS = {
    Column.FINE: "secured",
    Column.UNVERIFIED: "unverified",
    Column.NOT_OFFERED: "not-offered",
    Column.REFUSED: "refused",
    Column.HANDSHAKE: "handshake-failed",
}


@each_case()
def test_explain_predicted_the_settings_and_their_sources(case: Case, result: Result) -> None:
    told, logged = result.explained["policy"], _only_event(result)["policy"]
    for setting in ("require-tls", "skip-verification"):
        assert told[setting]["value"] is logged[setting]
        assert told[setting]["source"] == logged[f"{setting}-source"]


@each_case()
def test_explain_predicted_the_hosts_that_were_tried(case: Case, result: Result) -> None:
    told = [(host["host"], host["address"], host["port"]) for host in result.explained["hosts"]]
    assert told == [(result.mx.name, result.mx.address, result.mx.port)]
    assert result.connections
    status = _only_event(result)["delivery-status"]
    assert [told[0][:2]] == [(status["mx-host"], status["mx-ip"])]


@each_case()
def test_explain_predicted_the_outcome_of_the_message(case: Case, result: Result) -> None:
    (host,) = result.explained["hosts"]
    (step,) = [step for step in host["steps"] if step["situation"] == SITUATIONS[case.column]]
    assert {name: step[name] for name in _happened(result)} == _happened(result)


@each_case()
def test_probe_predicted_the_outcome_of_the_message(case: Case, result: Result) -> None:
    (host,) = result.probed["hosts"]
    (rule,) = [
        rule
        for rule in host["rules"]
        if (rule["require-tls"], rule["skip-verification"]) == case.settings
    ]
    nobody_looks = case.column is Column.UNVERIFIED and case.settings[1]
    assert rule["situation"] == SITUATIONS[Column.FINE if nobody_looks else case.column]
    assert rule["would-send"] is bool(result.mx.messages)
    assert {name: rule[name] for name in _happened(result)} == _happened(result)


@each_case()
def test_probe_sent_only_ehlo_starttls_and_quit(case: Case, result: Result) -> None:
    assert result.looked_at.connections
    for connection in result.looked_at.connections:
        assert set(connection.verbs) <= {"EHLO", "HELO", "STARTTLS", "QUIT"}


def _happened(result: Result) -> dict[str, Any]:
    """What became of a message, by what its host saw and what the log says, as it had to be
    foretold.
    """
    event = _only_event(result)
    status = event["delivery-status"]
    if event["event"] == "failed":
        nothing = {"tls": None, "certificate-verified": None, "downgrade": None}
        unmet = status["enhanced-code"]
        return nothing | {"step": "next-host", "unmet": unmet, "if-last": unmet}
    (message,) = result.mx.messages
    in_clear = "send-in-clear" if len(result.connections) == 1 else "reconnect-in-clear"
    return {
        "step": "send-in-tls" if message.in_tls else in_clear,
        "tls": status["tls"],
        "certificate-verified": status["certificate-verified"],
        "downgrade": status["downgrade"] and status["downgrade"]["reason"],
        "unmet": "",
        "if-last": "",
    }


# --- each kind of cell --------------------------------------------------------------------------


@each_case(V, E)
def test_only_ehlo_and_starttls_are_sent_before_tls(case: Case, result: Result) -> None:
    (connection,) = result.connections
    assert connection.clear_verbs == ["EHLO", "STARTTLS"]
    (message,) = result.mx.messages
    assert message.in_tls
    assert connection.in_tls.startswith(b"EHLO ")  # only what is offered inside TLS counts


@each_case(V, E)
def test_log_says_that_a_message_went_in_tls_and_whether_it_was_verified(
    case: Case, result: Result
) -> None:
    verified = case.what is V
    event = _only_event(result)
    status = event["delivery-status"]
    assert event["event"] == "delivered"
    assert status["tls"] is True
    assert (
        status["certificate-verified"] is verified
    )  # false where nobody looked, even if it was good
    assert status["verified-by"] == ("pkix" if verified else None)
    assert status["tls-version"] == result.mx.messages[0].tls_version
    assert status["tls-cipher"]
    assert status["downgrade"] is None
    _assert_delivered_by(result, status)


@each_case(SAME)
def test_without_starttls_the_message_goes_in_clear_on_the_same_connection(
    case: Case, result: Result
) -> None:
    (connection,) = result.connections
    (message,) = result.mx.messages
    assert not message.in_tls
    assert message.connection is connection
    assert connection.in_tls == b""
    refused = HOSTS[case.host].column is Column.REFUSED
    assert ("STARTTLS" in connection.verbs) is refused


@each_case(ANEW)
def test_after_a_handshake_that_failed_the_message_goes_in_clear_on_a_new_connection(
    case: Case, result: Result
) -> None:
    first, second = result.connections
    (message,) = result.mx.messages
    assert message.connection is second
    assert not message.in_tls
    assert "STARTTLS" not in second.verbs
    assert set(first.verbs) <= {"EHLO", "STARTTLS", "QUIT"}
    assert result.token.encode() not in first.clear + first.in_handshake + first.in_tls


@each_case(SAME, ANEW)
def test_log_says_why_a_message_went_in_clear(case: Case, result: Result) -> None:
    column = HOSTS[case.host].column
    event = _only_event(result)
    status = event["delivery-status"]
    assert event["event"] == "delivered"
    assert status["tls"] is False
    assert status["certificate-verified"] is False
    assert status["verified-by"] is None
    assert status["downgrade"]["reason"] == (
        "certificate-unverified" if column is Column.UNVERIFIED else column.value
    )
    assert status["downgrade"]["from"] == ("encrypted" if case.settings[1] else "verified")
    _assert_delivered_by(result, status)


@each_case(U4, U5)
def test_message_whose_required_tls_is_missing_is_not_sent(case: Case, result: Result) -> None:
    assert result.mx.messages == []
    (connection,) = result.connections
    assert set(connection.verbs) <= {"EHLO", "HELO", "STARTTLS", "QUIT"}
    said = connection.clear + connection.in_handshake + connection.in_tls
    for word in (b"MAIL", b"RCPT", b"AUTH", b"alice", b"bob", result.token.encode()):
        assert word not in said.replace(case.domain.encode(), b"")


@each_case(U4, U5)
def test_log_says_deferred_and_the_reason_where_required_tls_is_missing(
    case: Case, result: Result
) -> None:
    event = _only_event(result)
    status = event["delivery-status"]
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert status["enhanced-code"] == ("4.7.4" if case.what is U4 else "4.7.5")
    assert status["code"] == HOSTS[case.host].reply
    assert status["mx-host"] == result.mx.name
    assert not status["certificate-verified"]
    assert not status["downgrade"]
    assert status["retry-seconds"] > 0
    assert result.mx.name in status["description"] + status["message"]


def test_every_cell_of_the_table_has_hosts_that_play_it() -> None:
    assert {(case.settings, HOSTS[case.host].column) for case in CASES} == {
        (settings, column) for settings in TABLE for column in Column
    }


def _assert_delivered_by(result: Result, status: dict[str, Any]) -> None:
    assert status["mx-host"] == result.mx.name
    assert status["mx-ip"] == result.mx.address
    assert status["code"] == 250
    assert status["enhanced-code"] == "2.0.0"
    assert status["attempt-no"] == 1
    assert 0 < status["session-seconds"] < 30
