"""Accepts messages: `POST /v3/{domain}/messages` and `messages.mime`.

A message is treated as over SMTP: `relay.submit.message` judges and rewrites its header section and
resolves its settings. The client gets 200 after `store.accept` has returned. Trouble of the relay
itself is a 503, never a refusal of the message.
"""

from __future__ import annotations

import logging
from functools import partial

from aiohttp import web

from relay.api.forms import read_form
from relay.api.mailgun import SendRequest, read_send_request
from relay.api.mailgun_form import ApiError, File, Form
from relay.api.mailgun_header import author_of, own_message_id, with_own_fields
from relay.api.mailgun_mime import compose, normalise_mime
from relay.api.mailgun_parameters import checked_message, checked_mime
from relay.api.state import Api, answer, sender_domain
from relay.mail.envelope import Body
from relay.mail.ip import canonical
from relay.mail.section import HeaderSection, Sections
from relay.mail.threads import in_thread_if_large
from relay.queue.entry import QueuedMessage
from relay.queue.queue_id import new_queue_id
from relay.queue.store import NewMessage, QueueFull, SpoolError
from relay.report import deliverylog
from relay.submit.message import (
    HEADER_SECTION_OCTETS,
    HEADER_TOO_LARGE,
    OUR_TROUBLE,
    OUT_OF_ROOM,
    JudgedHeader,
    Refusal,
    judge_header,
    queued_recipients,
)
from relay.submit.trace import Arrival, missing_fields, received_field, tcp_info

log = logging.getLogger(__name__)


async def send(api: Api, request: web.Request) -> web.Response:
    """Accept a message that is made of the fields of a form."""
    domain = sender_domain(api, request, named=True)
    form = checked_message(await read_form(request))
    incoming = _Incoming(api, request, domain)
    asked, section, rest = await in_thread_if_large(
        partial(_composed, form, incoming), octets=_size(form)
    )
    return await incoming.take(asked, section, rest)


def _composed(form: Form, incoming: _Incoming) -> tuple[SendRequest, HeaderSection, bytes]:
    """Envelope and options of a form; the header section and the rest of its message."""
    asked = read_send_request(
        form, domain=incoming.domain, now=incoming.now, max_recipients=incoming.api.recipients
    )
    message_id = own_message_id(form) or f"<{incoming.queue_id}@{incoming.domain}>"
    header, rest, _ = Sections.of(compose(form, message_id=message_id, now=incoming.now))
    return asked, HeaderSection(header), rest


async def send_mime(api: Api, request: web.Request) -> web.Response:
    """Accept a message that comes as a file, for the recipients in the form."""
    domain = sender_domain(api, request, named=True)
    form = checked_mime(await read_form(request))
    incoming = _Incoming(api, request, domain)
    file = _message_file(form).content
    asked, section, rest, behind = await in_thread_if_large(
        partial(_taken_apart, form, file, incoming), octets=len(file) + _size(form)
    )
    return await incoming.take(asked, section, rest, displaced=behind)


def _taken_apart(
    form: Form, file: bytes, incoming: _Incoming
) -> tuple[SendRequest, HeaderSection, bytes, bytes]:
    """Envelope and options of a form, and its file in parts (`Sections`): the header section, with
    the `h:` fields of the form, the rest, and the lines that a person may take for fields.
    """
    header, rest, behind = Sections.of(normalise_mime(file))
    if len(header) > HEADER_SECTION_OCTETS:
        raise _as_error(HEADER_TOO_LARGE)
    section = with_own_fields(form, HeaderSection(header))
    domain, now = incoming.domain, incoming.now
    postmaster = f"postmaster@{domain}"
    # These fields name the domain of the sender, not the relay.
    arrival = incoming.arrival._replace(hostname=domain)
    missing = missing_fields(section, arrival, reverse_path=postmaster)
    asked = read_send_request(
        form,
        domain=domain,
        now=now,
        max_recipients=incoming.api.recipients,
        sender=author_of(section) or postmaster,
    )
    if missing:
        section = HeaderSection(missing + section.octets)
    return asked, section, rest, behind


