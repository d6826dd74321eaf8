"""What a reply, or the lack of one, means for the recipients it concerns.

This module decides between "later" and "never", so that the rules can be read in one place
and tested as a table. (`relay.route.security` decides how secure a session has to be.)

    what happened                          another host left    last host
    no connection, timeout, lost, no reply next host            Deferred 4.4.1 or 4.4.2
    5yz to the greeting, EHLO or AUTH      next host            Deferred; 535 to AUTH: 4.7.8
    4yz to anything                        next host            Deferred
    5yz to MAIL, RCPT, DATA or content     Bounced              Bounced
    552 to RCPT, not about a size          as 452               as 452 (RFC 5321 §4.5.3.1.10)
    2yz to the final dot                   Delivered            Delivered (first digit, §4.3.2)
    silence or garbage after it            Deferred, in doubt   Deferred, in doubt (RFC 1047)
    5yz in clear that asks for TLS         next host            Deferred 4.7.5 (RFC 3207 §4)
    5yz of a next hop that asks for AUTH   next host            Deferred 4.7.8 (`demands_login`)
    a message the host cannot take         next host            Bounced 5.3.4 5.6.x, if no host can

A reply is judged by its first digit; its enhanced status is kept where its class
agrees with the code (RFC 2034 §4), and is X.0.0 where there is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from relay.mail.outcome import (
    Bounced,
    Code,
    Deferred,
    Delivered,
    HopPolicy,
    HopSession,
    Outcome,
    Routing,
)
from relay.mail.record import record
from relay.mail.reply import Reply, parse_reply
from relay.route.next_hop import Host


class Stage(StrEnum):
    """Where in the dialogue something happened, as a sentence names it."""

    CONNECT = "the connect"
    GREETING = "the greeting"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    HANDSHAKE = "the TLS handshake"
    AUTH = "AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    CONTENT = "the content"
    FINAL_DOT = "the final dot"


@record(frozen=True, slots=True)
class Answer:
    """A host's reply at a stage, or its absence, with the text of the error.

    `ours`: the relay broke off; the host is not at fault. `status`: of the outcome without a reply,
    "" for the one that the stage has.
    """

    stage: Stage
    reply: Reply | None = None
    error: str = ""
    ours: bool = False
    status: str = ""

    @property
    def is_positive(self) -> bool:
        """RFC 5321 §4.2.1: 2yz."""
        return self.reply is not None and 200 <= self.reply.code < 300


@dataclass(frozen=True, slots=True)
class CannotBeSent:
    """Why the host cannot take a recipient or message, so that it was not tried."""

    status: str
    text: str


_NOT_ABOUT_THE_MESSAGE = frozenset(
    {Stage.GREETING, Stage.EHLO, Stage.STARTTLS, Stage.HANDSHAKE, Stage.AUTH}
)
"""A refusal at one of these stages is about the relay or the host, and not about the message.

Another host may take the message, or the same host later.
"""

_TOO_MANY_RECIPIENTS = frozenset({"", ".0.0", ".5.0", ".5.3"})
"""Subject and detail of an enhanced status (RFC 3463 §3.6) that may mean too many recipients."""

_TOO_LARGE = frozenset({"5.2.3", "5.3.4"})
"""RFC 3463 §3.3, §3.4: the message is larger than the mailbox, or the host, ever takes."""

_RELAY_IS_NOT_KNOWN = frozenset({"5.7.57", "5.7.64"})
"""What Microsoft 365 says to a client that has not logged in, and to one whose certificate or
address no connector has.
"""

NO_REQUIRETLS = "4.7.30"
"""REQUIRETLS support required (RFC 8689 §4.2.1): the host lacks the keyword, and nothing else."""
NO_SECURE_WAY = "4.7.10"
"""Encryption needed (RFC 8689 §4.2.1): the host lacks more than the keyword."""

_MOST_TEXT = 2000
"""Characters of a peer's text that are kept with an outcome."""


def judge(
    answer: Answer,
    host: Host,
    session: HopSession | None = None,
    *,
    dsn_passed_on: bool = False,
    routing: Routing | None = None,
) -> Outcome:
    """The outcome for a recipient after an answer, if this host is the last one. `dsn_passed_on`,
    `routing`: what a delivery tells besides; a tally adds the routing to all others.
    """
    if answer.ours and not answer.status:
        return _broken_off(answer, host, session)
    if answer.reply is None or not _is_an_answer_to(answer.stage, answer.reply):
        return _unanswered(answer, host, session)
    reply, text = answer.reply, shown(answer.reply)
    if answer.is_positive:
        return Delivered(
            reply.status or "2.0.0",
            reply.code,
            text,
            session=session,
            routing=routing,
            dsn_passed_on=dsn_passed_on,
        )
    description = f"{_named(host)} answered {answer.stage} with {reply.code} {text}".rstrip()
    if is_temporary(answer, host):
        status = _temporary_status(answer, host, reply)
        return Deferred(status, reply.code, text, description, session)
    return Bounced(reply.status or "5.0.0", reply.code, text, description, session)


