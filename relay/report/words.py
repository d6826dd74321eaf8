"""Describes an event of the delivery log, in sentences and in words that can be counted. Pure.

    protection_of   how the message was sent: verified, encrypted, clear, or not-sent
    sentence_of     the same with the reason: `not sent: TLS required, certificate has expired`
    reason_of       the reason as one of a few words, for the statistics
    policy_text     the two settings, each with the rule it came from

An event is the JSON object that `relay.report.deliverylog.dictionary` composed. The command line,
the page and the report show the same words.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.mail.event import Protection
from relay.mail.jsontext import JsonFields
from relay.mail.outcome import Code, DowngradeReason, PolicyMode, PolicyType, Waived
from relay.policy.settings import Setting, TlsSettings

_GIVEN_UP = re.compile(r"given up after [^:]*: ")
_HOST = re.compile(r"\S+(?: \[[^]\s]*\])?: ")
_NAMED_HOST = re.compile(r"(\S+ \[[^]\s]*\]): ")
_PINNED_OUT = "is none of the hosts that the configuration allows"
"""The words of `relay.route.floor.not_named`."""
_NOT_VERIFIED = "certificate not verified: "

_DOWNGRADES = {
    DowngradeReason.NOT_OFFERED: "STARTTLS not offered",
    DowngradeReason.REFUSED: "STARTTLS refused",
    DowngradeReason.HANDSHAKE_FAILED: "TLS handshake failed",
    DowngradeReason.UNVERIFIED: "certificate not verified",
}


def shown_name(event: JsonFields) -> str:
    """The name that people see: accepted, delivered, deferred, failed or operator."""
    return "deferred" if event.get("severity") == "temporary" else str(event["event"])


def operator_text(event: JsonFields) -> str:
    """`alice: retry, 12 recipients (domain example.net)`."""
    wanted = ", ".join(f"{key} {value}" for key, value in event["filter"].items())
    text = f"{event['operator']}: {event['verb']}, {event['count']} recipients"
    return f"{text} ({wanted})" if wanted else text


def protection_of(event: JsonFields) -> Protection | None:
    """How the message was sent to the next hop; None for an event that is about no attempt."""
    status = event.get("delivery-status")
    if status is None:
        return None
    if event["event"] != "delivered" or status["tls"] is None:
        return Protection.NOT_SENT
    if not status["tls"]:
        return Protection.CLEAR
    return Protection.VERIFIED if status["certificate-verified"] else Protection.ENCRYPTED


def reason_of(event: JsonFields, protection: Protection | None) -> str:
    """Why the message was not delivered over verified TLS: one of a few words, none of a host's.
    `protection`: what `protection_of` says.
    """
    status = event["delivery-status"]
    match protection:
        case Protection.VERIFIED:
            return ""
        case Protection.ENCRYPTED:
            return "certificate-not-verified"
        case Protection.CLEAR:
            return str(status["downgrade"]["reason"]) if status.get("downgrade") else "no-tls"
    if event.get("reason") == "removed":
        return "removed"
    if lacks_tls(event):
        return "tls-required"
    match _deciding_code(status):
        case Code.NO_CONNECTION:
            return "no-connection"
        case Code.NO_USABLE_MX:
            return "no-usable-mx"
        case Code.NONE:
            return "other"
        case _:
            return "refused"


def sentence_of(event: JsonFields) -> str:
    """How the message was sent and the host's answer, or why it was not sent; "" for no attempt.

    A text of a peer in it is not escaped.
    """
    status = event.get("delivery-status")
    if status is None:
        return ""
    host = status.get("mx-host") or ""
    text = answer_text(
        status["code"], status["enhanced-code"], status["message"] or status["description"]
    )
    tls = _tls_text(event)
    if event["event"] == "delivered":
        return f"{tls}, {host}: {text}" if host else text
    if event.get("reason") == "removed":
        return str(status["description"])
    sentence = f"not sent: {tls}" if tls else f"not sent: {_without_host(text, host)}"
    named = host or (_host_named_in(status) if tls else "")
    details = ", ".join(one for one in (named, status["enhanced-code"] if tls else "") if one)
    return f"{sentence} ({details})" if details else sentence


def lacks_tls(event: JsonFields) -> bool:
    """Whether the host lacked the TLS that the message needs.

    4.7.5 with a reply code comes from the host, so it says nothing about the host's TLS.
    """
    status = event["delivery-status"]
    is_own = _deciding_code(status) == Code.NONE
    detail = status["enhanced-code"].partition(".")[2]
    if detail == "7.4" or (detail == "7.5" and is_own):
        return True
    return bool(is_own and event["policy"]["require-tls"] and status["tls"] is False)


def answer_text(code: int, status: str, message: str) -> str:
    """A host's answer on one line, `450 4.2.1 mailbox busy`. A code is not repeated."""
    words = [str(code or ""), "" if message.startswith(status) else status, message]
    return " ".join(filter(None, words))


