"""The page on a real store, with browsers that have signed in or have not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer
from argon2 import PasswordHasher

from relay.admin.domain_settings import SettingsInForce
from relay.admin.operator import Operator
from relay.api import HAS_KEY, Api, HttpOptions, Targets
from relay.api.server import PROTOCOL_OPTIONS, application
from relay.daemon.explaining import explain
from relay.mail.outcome import (
    Bounced,
    CertificateFacts,
    Deferred,
    Delivered,
    Downgrade,
    DowngradeReason,
    HopPolicy,
    HopSession,
    Level,
    NamedBy,
    Outcome,
    PolicyMode,
    PolicyResult,
    PolicyType,
    Routing,
    VerifiedBy,
)
from relay.policy.fields import Wishes
from relay.policy.rules import DestinationRule, PolicyRules, TlsRule
from relay.queue.entry import MessageSummary
from relay.queue.sqlite.store import SqliteStore
from relay.report import deliverylog
from relay.route.answers import AddressLookup, NoSuchName
from relay.route.next_hop import Host, Hosts
from relay.route.security import SecurityOptions
from relay.submit.failures import Failures
from relay.web.options import Role, WebOptions, WebUser
from relay.web.site import Site, install
from relay.web.state import Facts, Web
from tests.fakes.floors import Published, floors_of
from tests.fakes.queued import CONTENT, new_message, settled
from tests.fakes.running import QuietRelay

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
PASSWORD = "correct horse"
_HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
USERS = {
    "olga": WebUser("olga", _HASH, Role.OPERATOR),
    "vera": WebUser("vera", _HASH, Role.VIEWER),
    "otto": WebUser("otto", _HASH, Role.OPERATOR),
    "paul": WebUser("paul", None, Role.OPERATOR),
}
RULES = PolicyRules(
    domains={"legal.example": TlsRule(require_tls=True)},
    destinations={"partner.example": DestinationRule(require_tls=True, allow_override=False)},
)

CERTIFICATE = CertificateFacts(
    "CN=mx.partner.example",
    "CN=Example Root CA 2,O=Example Trust",
    ("mx.partner.example", "mx2.partner.example"),
    NOW - timedelta(days=30),
    NOW + timedelta(days=60),
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
)
EXPIRED = replace(
    CERTIFICATE,
    subject="CN=mail.strict.example",
    names=("mail.strict.example",),
    not_before=NOW - timedelta(days=95),
    not_after=NOW - timedelta(days=5),
    sha256="2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
)
VERIFIED = HopSession(
    "mx.partner.example",
    "192.0.2.7",
    True,
    "TLSv1.3",
    "TLS_AES_256_GCM_SHA384",
    VerifiedBy.PKIX,
    certificate=CERTIFICATE,
)
CLEAR = HopSession(
    "mx.old.example",
    "192.0.2.9",
    downgrade=Downgrade(Level.VERIFIED, DowngradeReason.NOT_OFFERED, "STARTTLS not offered"),
)
SENT = Delivered("2.0.0", 250, "2.0.0 OK", session=VERIFIED)
SENT_IN_CLEAR = Delivered("2.0.0", 250, "2.0.0 OK", session=CLEAR)
NO_TLS = Deferred(
    "4.7.5",
    0,
    "",
    "mx.strict.example [192.0.2.8]: certificate not verified: certificate has expired",
    HopSession(
        "mx.strict.example",
        "192.0.2.8",
        certificate=EXPIRED,
        policy=HopPolicy(PolicyType.STS, PolicyMode.ENFORCE, PolicyResult.EXPIRED),
    ),
    hosts=("mx0.strict.example [192.0.2.18]: STARTTLS not offered",),
    earlier=(HopSession("mx0.strict.example", "192.0.2.18"),),
    routing=Routing(
        NamedBy.MX,
        False,
        ("10 mx0.strict.example [192.0.2.18]", "20 mx.strict.example [192.0.2.8]"),
    ),
    tls_unmet=True,
)
NOBODY = Bounced("5.1.1", 550, "no such user", session=VERIFIED)
LATER = Deferred("4.2.1", 450, "mailbox busy", session=VERIFIED)


class NoPolicies:
    """No MTA-STS policy is kept."""

    async def kept(self, domain: str) -> None:
        return None

    def last_failure(self, domain: str) -> str:
        return ""

    async def page(self, *, after: str = "", limit: int = 500) -> Any:
        return [], None

    async def refresh(self, domain: str) -> Any:
        raise NotImplementedError

    async def forget(self, domain: str) -> bool:
        return False


@dataclass
class Browser:
    """One browser's requests; redirects are shown and not followed."""

    http: aiohttp.ClientSession
    base: str
    token: str = ""

    async def get(self, place: str, **headers: str) -> tuple[int, str]:
        async with self.http.get(
            self.base + place, headers=headers, allow_redirects=False
        ) as answer:
            return answer.status, await answer.text()

    async def where(self, place: str) -> str:
        """Where a request is sent on to."""
        async with self.http.get(self.base + place, allow_redirects=False) as answer:
            return answer.headers.get("Location", "")

    async def post(
        self, place: str, _headers: dict[str, str] | None = None, **fields: Any
    ) -> tuple[int, str, str]:
        """Status, text and where it is sent on to; the token is this browser's unless given."""
        data = {"token": self.token} | fields
        pairs = [
            (name, one)
            for name, value in data.items()
            for one in (value if isinstance(value, list) else [value])
        ]
        async with self.http.post(
            self.base + place, data=pairs, headers=_headers, allow_redirects=False
        ) as answer:
            return answer.status, await answer.text(), answer.headers.get("Location", "")

    async def sign_in(self, name: str, password: str = PASSWORD) -> int:
        status, _, _ = await self.post("/login", name=name, password=password)
        if status == 303:
            _, page = await self.get("/")
            found = re.search(r'name="token" value="([0-9a-f]+)"', page)
            assert found is not None, page
            self.token = found[1]
        return status