def is_temporary(answer: Answer, host: Host) -> bool:
    """Whether an answer that is not positive may be positive later."""
    if answer.reply is None or answer.reply.code < 500 or demands_login(answer, host):
        return True
    return answer.stage in _NOT_ABOUT_THE_MESSAGE or _is_as_452(answer.stage, answer.reply)


def worth_another_host(answer: Answer, host: Host) -> bool:
    """Whether the same attempt tries the next host for this recipient.

    It does not after the final dot without an answer: the host may have taken the message, and
    another host would take it a second time (RFC 5321 §4.5.4.2, RFC 1047).
    """
    in_doubt = answer.stage is Stage.FINAL_DOT and (
        answer.reply is None or not _is_an_answer_to(answer.stage, answer.reply)
    )
    taken = answer.stage is Stage.FINAL_DOT and answer.is_positive
    return is_temporary(answer, host) and not (taken or in_doubt or answer.ours)


def too_many_recipients(answer: Answer) -> bool:
    """Whether a host takes this recipient only in another transaction (RFC 5321 §4.5.3.1.10).

    A reply whose enhanced status names something else, such as a full mailbox (4.2.2), is about
    that.
    """
    if answer.stage is not Stage.RCPT or answer.reply is None:
        return False
    return answer.reply.code in (452, 552) and _meant(answer.reply)[1:] in _TOO_MANY_RECIPIENTS


_TLS_WORD = re.compile(r"\b(?:START)?TLS\b|\bSSL\b|\bencrypt", re.IGNORECASE)
_NEED_WORD = re.compile(
    r"\b(?:must|requir|need|mandatory|enforc|only|first|without|unencrypted|insecure|plain|clear)",
    re.IGNORECASE,
)
_AUTHENTICATION_WORD = re.compile(r"\bauth", re.IGNORECASE)
_ABOUT_AN_ADDRESS = ("5.1.", "5.2.")


def demands_tls(answer: Answer) -> bool:
    """Whether a refusal in clear says that TLS is needed (RFC 3207 §4: 530, RFC 3463: X.7.10).

    Then the mail was not refused: this host takes none in clear. A bare 530 counts, since an MX
    that asks for a password is none; one that speaks of AUTH and not of TLS does not.
    """
    reply = answer.reply
    if reply is None or reply.code < 500 or reply.status.startswith(_ABOUT_AN_ADDRESS):
        return False
    if reply.status == "5.7.10":
        return True
    speaks_of_tls = _TLS_WORD.search(reply.text) is not None
    if reply.code == 530:
        return speaks_of_tls or _AUTHENTICATION_WORD.search(reply.text) is None
    return speaks_of_tls and _NEED_WORD.search(reply.text) is not None


def demands_login(answer: Answer, host: Host) -> bool:
    """Whether a next hop of the operator's refuses a message since the relay has not logged in, or
    has shown no certificate that the host knows. Then the configuration is wrong, here or at the
    provider, and not the message (RFC 4954 §6: 530). An MX has nothing to log in to.
    """
    reply = answer.reply
    if host.hop is None or reply is None or reply.code < 500:
        return False
    if answer.stage in _NOT_ABOUT_THE_MESSAGE:
        return False
    if reply.code == 503:
        return _AUTHENTICATION_WORD.search(reply.text) is not None
    return reply.code == 530 or reply.status in _RELAY_IS_NOT_KNOWN


def unmet(
    status: str,
    text: str,
    host: Host,
    session: HopSession | None,
    reply: Reply | None = None,
    *,
    policy: HopPolicy | None = None,
) -> Deferred:
    """The rules of TLS could not be kept at a host. `status` is 4.7.4, 4.7.5 or one for REQUIRETLS;
    `policy`: of a host that was not connected to.
    """
    return Deferred(
        status,
        reply.code if reply else Code.NONE,
        shown(reply) if reply else "",
        f"{_named(host)}: {text}",
        session,
        policy=policy,
        tls_unmet=True,
    )


