"""The checks, in order: whether the relay accepts what a client sends.

Every function here is a decision about values. It returns a result, or a `Refusal`: a short
reply in the relay's own words for the client, and a reason for the relay's log. The connection
sends nothing else.

    MAIL    530 5.7.0   TLS or AUTH has to come first
            501         no reverse-path, or an invalid one (relay.mail.address)
            501, 555    parameters (relay.receive.parameters)
            555 5.5.4   REQUIRETLS outside TLS (RFC 8689 §2)
            552 5.3.4   SIZE says it is too large
            553 5.7.1   a user may not use this reverse-path
    RCPT    554 5.7.1   the client may not relay; its address is not examined
            501, 553    no forward-path
            550 5.1.2   an address literal: no policy can name one, and attackers probe networks
                        with it
            452 4.5.3   more recipients than one transaction may have (RFC 5321 §4.5.3.1.10)
    data    552 5.3.4   too large, header section or all of it
            550 5.5.2   bare CR or LF
            550 5.6.0   NUL
            554         its header section (relay.submit.message)

Trouble of the relay itself is never a 5yz.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from relay.mail.address import AddressError, domain_of, parse_path
from relay.mail.envelope import Recipient
from relay.mail.reply import Reply
from relay.mail.section import HeaderSection
from relay.policy.rules import PolicyRules
from relay.queue.entry import QueuedMessage, QueuedRecipient, Terms
from relay.queue.store import CHUNK_BYTES
from relay.receive.access import may_send_as
from relay.receive.content import Flaw
from relay.receive.limits import Limits
from relay.receive.parameters import (
    ParameterError,
    mail_parameters,
    rcpt_parameters,
    wants_smtputf8,
)
from relay.receive.session import Session, Transaction
from relay.receive.trace import received_field
from relay.submit.message import JudgedHeader, Refusal, judge_header, queued_recipients, refuse
from relay.submit.trace import Arrival, missing_fields

_TLS_FIRST = refuse(530, "5.7.0", "STARTTLS comes first here")
_AUTH_FIRST = refuse(530, "5.7.0", "Authentication required")
_NO_RELAYING = refuse(554, "5.7.1", "Relaying denied")
_NOT_YOURS = refuse(553, "5.7.1", "You may not send in this domain's name")
_TOO_LARGE = refuse(552, "5.3.4", "The message is too large")
_MAIL_SYNTAX = refuse(501, "5.5.2", "Syntax: MAIL FROM:<address>")
_RCPT_SYNTAX = refuse(501, "5.5.2", "Syntax: RCPT TO:<address>")
_REQUIRETLS_IN_CLEAR = refuse(555, "5.5.4", "REQUIRETLS is for sessions in TLS")
_NO_LITERALS = refuse(550, "5.1.2", "Mail to address literals is not relayed")
_TOO_MANY_RECIPIENTS = refuse(452, "4.5.3", "Too many recipients in one transaction")

_FLAWS = {
    Flaw.TOO_LARGE: _TOO_LARGE,
    Flaw.BARE_NEWLINE: refuse(550, "5.5.2", "Lines end with CRLF: the message has a bare CR or LF"),
    Flaw.NUL: refuse(550, "5.6.0", "The message has a NUL character"),
}


def refusal_of(flaw: Flaw) -> Refusal:
    """The refusal of content with this flaw."""
    return _FLAWS[flaw]


# --- MAIL --------------------------------------------------------------------------------------


def mail(session: Session, arg: bytes, limits: Limits) -> Transaction | Refusal:
    """The transaction that a MAIL command begins, or why it is refused."""
    if session.must_start_tls:
        return _TLS_FIRST
    if session.must_authenticate:
        return _AUTH_FIRST
    if arg[:5].upper() != b"FROM:":
        return _MAIL_SYNTAX
    try:
        reverse_path, rest = parse_path(arg[5:], smtputf8=wants_smtputf8(arg), lenient=True)
        sender_domain = domain_of(reverse_path)
        transaction = mail_parameters(rest, reverse_path)
    except AddressError as error:
        return _bad_address(error, arg, of_sender=True)
    except ParameterError as error:
        return Refusal(error.reply, error.reply.text)
    if transaction.requiretls and session.tls is None:
        return _REQUIRETLS_IN_CLEAR
    if transaction.size_bytes > limits.message_size_bytes:
        return _TOO_LARGE
    if session.user is not None and not may_send_as(session.user, sender_domain):
        return _NOT_YOURS
    return transaction


# --- RCPT --------------------------------------------------------------------------------------


def rcpt(
    session: Session, transaction: Transaction, arg: bytes, limits: Limits, *, hostname: str
) -> Recipient | Refusal:
    """The recipient that a RCPT command names, or why it is refused."""
    if not session.may_relay:
        return _NO_RELAYING
    if arg[:3].upper() != b"TO:":
        return _RCPT_SYNTAX
    try:
        address, rest = parse_path(
            arg[3:], smtputf8=transaction.smtputf8, allow_postmaster=True, lenient=True
        )
        if not address:
            return _RCPT_SYNTAX
        if (
            address == "postmaster"
        ):  # RFC 5321 §4.1.1.3: the postmaster of this host, which has no mailboxes
            address = f"postmaster@{hostname}"
        domain = domain_of(address)
        recipient = rcpt_parameters(rest, address, domain, smtputf8=transaction.smtputf8)
    except AddressError as error:
        return _bad_address(error, arg, of_sender=False)
    except ParameterError as error:
        return Refusal(error.reply, error.reply.text)
    if domain.startswith("["):
        return _NO_LITERALS
    if len(transaction.recipients) >= limits.recipients and address not in transaction.recipients:
        return _TOO_MANY_RECIPIENTS
    return recipient


def _bad_address(error: AddressError, arg: bytes, *, of_sender: bool) -> Refusal:
    """5.1.7 for a sender, 5.1.3 for a recipient (RFC 3463 §3.2); a more exact status stays."""
    status = error.status
    if of_sender and status == "5.1.3":
        status = "5.1.7"
    text = str(error)
    reply = Reply(553, status, f"{text[:1].upper()}{text[1:]}")
    return Refusal(reply, f"{error}: {ascii(arg[:320])[1:]}")


# --- data --------------------------------------------------------------------------------------


def judge_message(
    session: Session,
    transaction: Transaction,
    section: HeaderSection,
    arrival: Arrival,
    *,
    displaced: bytes = b"",
    rules: PolicyRules,
    limits: Limits,
) -> JudgedHeader | Refusal:
    """Judge a header section, remove its policy fields, and add the relay's Received field."""
    recipients = transaction.recipients.values()
    on_top = received_field(
        session, arrival, smtputf8=transaction.smtputf8, only_for=_only(recipients)
    )
    if session.listener.add_missing_headers:
        on_top += missing_fields(section, arrival, reverse_path=transaction.reverse_path)
    return judge_header(
        section,
        arrival,
        reverse_path=transaction.reverse_path,
        domains={recipient.domain for recipient in recipients},
        rules=rules,
        received_hops=limits.received_hops,
        on_top=on_top,
        displaced=displaced,
        requiretls=transaction.requiretls,
    )


