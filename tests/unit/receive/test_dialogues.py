r"""Dialogues with the listener: text files in tests/dialogues, one behaviour each, the name as the
claim.

# text           a comment; text in parentheses at the end of a line is one too
L: key=value …   the listener: tls, auth, bare_newline, auth_without_tls, add_missing_headers,
                 proxy_protocol, helo_required; and networks=… recipients=… message_size=…
                 received_hops=…
F: full          the store has no room;  F: broken  it fails
C: line          the client says this, CRLF added.  \r \n \t \0 \\ \xNN; {800*x} is 800 times x
C< octets        … without CRLF
C: TLS           (after 220) the handshake
C: EOF           the client closes its half
S: pattern       the next reply; * is anything. Of several lines the first counts
S+ word          this stands in the last reply, or message
S! word          this does not
S: closed        the server ends the connection
Q: n             so many messages are in the queue; the last one is what S+ and S! look at now
Q: to a b …      the recipients of the last message
Q: from a        its reverse-path
"""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvloop

from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import QueueFilter, QueueFull, SpoolError
from relay.receive.access import Access
from relay.receive.limits import Limits
from relay.receive.spec import BareNewline, ListenerAuth, ListenerSpec, ListenerTls
from tests.fakes.client import Client
from tests.fakes.sink import TroubledSink
from tests.unit.receive.conftest import USERS, Desk

DIALOGUES = sorted((Path(__file__).parents[2] / "dialogues").glob("*.smtp"))
STEP = re.compile(r"([LFCSQ])([:<+!]) ?(.*)")
COMMENT = re.compile(r"\s+\([^()]*\)$")
REPEATED = re.compile(r"\{(\d+)\*([^{}]*)\}")


def steps(path: Path) -> list[tuple[int, str, str]]:
    found: list[tuple[int, str, str]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = STEP.fullmatch(line)
        assert match, f"{path.name}:{number}: {line!r} is not a step"
        text = COMMENT.sub("", match[3]) if match[1] != "C" else match[3]
        found.append((number, match[1] + match[2], text))
    return found


def octets(text: str) -> bytes:
    text = REPEATED.sub(lambda match: match[2] * int(match[1]), text)
    return (
        text.encode().decode("unicode_escape").encode("latin-1") if "\\" in text else text.encode()
    )


def listener(desk: Desk, words: str) -> ListenerSpec:
    settings = dict(word.split("=", 1) for word in words.split())
    if "networks" in settings:
        networks = tuple(
            ipaddress.ip_network(text) for text in settings["networks"].split(",") if text
        )
        desk.access = Access(networks, USERS)
    desk.limits = Limits(
        message_size_bytes=int(settings.get("message_size", 100_000)),
        recipients=int(settings.get("recipients", 1000)),
        received_hops=int(settings.get("received_hops", 100)),
    )
    return ListenerSpec(
        "127.0.0.1:0",
        tls=ListenerTls(settings.get("tls", "none")),
        auth=ListenerAuth(settings.get("auth", "none")),
        bare_newline=BareNewline(settings.get("bare_newline", "refuse")),
        auth_without_tls=settings.get("auth_without_tls") == "yes",
        add_missing_headers=settings.get("add_missing_headers") == "yes",
        proxy_protocol=settings.get("proxy_protocol") == "yes",
        helo_required=settings.get("helo_required") != "no",
    )


class Play:
    """One dialogue being played."""

    def __init__(self, desk: Desk, store: SqliteStore) -> None:
        self.desk = desk
        self.store = store
        desk.store = store
        self.spec = listener(desk, "")
        self.client: Client | None = None
        self.heard = ""

    async def connected(self) -> Client:
        if self.client is None:
            self.client = await self.desk.client(
                self.spec, tls=self.spec.tls is ListenerTls.IMPLICIT
            )
        return self.client

    async def step(self, kind: str, text: str) -> None:
        match kind, text:
            case "L:", _:
                self.spec = listener(self.desk, text)
            case "F:", _:
                trouble = {"full": QueueFull("no room"), "broken": SpoolError("secret\r\n250 lie")}
                self.desk.store = TroubledSink(self.store, trouble[text])
            case "C:", "TLS":
                await (await self.connected()).start_tls(self.desk.trust)
            case "C:", "EOF":
                (await self.connected()).writer.write_eof()
            case "C:", _:
                await (await self.connected()).send(octets(text) + b"\r\n")
            case "C<", _:
                await (await self.connected()).send(octets(text))
            case "S:", _:
                self.heard = await (await self.connected()).reply()
                first = self.heard.partition("\n")[0]
                assert fnmatch.fnmatchcase(first, text.replace("[", "[[]"))
            case "S+", _:
                assert text in self.heard
            case "S!", _:
                assert text not in self.heard
            case "Q:", _:
                await self.look_at_the_queue(*text.split())
            case _:
                raise AssertionError(f"{kind} is no step")

    async def look_at_the_queue(self, verb: str, *wanted: str) -> None:
        items = await self.store.list_messages(QueueFilter(), now=datetime.now(UTC))
        match verb:
            case "to":
                assert [recipient.address for recipient in items[-1].recipients] == list(wanted)
            case "from":
                assert [items[-1].reverse_path] == (list(wanted) or [""])
            case _:
                assert len(items) == int(verb)
                self.heard = ""
                if items:
                    pieces = [piece async for piece in self.store.read_content(items[-1].queue_id)]
                    self.heard = b"".join(pieces).decode("utf-8", "backslashreplace")


async def play(path: Path, desk: Desk, directory: Path) -> None:
    # Whether a commit survives a power cut is told elsewhere; this is about who says what.
    store = await SqliteStore.open(directory, synchronous="OFF")
    acting = Play(desk, store)
    try:
        for number, kind, text in steps(path):
            try:
                await acting.step(kind, text)
            except (AssertionError, OSError, TimeoutError) as error:
                told = f"{path.name}:{number}: {kind} {text}\nheard: {acting.heard!r}"
                raise AssertionError(told) from error
    finally:
        await desk.close()
        await store.close()


@pytest.mark.parametrize(
    "loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
@pytest.mark.parametrize("path", DIALOGUES, ids=[path.stem for path in DIALOGUES])
def test_dialogue_goes_as_its_file_says(
    path: Path,
    loop: Callable[[], asyncio.AbstractEventLoop],
    pem: tuple[str, str],
    trust: ssl.SSLContext,
    tmp_path: Path,
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(play(path, Desk(*pem, trust), tmp_path))


def test_dialogue_files_are_found() -> None:
    assert len(DIALOGUES) >= 60