def for_good(deferred: Deferred, status: str = "") -> Bounced:
    """The same, where it is to be returned and not to wait (`on_tls_unmet: bounce`). `status`: in
    the place of its own.
    """
    return Bounced(
        "5" + (status or deferred.status)[1:],
        deferred.code,
        deferred.message,
        deferred.description,
        deferred.session,
        deferred.hosts,
        deferred.policy,
    )


def for_now(bounced: Bounced) -> Deferred:
    """The same, while a host that was not found may have better."""
    return Deferred(
        "4" + bounced.status[1:],
        bounced.code,
        bounced.message,
        bounced.description,
        bounced.session,
        bounced.hosts,
        bounced.policy,
    )


def another_may_take(what: CannotBeSent) -> bool:
    """Whether another host may take it. An unsafe address is sent to no host."""
    return not what.status.startswith(_ABOUT_AN_ADDRESS)


def cannot_take(what: CannotBeSent, host: Host, session: HopSession | None) -> Bounced:
    """The outcome of a message that a host cannot take according to its extensions."""
    return Bounced(what.status, Code.NONE, "", f"{_named(host)} {what.text}", session)


def shown(reply: Reply) -> str:
    """A reply's status and text, cut to the length that is kept."""
    text = f"{reply.status} {reply.text}" if reply.status else reply.text
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def host_line(host: Host, outcome: Outcome) -> str:
    """One line about a host that was tried, for the DSN."""
    said = outcome.description or f"{outcome.code} {outcome.message}".rstrip()
    return said if said.startswith(host.name) else f"{_named(host)}: {said}"


def _unanswered(answer: Answer, host: Host, session: HopSession | None) -> Deferred:
    """The outcome after a timeout, a lost connection, or an invalid answer.

    After the final dot the relay cannot know whether the host took the message. Another attempt may
    deliver it twice; no attempt may lose it (RFC 1047, RFC 5321 §6.1). The relay tries again.
    """
    error = answer.error or f"unexpected reply {answer.reply}"
    if answer.status:
        return Deferred(answer.status, Code.NONE, "", f"{_named(host)}: {error}", session)
    if answer.stage is Stage.CONNECT:
        return Deferred("4.4.1", Code.NO_CONNECTION, "", f"{_named(host)}: {error}", session)
    in_doubt = answer.stage is Stage.FINAL_DOT
    code = Code.NO_CONNECTION if answer.stage is Stage.GREETING else Code.NONE
    description = f"{_named(host)}, at {answer.stage}: {error}"
    if in_doubt:
        description += "; the message may have been taken, and may arrive twice"
    text = shown(answer.reply) if answer.reply else ""
    return Deferred("4.4.2", code, text, description, session, in_doubt=in_doubt)


def _broken_off(answer: Answer, host: Host, session: HopSession | None) -> Deferred:
    """The outcome after the relay's own failure in a session, before the final dot."""
    text = f"sending to {_named(host)} was broken off at {answer.stage} by us: {answer.error}"
    return Deferred("4.3.0", Code.NONE, "", text, session)


def _is_an_answer_to(stage: Stage, reply: Reply) -> bool:
    """Whether a reply is valid at a stage. Only a reply to the final dot accepts a message."""
    return reply.code >= 400 or (stage is Stage.FINAL_DOT and 200 <= reply.code < 300)


def _is_as_452(stage: Stage, reply: Reply) -> bool:
    """Whether a reply is 552 where 452 is meant. RFC 1870 §6.1 has 552 to RCPT for a message too
    large.
    """
    return stage is Stage.RCPT and reply.code == 552 and reply.status not in _TOO_LARGE


def _meant(reply: Reply) -> str:
    """The enhanced status of a reply; that of 552 may be of the 452 which is meant."""
    return reply.status or (parse_reply(452, reply.text).status if reply.code == 552 else "")


def _temporary_status(answer: Answer, host: Host, reply: Reply) -> str:
    stage = answer.stage
    if demands_login(answer, host):
        return "4.7.8"
    if _is_as_452(stage, reply):
        status = _meant(reply)[1:]
        return "4.5.3" if status in _TOO_MANY_RECIPIENTS else f"4{status}"
    if stage is Stage.AUTH and reply.code == 535:  # RFC 4954 §6; Microsoft adds details of its own
        return "4.7.8"
    return f"4{reply.status[1:]}" if reply.status else "4.0.0"


def _named(host: Host) -> str:
    return f"{host.name} [{host.address}]"
