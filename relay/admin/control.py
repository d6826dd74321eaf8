"""The control socket: how the command line talks to a running relay.

A UNIX socket that only its owner may open (mode 0600), or a group, too (0660). One request a connection, one JSON
object a line either way:

    → {"verb": "list", "domain": "example.net"}
    ← {"report": {…}}          of a report, what was counted; its exceptions follow as items
    ← {"items": [{…}, …]}      of a listing, a page; none, one or many
    ← {"item": {…}}            none, one or many
    ← {"following": {}}        where a log is followed: what comes after is new
    ← {"so-far": {…}}          of long work: how much of it is done
    ← {"done": {…}}            the end: what came of it
    ← {"error": "…"}           or the end: what is wrong with the request, or with us

A request is at most 1 MiB (a list of queue ids may be long) and has to come within ten
seconds; at most sixteen are served at a time, and a client that stops reading is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from relay.admin import operations
from relay.admin import report as reports
from relay.admin.mta_sts import Policies, list_policies, policy_as_json
from relay.mail.address import AddressError, normalise_domain
from relay.mail.jsontext import to_json
from relay.queue.api_state import ApiState, DomainSettings
from relay.queue.entry import State
from relay.queue.statistics import CountFilter
from relay.queue.store import EventFilter, QueueControl, QueueFilter, QueueView, SpoolError
from relay.queue.verbs import VERBS
from relay.route.mta_sts import policy_domain

__all__ = [
    "REQUEST_BYTES",
    "Answer",
    "Answers",
    "Control",
    "RequestError",
    "SocketTaken",
    "change_filter",
    "count_filter",
    "event_filter",
    "queue_filter",
    "settings_of",
    "start_control",
]

REQUEST_BYTES = 1024 * 1024
REQUEST_SECONDS = 10.0
WRITE_SECONDS = 60.0
FOLLOW_SECONDS = 0.5
AT_A_TIME = 16

log = logging.getLogger("relay.control")


class SocketTaken(Exception):
    """Another process answers at this socket."""


class RequestError(Exception):
    """The request makes no sense; the text says why."""


Answer = AsyncIterator[dict[str, Any]]


class Answers(Protocol):
    """Who answers requests."""

    def answer(self, request: Mapping[str, Any]) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Control:
    """What the requests are answered from. `queue` None: of a stopped relay, which can only be
    looked at.

    `retry_silent`: destinations that were left alone are tried again. `health`: what is wrong with
    the relay. `in_force`: its configuration, digested by section.
    """

    view: QueueView
    queue: QueueControl | None
    clock: Callable[[], datetime]
    retry_silent: Callable[[], None] = lambda: None
    health: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
    metrics: Callable[[], Awaitable[bytes]] | None = None
    status: Callable[[], Mapping[str, Any]] | None = None
    api_state: ApiState | None = None
    in_force: Callable[[], Mapping[str, str]] = dict
    policies: Policies | None = None

    async def answer(self, request: Mapping[str, Any]) -> Answer:
        """The lines that answer a request."""
        verb = request.get("verb")
        match verb:
            case "list":
                answers = self._list(request)
            case "show":
                answers = self._show(request)
            case "log":
                answers = self._log(request)
            case "report":
                answers = self._report(request)
            case "settings":
                answers = self._settings()
            case "health":
                answers = self._health()
            case "metrics":
                answers = self._metrics()
            case "status":
                answers = self._status()
            case "mta-sts-list" | "mta-sts-show" | "mta-sts-refresh" | "mta-sts-forget":
                answers = self._mta_sts(verb, request)
            case str() if verb in VERBS:
                answers = self._change(verb, request)
            case _:
                raise RequestError(f"no such verb: {verb}")
        async for line in answers:
            yield line

    async def _list(self, request: Mapping[str, Any]) -> Answer:
        count = 0
        async for page in operations.list_queue(self.view, queue_filter(request), now=self.clock()):
            count += len(page)
            # On a thread: meanwhile the event loop has mail to see to.
            yield {"items": await asyncio.to_thread(operations.page_as_json, page)}
        yield {"done": {"count": count}}

    async def _show(self, request: Mapping[str, Any]) -> Answer:
        queue_id = _text(request, "id")
        found = await operations.show_message(self.view, queue_id)
        if found is not None:
            yield {"item": found}
        yield {"done": {"unknown": [] if found else [queue_id]}}

    async def _mta_sts(self, verb: str, request: Mapping[str, Any]) -> Answer:
        """MTA-STS policies; "unknown" at the end has the domain where there is no policy of it."""
        if self.policies is None:
            raise RequestError("no relay is running")
        if verb == "mta-sts-list":
            async for page in list_policies(self.policies):
                yield {"items": [policy_as_json(kept) for kept in page]}
            yield {"done": {}}
            return
        domain = policy_domain(_domain(request))
        if not domain:
            raise RequestError("name a domain; an address has no MTA-STS policy")
        reason, is_known = "", True
        match verb:
            case "mta-sts-forget":
                is_known = await self.policies.forget(domain)
            case "mta-sts-refresh":
                refreshed = await self.policies.refresh(domain)
                kept, reason = refreshed.kept, refreshed.reason
            case _:
                kept = await self.policies.kept(domain)
        if verb != "mta-sts-forget":
            is_known = kept is not None
            if kept is not None:
                yield {"item": policy_as_json(kept)}
        yield {"done": {"unknown": [] if is_known else [domain], "reason": reason}}

    async def _health(self) -> Answer:
        if self.health is None:
            raise RequestError("no relay is running")
        yield {"done": dict(await self.health())}

    async def _metrics(self) -> Answer:
        """For the worker that is asked for those of all."""
        if self.metrics is None:
            raise RequestError("no relay is running")
        yield {"done": {"text": (await self.metrics()).decode()}}

    async def _status(self) -> Answer:
        """What deliveries are doing."""
        if self.status is None:
            raise RequestError("no relay is running")
        yield {"done": dict(self.status())}

    async def _change(self, verb: str, request: Mapping[str, Any]) -> Answer:
        if self.queue is None:
            raise RequestError(f"{verb}: no relay is running")
        wanted = change_filter(verb, request)
        if verb == "retry":
            self.retry_silent()  # first: what is left alone would be put off again before we are through
        done: dict[str, Any] = {}
        async for so_far in operations.change_in_steps(
            self.queue, wanted, verb=verb, now=self.clock()
        ):
            if done:
                yield {"so-far": done}
            done = so_far
        log.info("operator: %s, %d recipients changed", verb, done["changed"])
        yield {"done": done}

    async def _log(self, request: Mapping[str, Any]) -> Answer:
        wanted = event_filter(request)
        limit = request.get("limit")
        if limit is not None and (not isinstance(limit, int) or not 1 <= limit <= 100_000):
            raise RequestError("limit is a number from 1 to 100000")
        follow = request.get("follow") is True
        # Asked for first: an event that commits in between is found below, or new.
        seq = await self._last_seq() if follow else 0
        async for at, line in operations.find_events(self.view, wanted, limit=limit):
            seq = at
            yield {"line": line}
        if follow:
            yield {"following": {}}
            async for line in operations.follow_events(
                self.view, wanted, after=seq, more=_a_moment
            ):
                yield {"line": line}
        yield {"done": {}}

    async def _report(self, request: Mapping[str, Any]) -> Answer:
        """How the mail of a period was protected, and every exception that was kept."""
        wanted = count_filter(request)
        found = await reports.counts(self.view, wanted)
        yield {
            "report": {
                "begin": wanted.begin.isoformat(),
                "end": wanted.end.isoformat(),
                "sender-domain": wanted.sender_domain,
                "recipient-domain": wanted.recipient_domain,
                "counts": reports.counts_as_json(found),
            }
        }
        async for page in reports.listing(self.view, wanted):
            yield {"items": [reports.exception_as_json(one) for one in page]}
        yield {"done": {}}

    async def _settings(self) -> Answer:
        """What was set over HTTP for sender domains, and whether a file says what is in force."""
        if self.api_state is not None:
            for domain, one in (await self.api_state.domain_settings()).items():
                yield {
                    "item": {
                        "domain": domain,
                        "require-tls": one.require_tls,
                        "skip-verification": one.skip_verification,
                    }
                }
        yield {"done": {"in-force": dict(self.in_force())}}

    async def _last_seq(self) -> int:
        """Where the log ends now: what follows is new."""
        last = await self.view.find_events(EventFilter(), limit=1, ascending=False)
        return last[0].seq if last else 0


def settings_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, DomainSettings]:
    """What the lines that answer `settings` say, by domain."""
    items = [line["item"] for line in lines if "item" in line]
    return {
        one["domain"]: DomainSettings(one["require-tls"], one["skip-verification"]) for one in items
    }


async def _a_moment() -> None:
    await asyncio.sleep(FOLLOW_SECONDS)


_WAITING = (State.QUEUED, State.DEFERRED, State.HELD)


_QUEUE_FILTERS = frozenset({"ids", "domain", "sender", "older-than", "state"})
_EVENT_FILTERS = frozenset(
    {
        "since",
        "until",
        "events",
        "recipient",
        "recipient-domain",
        "sender",
        "sender-domain",
        "id",
    }
)
_COUNT_FILTERS = frozenset({"since", "until", "sender-domain", "recipient-domain"})


def queue_filter(request: Mapping[str, Any]) -> QueueFilter:
    """The messages a request means.

    A filter that is there says something: an empty one comes of a script whose variable is not
    set, and would mean every message. A filter that nobody knows would do so, too.
    """
    _check_known(request, _QUEUE_FILTERS | {"verb", "all"})
    seconds = request.get("older-than", 0)
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, (int, float))
        or not 0 <= seconds <= 1e9
    ):
        raise RequestError("older-than is a number of seconds")
    state = request.get("state", State.QUEUED)
    if not isinstance(state, str) or state not in set(State):
        raise RequestError(f"no such state: {state}; known are {', '.join(_WAITING)}")
    return QueueFilter(
        queue_ids=_names(request, "ids", "a list of queue ids"),
        domain=_domain(request),
        sender=_text(request, "sender"),
        older_than=timedelta(seconds=seconds) if "older-than" in request else None,
        state=State(state) if "state" in request else None,
    )


def change_filter(verb: str, request: Mapping[str, Any]) -> QueueFilter:
    """The messages that a verb changes: those of a filter, or all where just that is said."""
    wanted = queue_filter(request)
    if "all" in request and request["all"] is not True:
        raise RequestError("all is true, or is left out")
    if (wanted == QueueFilter()) != ("all" in request):
        raise RequestError(f"{verb} what? name queue ids or a filter, or else say all")
    return wanted


def event_filter(request: Mapping[str, Any]) -> EventFilter:
    """The events a request means. An empty or unknown filter is a mistake, as in `queue_filter`."""
    _check_known(request, _EVENT_FILTERS | {"verb", "limit", "follow"})
    return EventFilter(
        begin=_time(request, "since"),
        end=_time(request, "until"),
        names=_names(request, "events", "a list of names"),
        recipient=_text(request, "recipient"),
        sender=_text(request, "sender"),
        queue_id=_text(request, "id"),
        sender_domain=_domain(request, "sender-domain"),
        recipient_domain=_domain(request, "recipient-domain"),
    )


def count_filter(request: Mapping[str, Any]) -> CountFilter:
    """The counts a request means. `<>` as sender domain is the null reverse-path."""
    _check_known(request, _COUNT_FILTERS | {"verb"})
    begin, end = _time(request, "since"), _time(request, "until")
    if begin is None or end is None:
        raise RequestError("a report needs since and until")
    if begin >= end:
        raise RequestError("since has to be before until")
    if request.get("sender-domain") == "<>":
        sender_domain = "<>"
    else:
        sender_domain = _domain(request, "sender-domain")
    recipient_domain = _domain(request, "recipient-domain")
    return reports.period(
        begin, end, sender_domain=sender_domain, recipient_domain=recipient_domain
    )


def _time(request: Mapping[str, Any], key: str) -> datetime | None:
    try:
        at = datetime.fromisoformat(request[key]) if key in request else None
    except (TypeError, ValueError):
        raise RequestError(f"{key} is a time such as 2030-01-31T12:00:00Z") from None
    if at is not None and at.tzinfo is None:
        raise RequestError(f"{key} has to name its zone")
    return at


def _domain(request: Mapping[str, Any], key: str = "domain") -> str:
    text = _text(request, key)
    try:
        return normalise_domain(text) if text else ""
    except AddressError as error:
        raise RequestError(f"{key}: {error}") from None


def _check_known(request: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in request:
        if name not in known:
            raise RequestError(f"no such filter: {name}; known are {', '.join(sorted(known))}")


def _names(request: Mapping[str, Any], key: str, kind: str) -> frozenset[str]:
    if key not in request:
        return frozenset()
    names = request[key]
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise RequestError(f"{key} is {kind}")
    if not names or not all(one.strip() for one in names):
        raise _empty(key)
    return frozenset(names)


def _text(request: Mapping[str, Any], key: str) -> str:
    if key not in request:
        return ""
    value = request[key]
    if not isinstance(value, str):
        raise RequestError(f"{key} is a text")
    if not value.strip():
        raise _empty(key)
    return value


def _empty(key: str) -> RequestError:
    return RequestError(f"{key} is empty: give it a value or leave it out")


class ControlServer:
    """The socket and the connections open on it."""

    def __init__(self, control: Answers, path: Path, group: str | None = None) -> None:
        self.control = control
        self.path = path
        self.group = group
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def start(self) -> None:
        """Listen; `SocketTaken` or OSError where that is not to be had."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(self.path)
        listening = _bind_private(self.path)
        self._inode = self.path.stat().st_ino
        if self.group is not None:
            shutil.chown(self.path, group=self.group)
            self.path.chmod(0o660)
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listening, limit=REQUEST_BYTES
        )

    async def close(self) -> None:
        """Let everybody go and take the socket away, if it is still ours."""
        if self._server is not None:
            self._server.close()
        for task in list(self._clients):
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients, timeout=5)
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > AT_A_TIME:
                await _send(writer, {"error": "too many requests at a time, try again"})
                await _finish(writer)
                return
            await self._one_request(reader, writer)
            await _finish(writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the client has gone, does not read, or we are closing
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
            request = json.loads(line)
            if not isinstance(request, dict):
                raise RequestError("a request is a JSON object")
        except (ValueError, RecursionError, RequestError) as error:
            await _send(writer, {"error": f"not a request: {error}"})
            return
        await self._reply(request, reader, writer)

    async def _reply(
        self, request: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer until the end, or until the client hangs up (which is how following ends)."""
        answering = asyncio.ensure_future(self._answer(request, writer))
        hanging_up = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
        finally:
            for task in (answering, hanging_up):
                task.cancel()
            await asyncio.gather(answering, hanging_up, return_exceptions=True)

    async def _answer(self, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            async for line in self.control.answer(request):
                await _send(writer, line)
        except RequestError as error:
            await _send(writer, {"error": str(error)})
        except SpoolError as error:
            log.warning("control: %s", error)
            await _send(writer, {"error": f"the queue cannot be read or changed: {error}"})
        except OSError:
            raise
        except Exception:
            log.exception("control: a request failed")
            await _send(writer, {"error": "an error of the relay's own; its log has it"})


async def _send(writer: asyncio.StreamWriter, line: Mapping[str, Any]) -> None:
    writer.write(to_json(line).encode("ascii") + b"\n")
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.drain()


async def _finish(writer: asyncio.StreamWriter) -> None:
    """Close once all that was answered has gone out; who does not read is not waited for for ever."""
    writer.close()
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.wait_closed()


def _clear_stale(path: Path) -> None:
    """Remove the socket of a relay that is gone; `SocketTaken` where one answers, or it is no
    socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketTaken(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                path.unlink(missing_ok=True)
                return
            if not isinstance(error, TimeoutError) and error.errno != errno.EAGAIN:
                raise
    raise SocketTaken(f"another relay answers at {path}")


def _bind_private(path: Path) -> socket.socket:
    """A bound UNIX socket that nobody but its owner could open, not even for a moment."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        listening.bind(os.fspath(path))
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    return listening


async def start_control(control: Answers, path: Path, *, group: str | None = None) -> ControlServer:
    """Listen on a control socket, for its owner and a group."""
    server = ControlServer(control, path, group)
    await server.start()
    return server