def _only(recipients: Iterable[Recipient]) -> str:
    addresses = [recipient.address for recipient in recipients]
    return addresses[0] if len(addresses) == 1 else ""


def complete(
    judged: JudgedHeader,
    session: Session,
    transaction: Transaction,
    *,
    size_bytes: int,
    eight_bit: bool,
    is_dotless: bool = False,
) -> tuple[QueuedMessage, tuple[QueuedRecipient, ...]]:
    """The message in the form that the queue holds."""
    message = QueuedMessage(
        queue_id=judged.queue_id,
        reverse_path=transaction.reverse_path,
        arrived=judged.arrived,
        size_bytes=size_bytes,
        summary=judged.summary,
        body=transaction.body,
        eight_bit=eight_bit,
        smtputf8=transaction.smtputf8,
        ret=transaction.ret,
        envid=transaction.envid,
        origin="smtp",
        client=_describe(session),
        client_tls=f"{session.tls.version}, {session.tls.cipher}" if session.tls else "",
        client_user=session.user.name if session.user else "",
        terms=_with_next_hop(judged.terms, session.next_hop),
        requiretls=transaction.requiretls,
        tls_required_no=judged.tls_required_no,
        # Small content is not sent from a file: what nobody asks for is not kept.
        is_dotless=is_dotless and size_bytes > CHUNK_BYTES,
    )
    return message, queued_recipients(judged, tuple(transaction.recipients.values()))


def _with_next_hop(terms: Terms | None, next_hop: str) -> Terms | None:
    """The terms of a message whose client is configured to use a next hop."""
    return replace(terms or Terms(), next_hop=next_hop) if next_hop else terms


def _describe(session: Session) -> str:
    """The client, for the log."""
    where = (
        "unknown"
        if session.client is None
        else f"[{session.client}]"
        if session.client
        else "local"
    )
    return f"{session.helo} {where}"
