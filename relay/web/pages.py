"""One function for each page: it asks, and gives a template what it shows."""

from __future__ import annotations

import asyncio
import csv
import io
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from aiohttp import web

from relay.admin import operations
from relay.admin import report as reports
from relay.admin.mta_sts import policy_as_json
from relay.mail.address import AddressError, domain_of, normalise_domain, parse_path
from relay.mail.event import Protection
from relay.policy.fields import Wishes
from relay.policy.rules import floor_rules, resolve
from relay.queue.entry import State
from relay.queue.rows import moment
from relay.queue.statistics import CountFilter
from relay.queue.store import EventFilter, ListedMessage, QueueFilter, SpoolError, more_follows
from relay.queue.verbs import VERBS
from relay.web.answers import count_messages, events_of, log_page
from relay.web.charts import chart_of
from relay.web.filters import EVENTS, PROTECTIONS, SOURCES, read_filter, read_time
from relay.web.guard import Refused, Visitor
from relay.web.live import TooManyViewers, message
from relay.web.rows import story_of
from relay.web.state import Web

if TYPE_CHECKING:
    from relay.web.site import Site

__all__ = ["Visit"]

_PERIODS = {1: "1 hour", 24: "24 hours", 168: "7 days", 720: "30 days"}
_WRITE_SECONDS = 30.0
_EXPORT_PAGE = 500
_LISTED_EXCEPTIONS = 200
_QUEUE_PAGE = 50
_SEARCH_SECONDS = 2.0
_SHOWN_CONTENT_BYTES = 256 * 1024
_SOON = timedelta(days=14)
_LITTLE_ROOM_BYTES = 1024 * 1024 * 1024
_LAG_EVENTS = 10_000
_LOOKED_AT_DOMAINS = 10
_QUESTION_SECONDS = 20
_QUEUE_ID = re.compile(r"[0-9A-HJKMNP-TV-Z]{17}")


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of somebody who is signed in."""

    site: Site
    request: web.Request
    visitor: Visitor

    @property
    def state(self) -> Web:
        return self.site.state

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    def show(self, template: str, *, status: int = 200, **values: Any) -> web.Response:
        """A page."""
        return self.site.page(template, self.visitor, status=status, **values)


# Overview.


async def overview(visit: Visit) -> web.StreamResponse:
    """What is going on."""
    asked = visit.query.get("hours", "24")
    hours = int(asked) if asked.isdigit() and int(asked) in _PERIODS else 24
    now = visit.state.clock()
    wanted = _latest(now, hours)
    view = visit.state.view
    found = await view.count_hours(wanted)
    summary = reports.summary_of(await reports.counts(view, wanted))
    counted = await visit.site.counted.get()
    facts = await visit.state.facts()
    oldest = await view.list_messages(QueueFilter(), now=now, limit=1)
    return visit.show(
        "overview.html",
        hours=hours,
        periods=_PERIODS,
        summary=summary,
        chart=chart_of(found, begin=wanted.begin, hours=max(hours, 2)),
        since=wanted.begin.strftime("%Y-%m-%dT%H:%M"),
        queue=await view.counts(),
        oldest=moment(oldest[0].arrived) if oldest else None,
        troubled=[one for one in counted.destinations if one.deferred or one.held][:8],
        counted=counted,
        alarms=await _alarms(visit.state, facts, now),
        facts=facts,
        latest=await log_page(view, EventFilter(), limit=8),
    )


def _latest(now: datetime, hours: int) -> CountFilter:
    """So many hours, the current one included; of one hour the one before it, too."""
    begin = now - timedelta(hours=max(hours, 2) - 1)
    return reports.period(begin, now + timedelta(microseconds=1))


async def _alarms(state: Web, facts: Any, now: datetime) -> list[tuple[str, str]]:
    """What somebody should look at: a sentence and where it leads."""
    found = [(sentence, "/health") for sentence in facts.trouble]
    for path, at in facts.certificates.items():
        if at - now < _SOON:
            days = (at - now).days
            left = f"expires in {days} days" if days >= 0 else "has expired"
            found.append((f"The certificate {path} {left}.", "/health"))
    if facts.free_bytes and facts.free_bytes < _LITTLE_ROOM_BYTES:
        found.append(("Less than 1 GiB is free on the disk of the queue.", "/health"))
    if facts.log_lag_events > _LAG_EVENTS:
        found.append((f"The log file lacks {facts.log_lag_events:,} events.", "/health"))
    for domain in await _downgraded(state, now):
        sentence = f"Mail to {domain} went out in clear today, and over verified TLS before."
        found.append((sentence, f"/destination/{domain}"))
    return found


async def _downgraded(state: Web, now: datetime) -> list[str]:
    """Destinations that got mail in clear in a day, and verified within a month."""
    day = reports.period(now - timedelta(hours=24), now + timedelta(microseconds=1))
    exceptions = await state.view.find_exceptions(day, limit=_EXPORT_PAGE)
    clear = {one.recipient_domain for one in exceptions if one.protection == Protection.CLEAR}
    found = []
    for domain in sorted(clear)[:_LOOKED_AT_DOMAINS]:
        month = reports.period(now - timedelta(days=30), now, recipient_domain=domain)
        if reports.summary_of(await reports.counts(state.view, month)).verified:
            found.append(domain)
    return found


# The log.


async def log(visit: Visit) -> web.StreamResponse:
    """Events, newest first."""
    wanted = read_filter(visit.query)
    before = _number(visit.query.get("before", ""))
    page = await log_page(visit.state.view, wanted.wanted, before=before)
    return visit.show(
        "log.html",
        filter=wanted,
        page=page,
        before=before,
        events=EVENTS,
        protections=PROTECTIONS,
        sources=SOURCES,
    )


def _number(text: str) -> int:
    """A place in the log, which may be a long number of several queues; 0 for none."""
    is_number = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 1000
    return int(text) if is_number else 0


async def live(visit: Visit) -> web.StreamResponse:
    """New rows as server-sent events, until the browser goes, or its session ends."""
    response = visit.site.secured(web.StreamResponse())
    response.content_type = "text/event-stream"
    rows = visit.site.live.follow(read_filter(visit.query).wanted)
    try:
        first = asyncio.ensure_future(anext(rows))
        await response.prepare(visit.request)
        await _write(response, b": following\n\n")
        html, left_out = await first
        while not _is_over(visit):
            await _write(response, message(html, left_out))
            html, left_out = await anext(rows)
    except TooManyViewers:
        raise Refused(503, "Too many pages follow the log; close some.") from None
    except (ConnectionError, TimeoutError):
        pass
    finally:
        await rows.aclose()  # type: ignore[attr-defined]
    return response


def _is_over(visit: Visit) -> bool:
    """Whether the session has ended; following the log does not keep one alive."""
    session = visit.visitor.session
    return session is not None and session.is_over(visit.state.clock())


async def _write(response: web.StreamResponse, octets: bytes) -> None:
    async with asyncio.timeout(_WRITE_SECONDS):
        await response.write(octets)


async def export(visit: Visit) -> web.StreamResponse:
    """The events that match, all of them, oldest first."""
    as_csv = visit.query.get("format") == "csv"
    wanted = read_filter(visit.query).wanted
    name = "events.csv" if as_csv else "events.jsonl"
    kind = "text/csv" if as_csv else "application/x-ndjson"
    return await _stream(visit, name, kind, _exported(visit.state, wanted, as_csv=as_csv))


async def _exported(state: Web, wanted: EventFilter, *, as_csv: bool) -> AsyncIterator[str]:
    if as_csv:
        yield _csv([_EXPORT_COLUMNS])
    after = 0
    while page := await state.view.find_events(wanted, after=after, limit=_EXPORT_PAGE):
        after = page[-1].seq
        if as_csv:
            yield _csv([_export_row(one.seq, one.event) for one in page])
        else:
            yield "".join(f"{one.event.line}\n" for one in page)


_EXPORT_COLUMNS = (
    "time",
    "event",
    "protection",
    "queue-id",
    "sender",
    "recipients",
    "subject",
    "description",
    "rule",
    "id",
)


def _export_row(seq: int, event: Any) -> tuple[str, ...]:
    from relay.web.rows import row_of, setting_text

    row = row_of(seq, event)
    rule = setting_text(row.event["policy"]) if "policy" in row.event else ""
    cells = (row.kind, row.protection, row.queue_id, row.sender, row.targets)
    return (row.at.isoformat(), *cells, row.subject, row.sentence, rule, event.id)


def _csv(rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([map(reports.csv_cell, row) for row in rows])
    return text.getvalue()


async def _stream(
    visit: Visit, name: str, kind: str, parts: AsyncIterator[str]
) -> web.StreamResponse:
    """A file of any length, as fast as it is taken."""
    response = visit.site.secured(web.StreamResponse())
    response.headers["Content-Type"] = f"{kind}; charset=utf-8"
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    await response.prepare(visit.request)
    try:
        async for part in parts:
            await _write(response, part.encode())
    except TimeoutError:
        if visit.request.transport is not None:
            visit.request.transport.abort()  # so that what was cut off does not look whole
    return response


# A message.


async def show_message(visit: Visit) -> web.StreamResponse:
    """The story of one message."""
    queue_id = visit.request.match_info["id"]
    view = visit.state.view
    try:
        item = await operations.show_message(view, queue_id)
    except SpoolError:
        item = None  # it left in this moment
    story = story_of(queue_id, await events_of(view, queue_id), item)
    if story is None:
        raise Refused(
            404,
            "No such message: it was never here, or its events are older than log.keep_events.",
        )
    content = None
    if item is not None and visit.state.options().show_content:
        content = await _content(visit.state, queue_id)
    caught = visit.state.caught(queue_id) if visit.state.caught is not None else None
    received = _as_text(caught) if caught is not None else None
    return visit.show("message.html", story=story, content=content, received=received)


async def _content(state: Web, queue_id: str) -> str:
    """The beginning of the content as text; it is shown as it came, and never as a page."""
    found = b""
    try:
        async for piece in state.view.read_content(queue_id):
            found += piece
            if len(found) >= _SHOWN_CONTENT_BYTES:
                break
    except SpoolError:
        return ""
    return _as_text(found)


def _as_text(content: bytes) -> str:
    text = content[:_SHOWN_CONTENT_BYTES].decode("utf-8", "backslashreplace")
    return text.replace("\r\n", "\n")


# The queue.


async def queue(visit: Visit) -> web.StreamResponse:
    """By destination, or the messages of one, or those that match."""
    counted = await visit.site.counted.get()
    wanted, said = _queue_filter(visit.query)
    if not said and "all" not in visit.query:
        return visit.show(
            "queue.html",
            counted=counted,
            destinations=counted.destinations[:_LISTED_EXCEPTIONS],
            silent=(await visit.state.facts()).silent,
        )
    now = visit.state.clock()
    page: list[ListedMessage] = []
    is_unfinished = False
    try:
        async with asyncio.timeout(_SEARCH_SECONDS):
            page = await visit.state.view.list_messages(
                wanted, now=now, after=visit.query.get("after", ""), limit=_QUEUE_PAGE
            )
    except TimeoutError:
        is_unfinished = True
    return visit.show(
        "messages.html",
        said=said,
        is_unfinished=is_unfinished,
        items=operations.page_as_json(page),
        following=page[-1].queue_id if more_follows(page, _QUEUE_PAGE) else "",
    )


def _queue_filter(form: Mapping[str, str]) -> tuple[QueueFilter, dict[str, str]]:
    """The filter of a query or a form, and how it was said; `Refused` where it says nonsense."""
    said = {
        name: form[name].strip()
        for name in ("domain", "sender", "state")
        if form.get(name, "").strip()
    }
    if said.get("state", "queued") not in ("queued", "deferred", "held"):
        raise Refused(400, "No such state: queued, deferred and held are known.")
    try:
        domain = normalise_domain(said["domain"]) if "domain" in said else ""
    except AddressError as error:
        raise Refused(400, f"The domain: {error}.") from None
    state = State(said["state"]) if "state" in said else None
    return QueueFilter(domain=domain, sender=said.get("sender", ""), state=state), said


def _meant(form: Mapping[str, str], ids: list[str]) -> tuple[QueueFilter, dict[str, str]]:
    """What a verb is for: marked messages, a filter, or all where just that was said."""
    if ids:
        return QueueFilter(queue_ids=frozenset(ids)), {"marked": f"{len(ids)} messages"}
    wanted, said = _queue_filter(form)
    if not said and form.get("all") != "yes":
        raise Refused(400, "Nothing is marked: mark messages, or choose all that match.")
    return wanted, said or {"all": "the whole queue"}


async def confirm(visit: Visit) -> web.StreamResponse:
    """Says how much a verb would change, and asks."""
    form, verb, ids = await _verb_form(visit)
    wanted, said = _meant(form, ids)
    if ids:
        count, is_whole = len(ids), True
    else:
        count, is_whole = await count_messages(visit.state.view, wanted, visit.state.clock())
        if not is_whole and set(said) == {"domain"}:
            counted = await visit.site.counted.get()
            count, is_whole = counted.of(wanted.domain).total, counted.is_whole
    fields = {name: form[name] for name in ("domain", "sender", "state", "all") if name in form}
    return visit.show(
        "confirm.html",
        verb=verb,
        said=said,
        count=count,
        is_whole=is_whole,
        ids=ids,
        fields=fields,
    )


async def change(visit: Visit) -> web.StreamResponse:
    """Do it; what takes longer than a moment has a page of its own."""
    form, verb, ids = await _verb_form(visit)
    wanted, said = _meant(form, ids)
    if ids and len(ids) <= 10:
        said = {"id": ", ".join(ids)}
    job = visit.site.jobs.start(visit.visitor.user.name, verb, wanted, said)
    await visit.site.jobs.settled(job, 0.3)
    visit.site.counted.forget()
    raise web.HTTPSeeOther(f"/job/{job.name}")


async def _verb_form(visit: Visit) -> tuple[Mapping[str, str], str, list[str]]:
    form = await visit.site.form(visit.request)
    visit.site.guard.check_form(visit.visitor, form)
    verb = form.get("verb", "")
    if verb not in VERBS:
        raise Refused(400, "No such verb.")
    return form, verb, [str(one) for one in form.getall("id", [])]


async def show_job(visit: Visit) -> web.StreamResponse:
    """How far a change is."""
    job = visit.site.jobs.find(visit.request.match_info["name"])
    if job is None:
        raise Refused(404, "No such change: the latest fifty are kept, until the relay restarts.")
    return visit.show("job.html", job=job)


# A destination.


async def destination(visit: Visit, probed: Mapping[str, Any] | None = None) -> web.StreamResponse:
    """What protects mail to a domain, and what became of it."""
    domain = _domain(visit.request.match_info["domain"])
    state, now = visit.state, visit.state.clock()
    month = _latest(now, 720)
    month = CountFilter(month.begin, month.end, recipient_domain=domain)
    found = await reports.counts(state.view, month)
    exceptions = await state.view.find_exceptions(month, limit=_EXPORT_PAGE)
    counted = await visit.site.counted.get()
    rules = state.rules()
    kept = await state.policies.kept(domain)
    latest = await log_page(state.view, EventFilter(recipient_domain=domain), limit=30)
    return visit.show(
        "destination.html",
        domain=domain,
        probed=probed,
        queue=counted.of(domain),
        silent=(await state.facts()).silent,
        settings=resolve(rules, reverse_path="", recipient_domain=domain),
        floors=floor_rules(rules, domain),
        policy=policy_as_json(kept) if kept is not None else None,
        hosts=_hosts_of(latest.rows),
        summary=reports.summary_of(found),
        chart=chart_of(await state.view.count_hours(month), begin=month.begin, hours=720),
        exceptions=exceptions[-20:][::-1],
        latest=latest,
    )


def _hosts_of(rows: Any) -> list[Any]:
    """The newest row about each host."""
    hosts: dict[str, Any] = {}
    for row in rows:
        host = row.event.get("delivery-status", {}).get("mx-host")
        if host:
            hosts.setdefault(host, row)
    return list(hosts.values())


def _domain(text: str) -> str:
    try:
        return normalise_domain(text)
    except AddressError as error:
        raise Refused(404, f"This is no domain: {error}.") from None


async def probe(visit: Visit) -> web.StreamResponse:
    """Connect to the hosts of a domain, and show what they prove."""
    visit.site.guard.check_form(visit.visitor, await visit.site.form(visit.request))
    domain = _domain(visit.request.match_info["domain"])
    async with asyncio.timeout(60):
        found = await visit.state.operator.running().probe(domain)
    await visit.site.jobs.note(visit.visitor.user.name, "probe", {"domain": domain}, 0)
    return await destination(visit, found)


# Policy.


async def policy(visit: Visit) -> web.StreamResponse:
    """The rules in force, and what they make of a message."""
    state = visit.state
    asked = {name: visit.query.get(name, "").strip() for name in _EXPLAIN_FIELDS}
    explained, trouble = None, ""
    if asked["to"]:
        try:
            explained = await _explain(state, asked)
        except AddressError as error:
            trouble = f"The address cannot be read: {error}."
        except TimeoutError:
            trouble = "The name servers did not answer in time."
    return visit.show(
        "policy.html",
        rules=state.rules(),
        places=state.places(),
        last_reload=state.last_reload(),
        asked=asked,
        explained=explained,
        trouble=trouble,
    )


_EXPLAIN_FIELDS = ("from", "to", "require", "skip")
_TRUTHS = {"yes": True, "no": False}


async def _explain(state: Web, asked: Mapping[str, str]) -> Mapping[str, Any]:
    recipient = _address(asked["to"])
    if not domain_of(recipient):
        raise AddressError("it has no domain")
    wishes = Wishes(_TRUTHS.get(asked["require"]), _TRUTHS.get(asked["skip"]))
    async with asyncio.timeout(_QUESTION_SECONDS):
        return await state.operator.running().explain(_address(asked["from"]), recipient, wishes)


def _address(text: str) -> str:
    bare = text.removeprefix("<").removesuffix(">")
    try:
        return parse_path(f"<{bare}>".encode(), smtputf8=True)[0]
    except UnicodeEncodeError as error:
        raise AddressError("it is no text") from error


# The report.


async def report(visit: Visit) -> web.StreamResponse:
    """The auditor's question and its answer."""
    asked, wanted = _period(visit)
    found = await reports.counts(visit.state.view, wanted)
    exceptions = await visit.state.view.find_exceptions(wanted, limit=_LISTED_EXCEPTIONS)
    return visit.show(
        "report.html",
        asked=asked,
        wanted=wanted,
        summary=reports.summary_of(found),
        is_empty=not found,
        exceptions=exceptions,
    )