@dataclass
class PageRig:
    """The page, and what stands behind it."""

    store: SqliteStore
    running: QuietRelay
    options: WebOptions
    now: datetime = NOW
    note: str = ""
    base: str = ""
    published: Published = field(default_factory=Published)
    validates: bool = True
    site: Site = field(init=False)
    failures: Failures = field(default_factory=Failures)
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def browser(self, name: str = "", **options: Any) -> Browser:
        """A new browser, signed in as `name`."""
        jar = aiohttp.CookieJar(unsafe=True)
        session = aiohttp.ClientSession(cookie_jar=jar, **options)
        await self.stack.enter_async_context(session)
        made = Browser(session, self.base)
        if name:
            assert await made.sign_in(name) == 303
        return made

    async def mail(
        self,
        recipient: str,
        outcome: Outcome | None = SENT,
        *,
        sender: str = "alice@legal.example",
        at: datetime | None = None,
        subject: str = "Quarterly figures",
        queue_id: str = "",
        client: str = "192.0.2.1 (app.legal.example)",
        client_tls: str = "TLSv1.3, TLS_AES_256_GCM_SHA384",
        client_user: str = "app1",
        content: bytes = CONTENT,
    ) -> str:
        """A message with its outcome; its queue id. Without an outcome it waits."""
        at = at or self.now - timedelta(minutes=2)
        new = new_message(recipient, sender=sender, arrived=at, queue_id=queue_id, content=content)
        summary = MessageSummary("1@legal.example", sender, recipient, subject)
        message = replace(
            new.message,
            summary=summary,
            client=client,
            client_tls=client_tls,
            client_user=client_user,
        )
        events = (deliverylog.accepted(message, new.recipients),)
        await self.store.accept(replace(new, message=message, events=events))
        if outcome is None:
            return message.queue_id
        for entry in await self.store.claim_due(now=self.now, limit=100):
            settlement = settled(entry, outcome, at=at + timedelta(seconds=2))
            retry_in = timedelta(minutes=5) if isinstance(outcome, Deferred) else None
            changes = tuple(replace(one, retry_in=retry_in) for one in settlement.changes)
            settlement = replace(settlement, changes=changes)
            told = [
                deliverylog.settled(entry, one, now=at + timedelta(seconds=2))
                for one in settlement.changes
            ]
            await self.store.record(settlement, events=told)
        return message.queue_id

    async def some_mail(self) -> None:
        """Mail of every outcome, at several times."""
        for hours in range(20):
            await self.mail("bob@partner.example", at=self.now - timedelta(hours=hours, minutes=3))
        await self.mail("carol@old.example", SENT_IN_CLEAR)
        await self.mail("dave@strict.example", NO_TLS)
        await self.mail("nobody@partner.example", NOBODY)
        await self.mail("erin@busy.example", LATER)


