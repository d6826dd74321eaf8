"""Answers the requests of the control socket: a method for each verb, or for several.

    list, show, log                     the queue and the delivery log
    nodes                               the nodes that share the queue
    report                              the statistics of a period
    retry, hold, release, remove        changes of the queue
    health, status, metrics             the state of the relay
    settings                            the settings made over HTTP; the configuration in force
    mta-sts-…                           the MTA-STS policies in the store
    tls-report-…                        the reports on TLS for recipients' domains
    memory-list, -forget, -suggest      what hosts have shown of TLS; rules that fit it

An answer is a series of lines, in the form of `relay.admin.control_socket`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from relay.admin import operations
from relay.admin import report as reports
from relay.admin.control_socket import AnswerLines
from relay.admin.memory import (
    Memory,
    forget,
    forget_filter,
    list_memories,
    memory_filter,
    suggest,
    suggestion_bounds,
)
from relay.admin.mta_sts import Policies, policy_as_json
from relay.admin.operator import Operator
from relay.admin.requests import (
    RequestError,
    change_filter,
    count_filter,
    domain_in,
    event_filter,
    queue_filter,
    text_in,
)
from relay.admin.tls_reports import Reports, tls_report_answer
from relay.mail.jsontext import JsonFields
from relay.queue.api_state import ApiState, DomainSettings
from relay.queue.event_search import newest_seq
from relay.queue.nodes import differing_policies
from relay.queue.verbs import VERBS
from relay.route.mta_sts import policy_domain

FOLLOW_SECONDS = 0.5

log = logging.getLogger("relay.control")


@dataclass(frozen=True, slots=True)
class Control:
    """The parts of the relay that answer. `in_force`: digests of the configuration's sections."""

    operator: Operator
    api_state: ApiState | None = None
    in_force: Callable[[], Mapping[str, str]] = dict
    policies: Policies | None = None
    memory: Memory | None = None
    tls_reports: Reports | None = None

    async def answer(self, request: Mapping[str, object]) -> AnswerLines:
        """The lines that answer a request."""
        verb = request.get("verb")
        match verb:
            case "list":
                answers = self._list(request)
            case "nodes":
                answers = self._nodes()
            case "show":
                answers = self._show(request)
            case "log":
                answers = self._log(request)
            case "report":
                answers = self._report(request)
            case "settings":
                answers = self._settings()
            case "health" | "status" | "metrics":
                answers = self._running(verb)
            case "mta-sts-list" | "mta-sts-show" | "mta-sts-refresh" | "mta-sts-forget":
                answers = self._mta_sts(verb, request)
            case "tls-report-list" | "tls-report-show" | "tls-report-send":
                if self.tls_reports is None:
                    raise RequestError("nothing is counted or sent: tls_reports.send is false")
                answers = tls_report_answer(self.tls_reports, verb, request)
            case "memory-list" | "memory-forget" | "memory-suggest":
                answers = self._memory(verb, request)
            case str() if verb in VERBS:
                answers = self._change(verb, request)
            case _:
                raise RequestError(f"no such verb: {verb}")
        async for line in answers:
            yield line

    async def _list(self, request: Mapping[str, object]) -> AnswerLines:
        count = 0
        view, now = self.operator.view, self.operator.clock()
        async for page in operations.list_queue(view, queue_filter(request), now=now):
            count += len(page)
            # In a thread, so that mail does not wait for a large page.
            yield {"items": await asyncio.to_thread(operations.page_as_json, page)}
        yield {"done": {"count": count}}

    async def _nodes(self) -> AnswerLines:
        """The nodes that share the queue. "differing": those that decide by other policies."""
        nodes = await self.operator.view.nodes()
        yield {"items": [operations.node_as_json(node) for node in nodes]}
        yield {"done": {"differing": differing_policies(nodes)}}

    async def _show(self, request: Mapping[str, object]) -> AnswerLines:
        queue_id = text_in(request, "id")
        found = await operations.show_message(self.operator.view, queue_id)
        if found is not None:
            yield {"item": found}
        yield {"done": {"unknown": [] if found else [queue_id]}}

    async def _mta_sts(self, verb: str, request: Mapping[str, object]) -> AnswerLines:
        """MTA-STS policies. "unknown" in the last line has the domain if it has no policy."""
        if self.policies is None:
            raise RequestError("no relay is running")
        if verb == "mta-sts-list":
            async for page in operations.pages_of(self.policies.page):
                yield {"items": [policy_as_json(kept) for kept in page]}
            yield {"done": {}}
            return
        domain = policy_domain(domain_in(request))
        if not domain:
            raise RequestError("name a domain; an address has no MTA-STS policy")
        kept, reason = None, ""
        if verb == "mta-sts-forget":
            is_known = await self.policies.forget(domain)
            if is_known:
                log.info("operator: the MTA-STS policy of %s is forgotten", domain)
        else:
            if verb == "mta-sts-refresh":
                refreshed = await self.policies.refresh(domain)
                kept, reason = refreshed.kept, refreshed.reason
            else:
                kept = await self.policies.kept(domain)
                reason = self.policies.last_failure(domain) if kept is None else ""
            is_known = kept is not None
        if kept is not None:
            yield {"item": policy_as_json(kept)}
        yield {"done": {"unknown": [] if is_known else [domain], "reason": reason}}

    async def _memory(self, verb: str, request: Mapping[str, object]) -> AnswerLines:
        """What hosts have shown of TLS."""
        if self.memory is None:
            raise RequestError("no relay is running")
        now = self.operator.clock()
        match verb:
            case "memory-list":
                async for page in list_memories(self.memory, memory_filter(request), now=now):
                    yield {"items": page}
                yield {"done": {}}
            case "memory-forget":
                count = await forget(self.memory, forget_filter(request))
                if count:
                    log.info("operator: what hosts of %d domains have shown is forgotten", count)
                yield {"done": {"domains": count}}
            case _:
                messages, age = suggestion_bounds(request)
                found = suggest(self.memory, messages=messages, age=age, now=now)
                async for one in found:
                    yield {"item": one}
                yield {"done": {}}

    async def _running(self, verb: str) -> AnswerLines:
        """The state of the relay. Metrics are a text, which the first worker asks of the others."""
        relay = self.operator.running()
        match verb:
            case "health":
                yield {"done": dict(await relay.health())}
            case "status":
                yield {"done": (await relay.status()).as_json()}
            case _:
                yield {"done": {"text": (await relay.metrics()).decode()}}

    async def _change(self, verb: str, request: Mapping[str, object]) -> AnswerLines:
        done = None
        async for so_far in self.operator.change(verb, change_filter(verb, request)):
            if done is not None:
                yield {"so-far": done.as_json()}
            done = so_far
        assert done is not None
        log.info("operator: %s, %d recipients changed", verb, done.recipients)
        yield {"done": done.as_json()}

    async def _log(self, request: Mapping[str, object]) -> AnswerLines:
        wanted, view = event_filter(request), self.operator.view
        limit = request.get("limit")
        if limit is not None and (type(limit) is not int or not 1 <= limit <= 100_000):
            raise RequestError("limit is a number from 1 to 100000")
        follow = request.get("follow") is True
        # Asked first, so that no event is missed: one that commits meanwhile is found, or is new.
        seq = await newest_seq(view) if follow else 0
        async for at, line in operations.find_events(view, wanted, limit=limit):
            seq = at
            yield {"line": line}
        if follow:
            yield {"following": {}}
            async for line in operations.follow_events(view, wanted, after=seq, more=_a_moment):
                yield {"line": line}
        yield {"done": {}}

    async def _report(self, request: Mapping[str, object]) -> AnswerLines:
        """How the mail of a period was protected, and all exceptions in the store."""
        wanted = count_filter(request)
        found = await reports.counts(self.operator.view, wanted)
        yield {
            "report": {
                "begin": wanted.begin.isoformat(),
                "end": wanted.end.isoformat(),
                "sender-domain": wanted.sender_domain,
                "recipient-domain": wanted.recipient_domain,
                "counts": reports.counts_as_json(found),
            }
        }
        async for page in reports.listing(self.operator.view, wanted):
            yield {"items": [reports.exception_as_json(one) for one in page]}
        yield {"done": {}}

    async def _settings(self) -> AnswerLines:
        """The settings made over HTTP, and the digests of the configuration in force."""
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


def settings_of(lines: Iterable[JsonFields]) -> dict[str, DomainSettings]:
    """The settings in the lines that answer `settings`, by domain."""
    items = [line["item"] for line in lines if "item" in line]
    return {
        one["domain"]: DomainSettings(one["require-tls"], one["skip-verification"]) for one in items
    }


async def _a_moment() -> None:
    await asyncio.sleep(FOLLOW_SECONDS)