async def report_file(visit: Visit) -> web.StreamResponse:
    """The same for a program, with every exception that was kept."""
    _, wanted = _period(visit)
    if visit.request.path.endswith(".csv"):
        return await _stream(visit, "report.csv", "text/csv", _report_csv(visit.state, wanted))
    found = await reports.counts(visit.state.view, wanted)
    exceptions = [
        reports.exception_as_json(one)
        async for page in reports.listing(visit.state.view, wanted)
        for one in page
    ]
    response = web.json_response(
        {
            "begin": wanted.begin.isoformat(),
            "end": wanted.end.isoformat(),
            "sender-domain": wanted.sender_domain,
            "recipient-domain": wanted.recipient_domain,
            "counts": reports.counts_as_json(found),
            "exceptions": exceptions,
        }
    )
    response.headers["Content-Disposition"] = 'attachment; filename="report.json"'
    return visit.site.secured(response)


async def _report_csv(state: Web, wanted: CountFilter) -> AsyncIterator[str]:
    found = await reports.counts(state.view, wanted)
    yield reports.csv_lines("count", reports.counts_as_json(found), with_head=True)
    async for page in reports.listing(state.view, wanted):
        yield reports.csv_lines("exception", map(reports.exception_as_json, page))


def _period(visit: Visit) -> tuple[dict[str, str], CountFilter]:
    """The form of the report: days in UTC, the last thirty where nothing is said."""
    now = visit.state.clock().astimezone(UTC)
    asked = {name: visit.query.get(name, "").strip() for name in ("sender", "recipient")}
    begin = read_time(visit.query.get("since", ""))
    end = read_time(visit.query.get("until", ""), is_end=True)
    end = end or read_time(now.date().isoformat(), is_end=True) or now
    begin = begin or read_time((end - timedelta(days=29)).date().isoformat()) or end
    if begin >= end:
        raise Refused(400, "The period ends before it begins.")
    domains = {
        name: ("<>" if text == "<>" else normalise_or_refuse(text)) if text else ""
        for name, text in asked.items()
    }
    asked |= {"since": begin.date().isoformat(), "until": end.date().isoformat()}
    wanted = reports.period(
        begin,
        end,
        sender_domain=domains["sender"],
        recipient_domain=domains["recipient"],
    )
    return asked, wanted