def _message_file(form: Form) -> File:
    for file in form.files:
        if file.name == "message":
            return file
    if not any(value.strip() for value in form.all("to")):
        raise ApiError(400, "to parameter is missing")
    raise ApiError(400, "'message' parameter is not a file")


def _size(form: Form) -> int:
    return sum(len(value) for _, value in form.fields) + sum(
        len(file.content) for file in form.files
    )


class _Incoming:
    """A message that is coming in."""

    def __init__(self, api: Api, request: web.Request, domain: str) -> None:
        self.api, self.request, self.domain = api, request, domain
        self.now = api.operator.clock()
        self.queue_id = new_queue_id(self.now)
        self.arrival = Arrival(api.hostname, self.queue_id, self.now)
        self.client = canonical(request.remote or "")

    async def take(
        self, asked: SendRequest, section: HeaderSection, rest: bytes, *, displaced: bytes = b""
    ) -> web.Response:
        """Accept the message, or raise the `ApiError` that refuses it."""
        size = len(section.octets) + len(displaced)
        judged = await in_thread_if_large(
            partial(self._open, asked, section, displaced), octets=size
        )
        if isinstance(judged, Refusal):
            raise _as_error(judged)
        content = judged.header + rest
        if len(content) > self.api.message_size_bytes:
            raise ApiError(413, "the message is too large")
        message = self._message(asked, judged, content)
        recipients = queued_recipients(judged, asked.recipients)
        events = deliverylog.accepted_events(message, recipients)
        await self._accept(NewMessage(message, recipients, content, events=events))
        log.info("%s: accepted over HTTP for %s", self.queue_id, self.domain)
        return answer({"id": f"<{judged.summary.message_id}>", "message": "Queued. Thank you."})

    def _open(
        self, asked: SendRequest, section: HeaderSection, displaced: bytes
    ) -> JudgedHeader | Refusal:
        only_for = asked.recipients[0].address if len(asked.recipients) == 1 else ""
        return judge_header(
            section,
            self.arrival,
            reverse_path=asked.reverse_path,
            domains={recipient.domain for recipient in asked.recipients},
            rules=self.api.rules(),
            received_hops=self.api.received_hops,
            on_top=received_field(
                self.arrival,
                source=f"unknown ({tcp_info(self.client)})",
                protocol="HTTPS" if self.request.secure else "HTTP",
                only_for=only_for,
            ),
            options=asked.options,
            displaced=displaced,
            removed=(b"bcc",),
        )

    def _message(self, asked: SendRequest, judged: JudgedHeader, content: bytes) -> QueuedMessage:
        eight_bit = not content.isascii()
        return QueuedMessage(
            queue_id=self.queue_id,
            reverse_path=asked.reverse_path,
            arrived=judged.arrived,
            size_bytes=len(content),
            summary=judged.summary,
            body=Body.EIGHT_BIT_MIME if eight_bit else Body.SEVEN_BIT,
            eight_bit=eight_bit,
            smtputf8=asked.smtputf8,
            origin="http",
            client=f"HTTP [{self.client}]",
            client_tls=_tls_of(self.request),
            terms=judged.terms,
            tls_required_no=judged.tls_required_no,
        )

    async def _accept(self, new: NewMessage) -> None:
        try:
            await self.api.sink.accept(new)
        except QueueFull as error:
            log.warning("%s: refused for now: %s", self.queue_id, error)
            raise _as_error(OUT_OF_ROOM) from error
        except SpoolError as error:
            log.error("%s: refused for now: %s", self.queue_id, error)
            raise _as_error(OUR_TROUBLE) from error


def _tls_of(request: web.Request) -> str:
    """Version and cipher of the TLS of a request; "" for a request in clear."""
    session = request.transport.get_extra_info("ssl_object") if request.transport else None
    return f"{session.version()}, {session.cipher()[0]}" if session is not None else ""


def _as_error(refusal: Refusal) -> ApiError:
    """A refusal of mail as an HTTP status: trouble of the relay, too large, or invalid."""
    code = refusal.reply.code
    status = 503 if code < 500 else 413 if code == 552 else 400
    return ApiError(status, refusal.reply.text)
