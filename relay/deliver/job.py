"""The work of one attempt: the message, and its content in a form that a host can take."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

from relay.deliver.content import Content, beginning, pieces
from relay.deliver.sevenbit import Conversion, ConversionPlan, NotConvertible, Survey
from relay.deliver.signing import Signer
from relay.deliver.transaction import Extensions, needs_conversion
from relay.mail.record import record, replace
from relay.mail.threads import in_thread_if_large
from relay.queue.entry import Entry, QueuedMessage

_AT_ONCE_OCTETS = 8 * 1024
"""A larger piece is converted in a thread: many empty parts may take a tenth of a second."""


@record(frozen=True, slots=True)
class Job:
    """The message to deliver, its content, and facts about it."""

    message: QueuedMessage
    content: Content
    header_is_utf8: bool
    signer: Signer | None = None
    not_convertible: str = ""
    """Why it was not converted to 7 bits, although the host takes no others."""
    may_go_on: Callable[[], bool] = lambda: True
    """Whether the claim still holds; see `relay.queue.store.DeliveryQueue.may_begin`."""
    unsigned: str = ""
    """Why it has no DKIM-Signature, although its domain has a key."""


async def job_of(
    entry: Entry,
    content: Callable[[], AsyncIterator[bytes]],
    signer: Signer | None,
    may_go_on: Callable[[], bool],
) -> Job:
    """The job of an entry. `content` reads the content, where the entry does not have it."""
    message = entry.message
    whole = content if entry.content is None else entry.content
    if not (message.smtputf8 and message.eight_bit):
        return Job(message, whole, False, signer, may_go_on=may_go_on)
    # RFC 6531 §3.2 does not tell a header from a body, and a host without SMTPUTF8 may still have
    # the body.
    header = (await beginning(whole)).partition(b"\r\n\r\n")[0]
    return Job(message, whole, not header.isascii(), signer, may_go_on=may_go_on)


async def fit_for(offers: Extensions, job: Job) -> Job:
    """The job as this host can take it: its content in 7 bits where it takes no others (RFC 6152
    §3).

    The content is read once to see what is to be done, and once more while it is sent.
    """
    if not needs_conversion(job.message, offers):
        return job
    try:
        plan = await _surveyed(job.content)
    except NotConvertible as reason:
        return replace(job, not_convertible=str(reason))
    message = replace(job.message, eight_bit=False, size_bytes=plan.size_bytes)
    return replace(job, message=message, content=lambda: _converted(job.content, plan))


async def signed(job: Job) -> Job:
    """The job with a DKIM signature, if it needs one, over the octets that are sent."""
    if job.signer is None or job.not_convertible:
        return job
    signature = await job.signer.sign(job.message, job.content)
    field = signature.field
    if not field:
        return replace(job, unsigned=signature.unsigned) if signature.unsigned else job
    content = job.content
    message = replace(job.message, size_bytes=job.message.size_bytes + len(field))
    if isinstance(content, bytes):
        return replace(job, message=message, content=field + content)
    return replace(job, message=message, content=lambda: _with(field, content))


async def _with(field: bytes, content: Callable[[], AsyncIterator[bytes]]) -> AsyncGenerator[bytes]:
    yield field
    async for piece in content():
        yield piece


async def _surveyed(content: Content) -> ConversionPlan:
    survey = Survey()
    async with aclosing(pieces(content)) as every:
        async for piece in every:
            await in_thread_if_large(
                partial(survey.feed, piece), octets=len(piece), at_once_octets=_AT_ONCE_OCTETS
            )
    return survey.finish()


async def _converted(content: Content, plan: ConversionPlan) -> AsyncGenerator[bytes]:
    conversion = Conversion(plan)
    async with aclosing(pieces(content)) as every:
        async for piece in every:
            yield await in_thread_if_large(
                partial(conversion.feed, piece), octets=len(piece), at_once_octets=_AT_ONCE_OCTETS
            )
    yield conversion.finish()
