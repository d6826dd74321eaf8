"""Makes a DSN as a message for the queue.

It has the null reverse-path (RFC 5321 §4.5.5), and its rules are never weaker than those of the
message that it reports. It commits together with the result. No report goes to the null
reverse-path; `relay.queue.settle` decides who gets which report.
"""

from __future__ import annotations

from datetime import datetime

from relay.mail.address import domain_of
from relay.mail.envelope import Body
from relay.mail.header import split_content
from relay.mail.section import HeaderSection
from relay.policy.rules import PolicyRules, resolve_dsn
from relay.queue.entry import QueuedMessage, QueuedRecipient
from relay.queue.queue_id import new_queue_id
from relay.queue.settle import Report
from relay.queue.store import NewMessage
from relay.queue.summary import summarise
from relay.report import deliverylog, dsn


def dsn_message(
    report: Report,
    *,
    header: bytes,
    original: bytes | None = None,
    rules: PolicyRules,
    hostname: str,
    now: datetime,
) -> NewMessage:
    """The DSN of a report, to the reverse-path of the message it is about.

    `header` is that message's header section, `original` all of its content where
    `relay.report.dsn.returns_content` asks for it.
    """
    about = report.entry.message
    if not about.reverse_path:
        raise ValueError("a DSN for the null reverse-path (RFC 5321 §4.5.5)")
    queue_id = new_queue_id(now)
    content = dsn.compose(
        report, header=header, hostname=hostname, queue_id=queue_id, now=now, content=original
    )
    own_header, _ = split_content(content)
    eight_bit = not content.isascii()
    domain = domain_of(about.reverse_path)
    message = QueuedMessage(
        queue_id=queue_id,
        reverse_path="",
        arrived=now,
        size_bytes=len(content),
        summary=summarise(HeaderSection(own_header)),
        body=Body.EIGHT_BIT_MIME if eight_bit else Body.SEVEN_BIT,
        eight_bit=eight_bit,
        # RFC 6531 §3.3: needed where an address or a header field is not ASCII.
        smtputf8=not about.reverse_path.isascii() or not own_header.isascii(),
        origin="dsn",
        requiretls=about.requiretls,
    )
    settings = resolve_dsn(rules, recipient_domain=domain, about=report.settings)
    recipient = QueuedRecipient(
        index=0, address=about.reverse_path, domain=domain, settings=settings
    )
    return NewMessage(
        message,
        (recipient,),
        content,
        events=(deliverylog.accepted(message, (recipient,), about=about.queue_id),),
    )