def normalise_or_refuse(text: str) -> str:
    """A domain as it is compared; `Refused` where it is none."""
    try:
        return normalise_domain(text.removeprefix("@"))
    except AddressError as error:
        raise Refused(400, f"This is no domain: {error}.") from None


# Health, search, help.


async def health(visit: Visit) -> web.StreamResponse:
    """How the relay is."""
    facts = await visit.state.facts()
    return visit.show(
        "health.html",
        facts=facts,
        now=visit.state.clock(),
        queue=await visit.state.view.counts(),
        configuration=visit.state.configuration(),
        viewers=visit.site.live.viewers,
    )


async def search(visit: Visit) -> web.StreamResponse:
    """Leads where an address, a domain, a queue id or a message-id belongs."""
    text = visit.query.get("q", "").strip()[:300]
    raise web.HTTPSeeOther(_place_of(text))


def _place_of(text: str) -> str:
    if not text:
        return "/log"
    if _QUEUE_ID.fullmatch(text.upper()):
        return f"/message/{text.upper()}"
    if "@" not in text and "." in text and " " not in text:
        try:
            return f"/destination/{normalise_domain(text)}"
        except AddressError:
            pass
    return f"/log?{read_filter({'q': text.removeprefix('<').removesuffix('>')}).query()}"


async def show_help(visit: Visit) -> web.StreamResponse:
    """The keys and the words."""
    return visit.show("help.html")
