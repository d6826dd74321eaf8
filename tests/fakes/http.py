"""The HTTP interface on a real store, with a client that has the right key."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from relay.admin.domain_settings import SettingsInForce
from relay.admin.operator import Operator
from relay.api import Api, HttpOptions, Targets
from relay.api.server import PROTOCOL_OPTIONS, application
from relay.daemon.explaining import explain
from relay.policy.fields import Wishes
from relay.policy.rules import PolicyRules, TlsRule
from relay.queue.entry import Entry
from relay.queue.sqlite.store import SqliteStore
from relay.route.addresses import Network
from relay.route.answers import AddressLookup, NoSuchName
from relay.route.next_hop import Host, Hosts
from relay.route.security import SecurityOptions
from tests.fakes.floors import Published, floors_of
from tests.fakes.running import QuietRelay
from tests.fakes.sink import TroubledSink

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
KEY = "key-of-the-test"
RULES = PolicyRules(domains={"locked.example": TlsRule(require_tls=True, allow_override=False)})


def auth(key: str, user: str = "api") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{key}'.encode()).decode()}"}


@dataclass
class Rig:
    """A client with the right key, and what stands behind the server."""

    http: Any
    store: SqliteStore
    sink: TroubledSink
    settings: SettingsInForce
    options: HttpOptions
    now: datetime = NOW
    rules: PolicyRules = RULES
    webhook_networks: Sequence[Network] = ()
    relay: QuietRelay = field(default_factory=QuietRelay)
    api: Api = field(init=False)

    async def form(self, path: str, method: str = "POST", **fields: Any) -> tuple[int, Any]:
        """Ask with a form; the status and what was said. `o_x` means `o:x`, a list is a field
        repeated.
        """
        data = aiohttp.FormData(quote_fields=False)
        for name, value in fields.items():
            name = f"{name[0]}:{name[2:].replace('_', '-')}" if name[1:2] == "_" else name
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, bytes):
                    data.add_field(name, io.BytesIO(one), filename=f"{name}.bin")
                else:
                    data.add_field(name, one)
        return await self.ask(method, path, data=data)

    async def send(self, path: str = "/v3/example.com/messages", **fields: Any) -> tuple[int, Any]:
        """Send a message that has all it needs."""
        usual = {"from": "Ann <ann@example.com>", "to": "bob@dest.example", "text": "hello"}
        return await self.form(path, **(usual | fields))

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        async with self.http.request(method, path, **more) as response:
            text = await response.text()
            return response.status, json.loads(text) if "json" in response.content_type else text

    async def claimed(self) -> list[Entry]:
        return await self.store.claim_due(now=self.now, limit=100)

    async def content(self, entry: Entry) -> bytes:
        return b"".join([piece async for piece in self.store.read_content(entry.message.queue_id)])


class _Server(TestServer):
    """As the relay serves: a request goes on when its client has gone, and nothing is inflated."""

    async def _make_runner(self, **_: Any) -> web.BaseRunner:
        return web.AppRunner(self.app, **PROTOCOL_OPTIONS)


async def _look_up(name: str) -> AddressLookup:
    return NoSuchName()


@contextlib.asynccontextmanager
async def http_rig(directory: Path) -> AsyncIterator[Rig]:
    """All of it, for a while."""
    store = await SqliteStore.open(directory / "spool", now=NOW, synchronous="OFF")
    settings = SettingsInForce(store.api_state)
    await settings.load()
    sink = TroubledSink(store)
    made = Rig(
        None, store, sink, settings, HttpOptions(api_keys=(KEY,), webhook_signing_key="signs")
    )

    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        return Hosts((Host(f"mx.{domain}", "192.0.2.7", 25, 10),))

    async def explained(
        reverse_path: str, recipient: str, wishes: Wishes, /, **speaks: bool
    ) -> dict[str, Any]:
        return await explain(
            reverse_path=reverse_path,
            recipient=recipient,
            wishes=wishes,
            rules=settings.over(made.rules),
            route=route,
            options=SecurityOptions(),
            floors=floors_of(Published()),
            patience=timedelta(seconds=1),
            lifetime=timedelta(days=5),
            **speaks,
        )

    api = Api(
        Operator(store, lambda: made.now, store, made.relay),
        hostname="relay.example",
        sink=sink,
        state=store.api_state,
        settings=settings,
        options=lambda: made.options,
        rules=lambda: settings.over(made.rules),
        webhook_objection=Targets(_look_up, lambda: made.webhook_networks).objection,
        message_size_bytes=4 * 1024 * 1024,
    )
    made.relay.explained = explained
    made.api = api
    server = _Server(application(api))
    await server.start_server()
    async with TestClient(server, headers=auth(KEY)) as client:
        made.http = client
        yield made
    await store.close()