@lru_cache(maxsize=1024)
def policy_text(settings: TlsSettings) -> str:
    """`require_tls: true (destination partner.example), skip_verification: false (default)`."""
    require, skip = settings.require_tls, settings.skip_verification
    return f"require_tls: {_setting_text(require)}, skip_verification: {_setting_text(skip)}"


def _setting_text(setting: Setting) -> str:
    rule = "" if setting.rule in ("", setting.source.value) else f" {setting.rule}"
    return f"{'true' if setting.value else 'false'} ({setting.source.value}{rule})"


def _deciding_code(status: JsonFields) -> int:
    return int(status.get("last-code", status["code"]))


def _tls_text(event: JsonFields) -> str:
    """The TLS with which the message was sent. If it was not sent: what TLS it lacked, or ""."""
    status = event["delivery-status"]
    match protection_of(event):
        case Protection.VERIFIED:
            return "TLS verified"
        case Protection.ENCRYPTED:
            return f"TLS unverified{_before(status)}"
        case Protection.CLEAR:
            clear = f"{_clear_text(status.get('downgrade'))}{_before(status)}"
            says_no = status.get("waived") == Waived.TLS_REQUIRED_NO
            return f"{clear}, waived: TLS-Required: No" if says_no else clear
    if not lacks_tls(event):
        return ""
    required, fault = _required_by(event), _tls_fault(status)
    return f"{required}, {fault}" if fault else required


def _required_by(event: JsonFields) -> str:
    """What required the TLS that the host lacked. The setting of the message comes first."""
    status, policy = event["delivery-status"], event["policy"]
    if policy["require-tls"]:
        return "TLS required"
    if policy.get("requiretls"):
        return "held by REQUIRETLS"
    if _PINNED_OUT in _tls_fault(status):
        return "held by a pin"
    if status.get("policy-mode") == PolicyMode.ENFORCE:
        name = _HELD_BY.get(status.get("policy-type"))
        if name is not None:
            return f"held by {name}"
    return "held by downgrade_memory" if status.get("memory") else "TLS required"


_HELD_BY = {PolicyType.STS: "MTA-STS", PolicyType.TLSA: "DANE"}


def _before(status: JsonFields) -> str:
    """What the host has shown before, if it showed less now."""
    memory = status.get("memory")
    return f", {memory['before']} before" if memory else ""


def _clear_text(downgrade: JsonFields | None) -> str:
    if downgrade is None:
        return "in clear"
    error = str(downgrade["error"]).removeprefix(_NOT_VERIFIED).rstrip(".")
    known = _DOWNGRADES.get(downgrade["reason"], downgrade["reason"])
    return f"in clear ({error or known})"


def _tls_fault(status: JsonFields) -> str:
    """What was wrong with TLS: the relay's sentence without the name of the host."""
    return _HOST.sub("", _own_text(status), count=1).removeprefix(_NOT_VERIFIED).rstrip(".")


def _host_named_in(status: JsonFields) -> str:
    """The host in the relay's sentence: without a connection to it there is no `mx-host`."""
    found = _NAMED_HOST.match(_own_text(status))
    return found[1] if found is not None else ""


def _own_text(status: JsonFields) -> str:
    return _GIVEN_UP.sub("", str(status["description"] or status["message"]), count=1)


def _without_host(text: str, host: str) -> str:
    """The text without the name of the host, which the sentence has anyhow."""
    return re.sub(rf"{re.escape(host)} \[[^]\s]*\][:,]? ?", "", text, count=1) if host else text