async def evil_mail(rig: PageRig, text: str) -> str:
    """Mail with this text in every field that a stranger fills; the id of a message that waits."""
    part = text[:200]
    certificate = replace(CERTIFICATE, subject=part, issuer=part, names=(part, part))
    session = HopSession(
        part, part, True, text[:60], text[:60], certificate=certificate, unsigned=part
    )
    facts: dict[str, Any] = {
        "hosts": (text, text),
        "earlier": (session,),
        "routing": Routing(NamedBy.MX, False, (part, part)),
    }
    told: dict[str, Any] = {
        "sender": '"<b>x</b>"@evil.example',
        "subject": part,
        "client": part,
        "client_tls": part,
        "client_user": part,
        "content": f"Subject: {part}\r\nX-Evil: {part}\r\n\r\n{text}\r\n".encode(),
    }
    bounced = Bounced("5.1.1", 550, text, text, session, **facts)
    await rig.mail("b@evil.example", bounced, **told)
    await rig.mail("c@evil.example", None, **told)
    later = Deferred("4.2.1", 450, text, text, session, **facts)
    return await rig.mail("d@evil.example", later, **told)


async def _look_up(name: str) -> AddressLookup:
    return NoSuchName()


@contextlib.asynccontextmanager
async def page_rig(directory: Path, *, note: str = "") -> AsyncIterator[PageRig]:
    """All of it, for a while."""
    store = await SqliteStore.open(directory / "spool", now=NOW, synchronous="OFF")
    settings = SettingsInForce(store.api_state)
    await settings.load()
    rig = PageRig(store, QuietRelay(), WebOptions(users=USERS), note=note)

    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        bases = (f"mx.{domain}",)
        return Hosts((Host(f"mx.{domain}", "192.0.2.7", 25, 10, tlsa_bases=bases),))

    async def explained(
        reverse_path: str, recipient: str, wishes: Wishes, /, **speaks: bool
    ) -> dict[str, Any]:
        return await explain(
            reverse_path=reverse_path,
            recipient=recipient,
            wishes=wishes,
            rules=RULES,
            route=route,
            options=SecurityOptions(),
            floors=floors_of(rig.published),
            patience=timedelta(seconds=1),
            lifetime=timedelta(days=5),
            **speaks,
        )

    async def facts() -> Facts:
        return Facts(
            version="1.0",
            workers=1,
            started=NOW - timedelta(days=3),
            free_bytes=80 * 1024**3,
            log_lag_events=0,
            trouble=rig.running.trouble,
            certificates={"/etc/relay/tls.pem": NOW + timedelta(days=61)},
            commit_seconds=0.004,
            nameservers=("127.0.0.1",),
            validates=rig.validates,
        )

    rig.running.explained = explained
    operator = Operator(store, lambda: rig.now, store, rig.running)
    api = Api(
        operator,
        hostname="relay.example",
        sink=store,
        state=store.api_state,
        settings=settings,
        options=HttpOptions,
        rules=lambda: RULES,
        webhook_objection=Targets(_look_up, lambda: ()).objection,
        message_size_bytes=1024 * 1024,
    )
    state = Web(
        operator,
        hostname="relay.example",
        options=lambda: rig.options,
        rules=lambda: RULES,
        facts=facts,
        policies=NoPolicies(),
        write_event=store.write_event,
        configuration=lambda: "hostname: relay.example\n",
        locations=lambda: {"policy.domains.legal.example": "relay.yaml:12"},
        failures=rig.failures,
        note=lambda: rig.note,
    )
    app = application(api)
    rig.site = install(app, state=state, known=HAS_KEY)
    server = _Server(app)
    await server.start_server()
    rig.base = f"http://127.0.0.1:{server.port}"
    try:
        async with rig.stack:
            yield rig
    finally:
        await server.close()
        await rig.store.close()


class _Server(TestServer):
    """As the relay serves."""

    async def _make_runner(self, **_: Any) -> web.BaseRunner:
        return web.AppRunner(self.app, **PROTOCOL_OPTIONS)
